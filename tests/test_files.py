"""Files and folders are written atomically; operating-system errors become sentences."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sfd.run.recipe import load_recipe
from sfd.utils import files
from sfd.utils.errors import SFDError


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_a_file_is_replaced_atomically(tmp_path: Path) -> None:
    files.write_text(tmp_path / "a.txt", "old")
    with pytest.raises(KeyboardInterrupt), files.atomic_write(tmp_path / "a.txt") as partial:
        partial.write_text("half")
        raise KeyboardInterrupt
    assert names(tmp_path) == ["a.txt"] and (tmp_path / "a.txt").read_text() == "old"
    with files.atomic_write(tmp_path / "a.txt") as partial:
        partial.write_text("new")
        assert (tmp_path / "a.txt").read_text() == "old"
    assert names(tmp_path) == ["a.txt"] and (tmp_path / "a.txt").read_text() == "new"


def test_a_file_never_replaces_a_folder(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with pytest.raises(SFDError, match="is a folder"):
        files.write_text(tmp_path / "run", "text")
    assert names(tmp_path) == ["run"]


def write_folder(path: Path, name: str) -> None:
    with files.atomic_write(path) as partial:
        partial.mkdir()
        files.write_text(partial / name, name)


def test_a_folder_replaces_a_folder(tmp_path: Path) -> None:
    write_folder(tmp_path / "a", "old")
    write_folder(tmp_path / "a", "new")
    assert names(tmp_path) == ["a", "a/new"]


@pytest.mark.parametrize("at", range(1, 4))
def test_a_folder_survives_a_kill_while_it_is_replaced(tmp_path: Path, at: int) -> None:
    write_folder(tmp_path / "a", "old")
    # Dies before the at-th rename or removal of a folder.
    code = f"""
import os, pathlib, shutil, sys
from tests.test_files import write_folder
calls = 0
def dying(original):
    def call(*args, **kwargs):
        global calls
        calls += pathlib.Path(args[0]).is_dir()
        if calls == {at}:
            os._exit(9)
        return original(*args, **kwargs)
    return call
pathlib.Path.rename, pathlib.Path.replace = dying(pathlib.Path.rename), dying(pathlib.Path.replace)
shutil.rmtree = dying(shutil.rmtree)
write_folder(pathlib.Path(sys.argv[1]), "new")
"""
    root = Path(__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", code, tmp_path / "a"], cwd=root, check=False).returncode == 9
    assert list(tmp_path.rglob("old")) or (tmp_path / "a" / "new").exists()
    with pytest.raises(KeyboardInterrupt), files.atomic_write(tmp_path / "a"):
        raise KeyboardInterrupt  # a later attempt that fails finds the folder in its place
    assert (tmp_path / "a" / "old").exists() or (tmp_path / "a" / "new").exists()
    write_folder(tmp_path / "a", "newest")
    assert names(tmp_path) == ["a", "a/newest"]


@pytest.mark.parametrize("folder", [False, True])
def test_partial_output_of_a_killed_process_is_removed(tmp_path: Path, folder: bool) -> None:
    partial = files.partial_of(tmp_path / "a")
    if folder:
        partial.mkdir()
    (partial / "half" if folder else partial).touch()
    write_folder(tmp_path / "a", "whole")
    assert names(tmp_path) == ["a", "a/whole"]


@pytest.mark.parametrize(
    ("number", "message"), [(errno.ENOSPC, "no space left"), (errno.EACCES, "cannot be accessed"), (errno.EIO, "error")]
)
def test_operating_system_errors_become_sentences(tmp_path: Path, number: int, message: str) -> None:
    with pytest.raises(SFDError, match=message), files.atomic_write(tmp_path / "a"):
        raise OSError(number, os.strerror(number))


def test_a_full_disk_leaves_no_file(tmp_path: Path) -> None:
    # Every write to /dev/full fails with ENOSPC.
    with pytest.raises(SFDError, match="no space left"), files.atomic_write(tmp_path / "a") as partial:
        partial.touch()
        with Path("/dev/full").open("wb", buffering=0) as full:
            full.write(b"x")
    assert names(tmp_path) == []


def test_the_umask_sets_the_mode_of_files(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        files.write_tensors(tmp_path / "alone", {"a": torch.ones(1)})
        with files.atomic_write(tmp_path / "folder") as partial:
            partial.mkdir()
            files.write_tensors(partial / "inside", {"a": torch.ones(1)})
            (partial / "private").touch(mode=0o600)
    finally:
        os.umask(before)
    assert {p.stat().st_mode & 0o777 for p in tmp_path.rglob("*") if p.is_file()} == {0o640}


def test_tensors_are_read_back_and_damage_is_named(tmp_path: Path) -> None:
    path, tensors = tmp_path / "t.safetensors", {"a": torch.randn(100), "b": torch.arange(4)}
    files.write_tensors(path, tensors)
    back = files.read_tensors(path)
    assert all(torch.equal(back[k], tensors[k]) for k in tensors)
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(SFDError, match=r"t\.safetensors is no intact"):
        files.read_tensors(path)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 2731523448\n"


@pytest.mark.parametrize(
    "read", [files.read_tensors, files.read_pickled, load_recipe, lambda path: files.read_json(path, "model")]
)
@pytest.mark.parametrize(
    ("content", "named"),
    [(POINTER, "git-lfs pointer"), (b"<!DOCTYPE html><html>", "web page"), (b"\n<HTML>", "web page")],
)
def test_a_failed_download_is_recognised(tmp_path: Path, read, content: bytes, named: str) -> None:
    (tmp_path / "weights").write_bytes(content)
    with pytest.raises(SFDError, match=named):
        read(tmp_path / "weights")


def test_a_folder_in_use_is_refused_until_it_is_free(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from sfd.utils import errors, files\n"
    code += "try:\n  files.exclusive(Path(sys.argv[1])).__enter__()\nexcept errors.SFDError as e: print(e)"

    def attempt() -> str:
        return subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True).stdout

    with files.exclusive(tmp_path):
        assert "is in use by another run" in attempt()
    assert attempt() == ""
