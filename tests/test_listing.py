"""Which files of a folder or archive are images, and of what class."""

from __future__ import annotations

import json
import logging
import os
import unicodedata
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from helpers.pictures import pack, put
from sfd.data.classes import find_class, parse_classes
from sfd.data.folder import FolderSource, skipped_report
from sfd.utils.errors import SFDError

Open = Callable[[Path], FolderSource]


def tree(root: Path, *names: str) -> Path:
    """Create images, text files (by suffix) and empty folders (names that end with /)."""
    for number, name in enumerate(names):
        if name.endswith("/"):
            (root / name).mkdir(parents=True)
        elif name.endswith((".txt", ".json", ".jsonl", ".csv", ".xml", ".db", "README", ".xyz")):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text("{}")
        else:
            put(root / name, (number, 2 * number, 3 * number))
    return root


@pytest.fixture(params=["folder", "zip", "zip of the folder"])
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Open:
    """Open a folder, a zip of its content, or a zip of the folder itself."""

    def open_as(folder: Path, **options) -> FolderSource:
        if request.param == "folder":
            return FolderSource(folder, 8, **options)
        prefix = "" if request.param == "zip" else f"{folder.name}/"
        return FolderSource(pack(folder, tmp_path / "packed.zip", prefix), 8, **options)

    return open_as


@pytest.mark.parametrize(
    ("names", "classes", "images"),
    [
        (["cat/a.png", "dog/b.png", "dog/deep/c.png"], ("cat", "dog"), ["cat/a.png", "dog/b.png", "dog/deep/c.png"]),
        (["b.png", "a.jpg"], (), ["a.jpg", "b.png"]),
        (["images/a.png", "images/b.png"], (), ["a.png", "b.png"]),
        (["train/cat/a.png", "train/dog/b.png"], ("cat", "dog"), ["cat/a.png", "dog/b.png"]),
        (["data/train/cat/a.png", "data/train/dog/b.png", "README"], ("cat", "dog"), ["cat/a.png", "dog/b.png"]),
        (["images/a.png", "images/b.png", "annotations/a.xml", "labels.csv"], (), ["a.png", "b.png"]),
        (["cat/a.PNG", "cat/b.JpEg", "dog/c.avif"], ("cat", "dog"), ["cat/a.PNG", "cat/b.JpEg", "dog/c.avif"]),
        (["cat/a", "cat/b", "dog/c"], ("cat", "dog"), ["cat/a", "cat/b", "dog/c"]),
        (["cat/a.jpg?w=2", "cat/b.png", "dog/c.png"], ("cat", "dog"), ["cat/a.jpg?w=2", "cat/b.png", "dog/c.png"]),
        (["train/a.png", "bus/b.png", "car/c.png"], ("bus", "car", "train"), ["bus/b.png", "car/c.png", "train/a.png"]),
        (["a.png", "b.png", "captions/a.txt"], (), ["a.png", "b.png"]),
    ],
)  # fmt: skip
def test_layouts(opened: Open, tmp_path: Path, names: list[str], classes: tuple[str, ...], images: list[str]) -> None:
    source = opened(tree(tmp_path / "data", *names))
    assert (source.classes, source.names) == (classes, images)
    assert [source.classes[label] for label in source.labels if classes] == [n.split("/")[0] for n in images if classes]
    assert source.identity == FolderSource(tmp_path / "data", 8).identity


@pytest.mark.parametrize(
    "left",
    [
        "@eaDir/a.png", "cat/@eaDir/SYNOPHOTO_THUMB_S.png", "lost+found/", "#recycle/x.png", "$RECYCLE.BIN/a.png",
        "System Volume Information/x.db", ".DS_Store/a.png", "__MACOSX/cat/._a.png", "cat/._a.png", "Thumbs.db",
        "cat/desktop.ini.txt", ".ipynb_checkpoints/a.png", ".Trash-1000/a.png",
    ],
)  # fmt: skip
def test_files_of_operating_systems_are_ignored(opened: Open, tmp_path: Path, left: str) -> None:
    source = opened(tree(tmp_path / "data", "cat/a.png", "dog/b.png", left), strict=True)
    assert (source.classes, source.names, source.skipped) == (("cat", "dog"), ["cat/a.png", "dog/b.png"], [])


def test_side_files_are_counted_in_one_warning(opened: Open, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = ["cat/a.png", "cat/a.txt", "dog/b.png", "dog/b.json", "metadata.jsonl", "LICENSE.xyz"]
    with caplog.at_level(logging.WARNING):
        source = opened(tree(tmp_path / "data", *names), strict=True)
    assert source.skipped == [] and len(source) == 2
    assert len(caplog.messages) == 1 and "1 .txt" in caplog.text and "1 .jsonl" in caplog.text


def test_an_empty_class_folder_is_left_out_unless_strict(
    opened: Open, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tree(tmp_path / "data", "ant/a.png", "bird/", "cat/broken.png", "dog/b.png")
    (folder / "cat" / "broken.png").write_bytes(b"no image")
    with caplog.at_level(logging.WARNING):
        source = opened(folder)
    assert (source.classes, source.labels.tolist()) == (("ant", "dog"), [0, 1])
    assert "'bird'" in caplog.text and "'cat'" in caplog.text
    (folder / "cat" / "broken.png").unlink()
    with pytest.raises(SFDError, match="'bird'; 'cat'"):
        opened(folder, strict=True)


@pytest.mark.parametrize(
    "names",
    [
        ["train/cat/a.png", "train/dog/b.png", "val/cat/a.png", "val/dog/b.png"],
        ["Training/cat/a.png", "Validation/cat/a.png", "Dev/cat/b.png"],
        ["training_set/cats/a.png", "test_set/cats/a.png"],
        ["train2017/a.png", "val2017/b.png", "annotations/a.json"],
        ["trainA/a.png", "trainB/a.png", "testA/b.png"],
        ["ILSVRC2012_img_train/cat/a.png", "ILSVRC2012_img_val/cat/b.png"],
        ["train/cat/a.png", "unlabeled/b.png"],
    ],
)
def test_splits_are_not_taken_for_classes(opened: Open, tmp_path: Path, names: list[str]) -> None:
    with pytest.raises(SFDError, match=r"(?i)splits .*which are no classes; (give data.source=|unpack it).*train"):
        opened(tree(tmp_path / "data", *names))


def test_images_next_to_class_folders_are_refused(opened: Open, tmp_path: Path) -> None:
    with pytest.raises(SFDError, match=r"images next to sub-folders \('c.PNG'"):
        opened(tree(tmp_path / "data", "cat/a.png", "dog/b.png", "c.PNG"))


class TestDatasetJson:
    """The layout of EDM, EDM2 and StyleGAN."""

    def make(self, folder: Path, labels: object) -> Path:
        tree(folder, *(f"{i // 2:05d}/img{i:08d}.png" for i in range(6)))
        (folder / "dataset.json").write_text(json.dumps({"labels": labels}))
        return folder

    def pairs(self, labels: list) -> list:
        return [[f"{i // 2:05d}/img{i:08d}.png", label] for i, label in enumerate(labels)]

    @pytest.mark.parametrize(
        ("given", "classes", "labels"),
        [
            ([2, 0, 1, 2, 0, 1], ("0", "1", "2"), [2, 0, 1, 2, 0, 1]),
            ([10, 9, 2, 2, 9, 10], ("2", "9", "10"), [2, 1, 0, 0, 1, 2]),
            (["b", "a", "b", "a", "b", "a"], ("a", "b"), [1, 0, 1, 0, 1, 0]),
            ([5] * 6, (), [0] * 6),
        ],
    )
    def test_labels_are_read(self, opened: Open, tmp_path: Path, given: list, classes: tuple, labels: list) -> None:
        source = opened(self.make(tmp_path / "data", self.pairs(given)))
        assert (source.classes, source.labels.tolist()) == (classes, labels)

    def test_names_may_begin_with_a_point(self, opened: Open, tmp_path: Path) -> None:
        pairs = [[f"./{name}", label] for name, label in self.pairs([0, 1] * 3)]
        assert opened(self.make(tmp_path / "data", pairs)).labels.tolist() == [0, 1] * 3

    @pytest.mark.parametrize("labels", [None, []])
    def test_without_labels_there_are_no_classes(self, opened: Open, tmp_path: Path, labels: object) -> None:
        source = opened(self.make(tmp_path / "data", labels))
        assert (source.classes, len(source)) == ((), 6)

    def test_images_without_label_and_labels_without_image_are_skipped(self, opened: Open, tmp_path: Path) -> None:
        folder = self.make(tmp_path / "data", [*self.pairs([0, 1, 0, 1, 0]), ["00009/gone.png", 1]])
        source = opened(folder)
        assert len(source) == 5
        assert [name.rpartition("/")[2] for name, _ in source.skipped] == ["img00000005.png", "gone.png"]

    @pytest.mark.parametrize("labels", [7, [["a.png", [0.0, 1.0]]]])
    def test_malformed_labels_are_refused(self, opened: Open, tmp_path: Path, labels: object) -> None:
        with pytest.raises(SFDError, match=r'dataset.json: "labels" must be'):
            opened(self.make(tmp_path / "data", labels))


def test_names_that_are_not_utf8_are_kept(tmp_path: Path) -> None:
    folder = tree(tmp_path / "data", "cat/a.png", "dog/b.png")
    put(folder / "cat" / os.fsdecode(b"th\xe9.png"))
    (folder / "cat" / os.fsdecode(b"bad\xe9\n\t.png")).write_bytes(b"no image")
    source = FolderSource(folder, 8, budget=0)
    assert len(source.load(range(3))) == 3
    report = skipped_report(source)
    assert report == "cat/bad\\udce9\\n\\t.png\tno image in a known format\n" and report.encode()


@pytest.mark.parametrize("name", [b"th\xe9", b"a\nb"])
def test_class_names_with_control_characters_or_bad_utf8_are_refused(tmp_path: Path, name: bytes) -> None:
    folder = tree(tmp_path / "data", "cat/a.png")
    put(folder / os.fsdecode(name) / "b.png")
    with pytest.raises(SFDError, match="must be UTF-8 without control characters"):
        FolderSource(folder, 8)


def test_broken_and_cyclic_links_are_skipped(tmp_path: Path) -> None:
    folder = tree(tmp_path / "data", "cat/a.png", "dog/b.png")
    (folder / "cat/loop.png").symlink_to("loop.png")
    (folder / "cat/gone.png").symlink_to("nowhere.png")
    (folder / "cat/round").symlink_to(folder)
    (folder / "self").symlink_to("self")
    (folder / "hound").symlink_to(folder / "dog")
    source = FolderSource(folder, 8)
    assert source.names == ["cat/a.png", "dog/b.png", "hound/b.png"]
    assert sorted(name for name, _ in source.skipped) == ["cat/gone.png", "cat/loop.png", "cat/round", "self"]


def test_backslashes_in_archives_separate_folders(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "w.zip", "w") as archive:
        for name in ("cat\\a.png", "dog\\b.png"):
            archive.writestr(name, put(tmp_path / "x.png").read_bytes())
    assert FolderSource(tmp_path / "w.zip", 8).classes == ("cat", "dog")


IMAGENET = ["goldfish, Carassius auratus", "tench, Tinca tinca", "tench", "café"]


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("1,3", [1, 3]),
        ("tench, Tinca tinca", [1]),
        ("tench", [2]),
        ("tench,goldfish, Carassius auratus, tench, Tinca tinca", [2, 0, 1]),
        ("tench, tench", [2, 2]),
        (unicodedata.normalize("NFD", "café, tench"), [3, 2]),
    ],
)
def test_class_names_may_contain_commas_and_any_unicode_form(text: str, labels: list[int]) -> None:
    assert parse_classes(text, IMAGENET) == labels
    with pytest.raises(SFDError, match="no class 'goldfsh'"):
        parse_classes("tench, goldfsh", IMAGENET)
    assert [find_class(unicodedata.normalize("NFD", IMAGENET[label]), IMAGENET) for label in labels] == labels


def test_folders_that_differ_in_unicode_form_are_one_class(tmp_path: Path) -> None:
    for form in ("NFC", "NFD"):
        put(tmp_path / "data" / unicodedata.normalize(form, "café") / f"{form}.png")
    tree(tmp_path / "data", "dog/b.png")
    source = FolderSource(tmp_path / "data", 8)
    assert (source.classes, len(source)) == (("café", "dog"), 3)


@pytest.mark.parametrize("suffix", [".dng", ".CR2", ".nef"])
def test_raw_files_of_cameras_are_skipped_though_pillow_reads_their_thumbnails(tmp_path: Path, suffix: str) -> None:
    tree(tmp_path, "cat/a.png", "dog/b.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "cat" / "small.tif")
    (tmp_path / "cat" / "small.tif").rename(tmp_path / "cat" / f"photo{suffix}")
    source = FolderSource(tmp_path, 8)
    assert source.names == ["cat/a.png", "dog/b.png"] and "raw file" in dict(source.skipped)[f"cat/photo{suffix}"]


@pytest.mark.parametrize(
    ("name", "content", "advice"),
    [
        ("photos.zip", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("photos.zip", b"<!DOCTYPE html>", "download it again"),
        ("photos.zip", b"PK\x03\x04", "damaged zip archive"),
        ("photos.tar.gz", b"\x1f\x8b", "unpack"),
        ("photo.JPG", b"\xff\xd8\xff", "give the folder that holds it"),
    ],
)
def test_a_file_that_is_no_archive_is_answered_with_what_it_is(
    tmp_path: Path, name: str, content: bytes, advice: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SFDError, match=advice):
        FolderSource(tmp_path / name, 8)
