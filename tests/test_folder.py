"""Folders and archives of images: layouts, broken files, and what is refused with a sentence."""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sfd.data.folder import FolderSource, skipped_report, write_folder
from sfd.data.shapes import ShapesSource
from sfd.utils.errors import SFDError


def put(path: Path, colour: tuple[int, int, int] = (9, 8, 7), size: tuple[int, int] = (12, 10)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def pack(folder: Path, archive: Path, prefix: str = "", compression: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(archive, "w", compression) as target:
        for path in sorted(folder.rglob("*")):
            target.write(path, prefix + path.relative_to(folder).as_posix())
    return archive


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    """Two classes of two and one images."""
    put(tmp_path / "pets/dog/a.png", (1, 2, 3))
    put(tmp_path / "pets/cat/b.png", (4, 5, 6), (40, 30))
    put(tmp_path / "pets/cat/more/c.png", (7, 8, 9), (3, 5))
    return tmp_path / "pets"


def test_sub_folders_are_classes(pets: Path) -> None:
    source = FolderSource(pets, 8)
    assert source.classes == ("cat", "dog")
    assert source.names == ["cat/b.png", "cat/more/c.png", "dog/a.png"]
    assert source.labels.tolist() == [0, 0, 1]
    assert source.labels.dtype == np.int64
    assert source.load([2, 0])[:, 0, 0].tolist() == [[1, 2, 3], [4, 5, 6]]
    assert source.skipped == []


def test_images_alone_are_unconditional(tmp_path: Path) -> None:
    put(tmp_path / "b.png")
    put(tmp_path / "a.jpg")
    source = FolderSource(tmp_path, 8)
    assert source.classes == ()
    assert source.names == ["a.jpg", "b.png"]
    assert source.labels.tolist() == [0, 0]


@pytest.mark.parametrize("prefix", ["", "pets/"])
@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_an_archive_is_its_folder(pets: Path, tmp_path: Path, prefix: str, compression: int) -> None:
    folder = FolderSource(pets, 8)
    archive = FolderSource(pack(pets, tmp_path / "pets.zip", prefix, compression), 8)
    assert archive.classes == folder.classes
    assert archive.names == folder.names
    assert archive.identity == folder.identity
    assert np.array_equal(archive.load(range(3)), folder.load(range(3)))


def test_an_archive_of_one_folder_of_images_is_unconditional(tmp_path: Path) -> None:
    put(tmp_path / "photos/a.png")
    assert FolderSource(pack(tmp_path / "photos", tmp_path / "p.zip", "photos/"), 8).classes == ()


def test_shapes_written_out_read_back_exactly(tmp_path: Path) -> None:
    shapes = ShapesSource(60, 0)
    write_folder(shapes, tmp_path / "out")
    source = FolderSource(tmp_path / "out", 32)
    order = [int(Path(name).stem) for name in source.names]
    assert source.classes == tuple(sorted(shapes.classes))
    assert np.array_equal(source.load(range(60)), shapes.load(order))
    assert [source.classes[k] for k in source.labels] == [shapes.classes[k] for k in shapes.labels[order]]


def test_nothing_is_written_over(tmp_path: Path) -> None:
    put(tmp_path / "a.png")
    with pytest.raises(SFDError, match="exists already"):
        write_folder(ShapesSource(3, 0), tmp_path)


def test_kept_pixels_are_the_decoded_ones(pets: Path, tmp_path: Path) -> None:
    (pets / "cat/bad.png").write_bytes(b"no image")
    for path in (pets, pack(pets, tmp_path / "pets.zip")):
        kept, lazy = FolderSource(path, 8), FolderSource(path, 8, budget=0)
        assert kept.resident
        assert not lazy.resident
        assert np.array_equal(kept.load([2, 0, 1]), lazy.load([2, 0, 1]))


def test_broken_files_are_skipped_and_named(pets: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = put(pets / "dog/whole.png", size=(64, 64)).read_bytes()
    (pets / "dog/cut.png").write_bytes(whole[: len(whole) // 2])
    (pets / "cat/notes.txt").write_text("hello")
    (pets / "cat/empty.jpg").touch()
    (pets / "cat/gone.png").symlink_to(pets / "nowhere.png")
    (pets / "labels.csv").write_text("a,b")
    with caplog.at_level(logging.WARNING):
        source = FolderSource(pets, 8)
    assert [name for name, _ in source.skipped] == [
        "labels.csv",
        "cat/empty.jpg",
        "cat/gone.png",
        "cat/notes.txt",
        "dog/cut.png",
    ]
    assert all(reason for _, reason in source.skipped)
    assert len(source) == 4
    assert "skipped 5 of 9 files" in caplog.text
    assert "cat/empty.jpg: the file is empty" in caplog.text


def test_strict_refuses_broken_files(pets: Path) -> None:
    (pets / "cat/notes.txt").write_text("hello")
    with pytest.raises(SFDError, match=r"1 of 4 files cannot be used \(cat/notes.txt: .*strict off"):
        FolderSource(pets, 8, strict=True)


def test_identity_is_that_of_the_images_used(pets: Path) -> None:
    before = FolderSource(pets, 8).identity
    (pets / "cat/notes.txt").write_text("hello")
    assert FolderSource(pets, 8).identity == before
    assert FolderSource(pets, 16).identity != before
    put(pets / "cat/new.png")
    assert FolderSource(pets, 8).identity != before


@pytest.mark.parametrize("packed", [False, True])
def test_identity_is_that_of_the_pixels(pets: Path, tmp_path: Path, packed: bool) -> None:
    (pets / "dog/a.png").unlink()
    identities = []
    for colour in ((1, 2, 3), (3, 2, 1)):
        size = put(pets / "dog/a.bmp", colour).stat().st_size  # a BMP's size does not depend on its colours
        path = pack(pets, tmp_path / "pets.zip") if packed else pets
        identities.append((size, FolderSource(path, 8).identity, FolderSource(path, 8, budget=0).identity))
    (size, kept, lazy), (other_size, other_kept, _) = identities
    assert size == other_size and kept == lazy
    assert kept != other_kept


def test_all_skipped_files_are_reported(pets: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert skipped_report(FolderSource(pets, 8)) == ""
    for number in range(7):
        (pets / f"cat/{number}.txt").write_text("hello")
    with caplog.at_level(logging.WARNING):
        source = FolderSource(pets, 8)
    assert "and 2 more" in caplog.text
    lines = [line.split("\t") for line in skipped_report(source).splitlines()]
    assert lines == [[name, reason] for name, reason in source.skipped]
    assert [name for name, _ in lines] == [f"cat/{number}.txt" for number in range(7)]


def test_what_systems_leave_behind_is_passed_over(pets: Path) -> None:
    (pets / ".DS_Store").touch()
    (pets / "__MACOSX/cat").mkdir(parents=True)
    (pets / "__MACOSX/cat/._b.png").touch()
    source = FolderSource(pets, 8)
    assert source.classes == ("cat", "dog")
    assert source.skipped == []


def test_links_are_followed_but_not_in_circles(pets: Path) -> None:
    (pets / "cat/round").symlink_to(pets)
    (pets / "hound").symlink_to(pets / "dog")
    source = FolderSource(pets, 8)
    assert source.classes == ("cat", "dog", "hound")
    assert "hound/a.png" in source.names
    assert not any("round/cat" in name for name in source.names)


def test_a_missing_folder_is_explained(tmp_path: Path) -> None:
    with pytest.raises(SFDError, match="there is no"):
        FolderSource(tmp_path / "none", 8)


def test_a_file_that_is_no_archive_is_explained(tmp_path: Path) -> None:
    with pytest.raises(SFDError, match="neither a folder nor a zip"):
        FolderSource(put(tmp_path / "a.png"), 8)


def test_an_empty_folder_is_explained(tmp_path: Path) -> None:
    with pytest.raises(SFDError, match="holds no readable image; give"):
        FolderSource(tmp_path, 8)


def test_an_empty_archive_is_explained(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(SFDError, match="holds no readable image; give"):
        FolderSource(pack(tmp_path / "empty", tmp_path / "e.zip"), 8)


def test_a_folder_of_broken_files_says_why(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"hello")
    with pytest.raises(SFDError, match=r"no readable image \(a.png: no image in a known format"):
        FolderSource(tmp_path, 8)


@pytest.mark.parametrize("packed", [False, True])
def test_a_class_without_an_image_is_explained(pets: Path, tmp_path: Path, packed: bool) -> None:
    (pets / "bird").mkdir()
    with pytest.raises(SFDError, match="class folder 'bird' holds no readable image"):
        FolderSource(pack(pets, tmp_path / "pets.zip") if packed else pets, 8)


def test_a_class_of_broken_images_is_explained(pets: Path) -> None:
    (pets / "dog/a.png").write_bytes(b"hello")
    with pytest.raises(SFDError, match="class folder 'dog' holds no readable image"):
        FolderSource(pets, 8)


def test_images_beside_classes_are_explained(pets: Path) -> None:
    put(pets / "stray.png")
    with pytest.raises(SFDError, match=r"images beside its 2 sub-folders \('stray.png'"):
        FolderSource(pets, 8)


@pytest.mark.parametrize("name", ["../a.png", "/tmp/a.png", "cat/../../a.png"])
def test_archive_members_that_point_outside_are_refused(tmp_path: Path, name: str) -> None:
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as archive:
        archive.write(put(tmp_path / "a.png"), "cat/a.png")
        archive.writestr(zipfile.ZipInfo(name), b"x")
    with pytest.raises(SFDError, match="points outside"):
        FolderSource(tmp_path / "bad.zip", 8)


def test_a_cut_archive_is_explained(pets: Path, tmp_path: Path) -> None:
    data = pack(pets, tmp_path / "pets.zip").read_bytes()
    (tmp_path / "cut.zip").write_bytes(data[: len(data) // 2])
    with pytest.raises(SFDError, match=r"neither a folder nor a zip|damaged zip"):
        FolderSource(tmp_path / "cut.zip", 8)


def test_a_damaged_member_is_skipped(pets: Path, tmp_path: Path) -> None:
    data = bytearray(pack(pets, tmp_path / "pets.zip", compression=zipfile.ZIP_STORED).read_bytes())
    data[data.index(b"IDAT") + 6] ^= 0xFF  # in cat/b.png, the first member: its checksum no longer fits
    (tmp_path / "damaged.zip").write_bytes(data)
    source = FolderSource(tmp_path / "damaged.zip", 8)
    assert [name for name, _ in source.skipped] == ["cat/b.png"]


def test_a_file_that_goes_away_later_is_explained(pets: Path) -> None:
    source = FolderSource(pets, 8, budget=0)
    (pets / "dog/a.png").unlink()
    with pytest.raises(SFDError, match=r"dog/a.png changed since"):
        source.load([2])


def test_threads_read_one_archive(tmp_path: Path) -> None:
    write_folder(ShapesSource(100, 0), tmp_path / "out")
    source = FolderSource(pack(tmp_path / "out", tmp_path / "out.zip"), 32, budget=0)
    expected = source.load(range(100))
    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(lambda i: source.load([i])[0], list(range(100)) * 3))
    assert np.array_equal(np.stack(parts), np.concatenate([expected] * 3))


def load_all(source: FolderSource) -> np.ndarray:
    return source.load(range(len(source)))


def test_other_processes_read_the_archive(pets: Path, tmp_path: Path) -> None:
    source = FolderSource(pack(pets, tmp_path / "pets.zip"), 8, budget=0)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert np.array_equal(pool.apply(load_all, (source,)), load_all(source))
    assert np.array_equal(load_all(pickle.loads(pickle.dumps(source))), load_all(source))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may list any folder")
def test_a_folder_that_may_not_be_listed_is_explained(pets: Path) -> None:
    (pets / "dog").chmod(0)
    try:
        with pytest.raises(SFDError, match="cannot be listed"):
            FolderSource(pets, 8)
    finally:
        (pets / "dog").chmod(0o755)


def test_a_senseless_size_is_explained(pets: Path) -> None:
    with pytest.raises(SFDError, match="image_size is 0"):
        FolderSource(pets, 0)


def remembered(path: Path, memory: Path) -> tuple[FolderSource, bool]:
    """Open with nothing kept; and whether the files were decoded for it."""
    before = memory.stat().st_mtime_ns if memory.exists() else None
    source = FolderSource(path, 8, budget=0, memory=memory)
    return source, not memory.exists() or memory.stat().st_mtime_ns != before


@pytest.mark.parametrize("packed", [False, True])
def test_a_check_is_remembered_until_a_file_changes(pets: Path, tmp_path: Path, packed: bool) -> None:
    def place() -> Path:
        return pack(pets, tmp_path / "pets.zip") if packed else pets

    path, memory = place(), tmp_path / "run" / "checked.json"
    first, checked = remembered(path, memory)
    again, repeated = remembered(path, memory)
    assert checked and not repeated
    assert again.identity == first.identity and np.array_equal(again.load(range(3)), first.load(range(3)))
    put(pets / "dog/a.png", (200, 0, 0))
    changed, repeated = remembered(place(), memory)
    assert repeated and changed.identity != first.identity


def test_a_check_that_found_damage_is_not_remembered(pets: Path, tmp_path: Path) -> None:
    (pets / "dog/bad.png").write_bytes(b"bad")
    memory = tmp_path / "checked.json"
    assert remembered(pets, memory)[0].skipped and not memory.exists()


def test_a_damaged_memory_is_made_anew(pets: Path, tmp_path: Path) -> None:
    memory = tmp_path / "checked.json"
    source, _ = remembered(pets, memory)
    memory.write_text('{"seen":')
    again, checked = remembered(pets, memory)
    assert checked and again.identity == source.identity


def test_images_of_their_own_size_must_be_squares_of_one_size(tmp_path):
    for number in range(3):
        Image.new("RGB", (12, 12)).save(tmp_path / f"{number}.png")
    assert FolderSource(tmp_path, None).image_size == 12
    Image.new("RGB", (12, 9)).save(tmp_path / "3.png")
    with pytest.raises(SFDError, match=r"3\.png: 12×9 pixels in place of 12×12"):
        FolderSource(tmp_path, None)
