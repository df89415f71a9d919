"""Images of a folder or archive: checked once, skipped if broken, read lazily or kept in memory."""

from __future__ import annotations

import json
import logging
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from helpers.pictures import pack, put
from sfd.data import folder as module
from sfd.data.folder import FolderSource, skipped_report, write_folder
from sfd.data.shapes import ShapesSource
from sfd.utils.errors import SFDError


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    """Two classes of two and one images."""
    put(tmp_path / "pets/dog/a.png", (1, 2, 3))
    put(tmp_path / "pets/cat/b.png", (4, 5, 6), (40, 30))
    put(tmp_path / "pets/cat/more/c.png", (7, 8, 9), (3, 5))
    return tmp_path / "pets"


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_an_archive_equals_its_folder(pets: Path, tmp_path: Path, compression: int) -> None:
    folder = FolderSource(pets, 8)
    archive = FolderSource(pack(pets, tmp_path / "pets.zip", compression=compression), 8)
    assert archive.identity == folder.identity
    assert np.array_equal(archive.load(range(3)), folder.load(range(3)))
    assert folder.load([2, 0])[:, 0, 0].tolist() == [[1, 2, 3], [4, 5, 6]]


def test_written_shapes_are_read_back_exactly(tmp_path: Path) -> None:
    shapes = ShapesSource(60, 0)
    write_folder(shapes, tmp_path / "out")
    source = FolderSource(tmp_path / "out", 32)
    order = [int(Path(name).stem) for name in source.names]
    assert source.classes == tuple(sorted(shapes.classes))
    assert np.array_equal(source.load(range(60)), shapes.load(order))
    assert [source.classes[k] for k in source.labels] == [shapes.classes[k] for k in shapes.labels[order]]
    with pytest.raises(SFDError, match="not overwritten"):
        write_folder(shapes, tmp_path / "out")


@pytest.mark.parametrize("packed", [False, True])
def test_images_in_memory_equal_decoded_ones(pets: Path, tmp_path: Path, packed: bool) -> None:
    (pets / "cat/bad.png").write_bytes(b"no image")
    path = pack(pets, tmp_path / "pets.zip") if packed else pets
    kept, lazy = FolderSource(path, 8), FolderSource(path, 8, budget=0)
    assert kept.resident and not lazy.resident
    assert np.array_equal(kept.load([2, 0, 1]), lazy.load([2, 0, 1]))


def test_broken_files_are_skipped_and_named(pets: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = put(pets / "dog/whole.png", size=(64, 64)).read_bytes()
    (pets / "dog/cut.png").write_bytes(whole[: len(whole) // 2])
    (pets / "cat/empty.jpg").touch()
    for number in range(5):
        (pets / f"cat/{number}.png").write_bytes(b"hello")
    with caplog.at_level(logging.WARNING):
        source = FolderSource(pets, 8)
    expected = ["cat/0.png", "cat/1.png", "cat/2.png", "cat/3.png", "cat/4.png", "cat/empty.jpg", "dog/cut.png"]
    assert [line.split("\t")[0] for line in skipped_report(source).splitlines()] == expected
    assert all(reason for _, reason in source.skipped)
    assert len(source) == 4
    assert "skipped 7 of 11 files" in caplog.text and "and 2 more" in caplog.text
    with pytest.raises(SFDError, match=r"7 of 11 files cannot be used \(cat/0.png: .*strict off"):
        FolderSource(pets, 8, strict=True)


@pytest.mark.parametrize("packed", [False, True])
def test_identity_depends_on_the_images_used_alone(pets: Path, tmp_path: Path, packed: bool) -> None:
    def identity(size: int = 8, **options: int) -> str:
        return FolderSource(pack(pets, tmp_path / "pets.zip") if packed else pets, size, **options).identity

    put(pets / "dog/a.bmp", (1, 2, 3))
    before = identity()
    (pets / "cat/notes.txt").write_text("hello")
    (pets / "cat/bad.png").write_text("hello")
    assert before == identity() == identity(budget=0) != identity(16)
    put(pets / "dog/a.bmp", (3, 2, 1))  # a BMP's size does not depend on its colours
    assert identity() != before


def test_identity_does_not_depend_on_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for value, name in enumerate(("cat/a.bmp", "cat/b.bmp", "dog/c.bmp"), start=1):
        put(tmp_path / "data" / name, (value, value, value), (4, 4))
    (tmp_path / "data").rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    for path in ("moved", tmp_path / "moved"):
        assert FolderSource(path, 8).identity == "9c54b6cd0916b488"  # as in version 0.1


def test_a_path_without_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    cut = pack(put(tmp_path / "full/a.png").parent, tmp_path / "full.zip").read_bytes()[:-30]
    (tmp_path / "cut.zip").write_bytes(cut)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/a.png").write_bytes(b"hello")
    for path, message in (
        (tmp_path / "none", "there is no"),
        (put(tmp_path / "a.png"), "a single image"),
        (tmp_path / "cut.zip", "damaged zip"),
        (tmp_path / "empty", "holds no readable image; give"),
        (pack(tmp_path / "empty", tmp_path / "empty.zip"), "holds no readable image; give"),
        (tmp_path / "bad", r"no readable image \(a.png: no image in a known format"),
    ):
        with pytest.raises(SFDError, match=message):
            FolderSource(path, 8)
    with pytest.raises(SFDError, match="image_size is 0"):
        FolderSource(tmp_path / "full", 0)


def test_a_file_that_disappears_later_is_named(pets: Path) -> None:
    source = FolderSource(pets, 8, budget=0)
    (pets / "dog/a.png").unlink()
    with pytest.raises(SFDError, match=r"dog/a.png changed since"):
        source.load([2])


def test_several_threads_read_one_archive(tmp_path: Path) -> None:
    write_folder(ShapesSource(100, 0), tmp_path / "out")
    source = FolderSource(pack(tmp_path / "out", tmp_path / "out.zip"), 32, budget=0)
    expected = source.load(range(100))
    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(lambda i: source.load([i])[0], list(range(100)) * 3))
    assert np.array_equal(np.stack(parts), np.concatenate([expected] * 3))


class TestCheckCache:
    """The result of checking all images is kept in a file and used until an image changes."""

    @pytest.fixture(autouse=True)
    def count(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Count the images that are decoded."""
        self.decoded = 0

        def counting(*args, **options) -> np.ndarray:
            self.decoded += 1
            time.sleep(0.02)
            return decode(*args, **options)

        decode = module.decode
        monkeypatch.setattr(module, "decode", counting)

    @pytest.mark.parametrize("packed", [False, True])
    def test_images_are_checked_once_despite_broken_files(self, pets: Path, tmp_path: Path, packed: bool) -> None:
        def open_source() -> FolderSource:
            path = pack(pets, tmp_path / "pets.zip") if packed else pets
            return FolderSource(path, 8, memory=tmp_path / "run" / "checked.json")

        (pets / "dog/bad.png").write_bytes(b"bad")
        (pets / "dog/a.txt").write_text("a caption")
        first = open_source()
        assert self.decoded == 4 and len(first.skipped) == 1
        (pets / "dog/a.txt").write_text("another caption")
        again = open_source()
        assert self.decoded == 4 or packed  # a new archive is checked again
        assert (again.identity, again.skipped) == (first.identity, first.skipped)
        self.decoded = 0
        put(pets / "dog/a.png", (200, 0, 0))
        assert open_source().identity != first.identity and self.decoded == 4

    def test_a_moved_folder_is_not_checked_again(self, pets: Path, tmp_path: Path) -> None:
        FolderSource(pets, 8, memory=tmp_path / "checked.json")
        pets.rename(tmp_path / "moved")
        FolderSource(tmp_path / "moved", 8, memory=tmp_path / "checked.json")
        assert self.decoded == 3

    def test_an_unreadable_file_is_tried_again(self, pets: Path, tmp_path: Path) -> None:
        memory = tmp_path / "checked.json"
        FolderSource(pets, 8, memory=memory)
        record = json.loads(memory.read_text())
        record["found"][0] = "cannot be read (the disk was away)"
        memory.write_text(json.dumps(record))
        assert len(FolderSource(pets, 8, memory=memory)) == 3 and self.decoded == 4

    def test_one_process_checks_and_the_others_wait(self, pets: Path, tmp_path: Path) -> None:
        with ThreadPoolExecutor(4) as pool:
            sources = list(pool.map(lambda _: FolderSource(pets, 8, memory=tmp_path / "checked.json"), range(4)))
        assert self.decoded == 3 and len({source.identity for source in sources}) == 1
