import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sfd.utils import files
from sfd.utils.errors import SFDError


def test_written_leaves_nothing_when_the_block_fails(tmp_path):
    with pytest.raises(KeyboardInterrupt), files.written(tmp_path / "a.txt") as partial:
        partial.write_text("half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_written_replaces_a_file_only_at_the_end(tmp_path):
    files.write_text(tmp_path / "a.txt", "old")
    with files.written(tmp_path / "a.txt") as partial:
        partial.write_text("new")
        assert (tmp_path / "a.txt").read_text() == "old"
    assert (tmp_path / "a.txt").read_text() == "new"


def test_a_file_never_replaces_a_folder(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious").touch()
    with pytest.raises(SFDError, match="is a folder"):
        files.write_text(tmp_path / "run", "text")
    assert (tmp_path / "run" / "precious").exists() and len(list(tmp_path.iterdir())) == 1


def test_written_replaces_a_folder(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "old").touch()
    with files.written(tmp_path / "a") as partial:
        partial.mkdir()
        (partial / "new").touch()
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["new"]


@pytest.mark.parametrize(
    ("number", "message"), [(errno.ENOSPC, "no space left"), (errno.EACCES, "cannot be accessed"), (errno.EIO, "error")]
)
def test_the_system_s_errors_become_sentences(tmp_path, number, message):
    with pytest.raises(SFDError, match=message), files.written(tmp_path / "a"):
        raise OSError(number, os.strerror(number))


def test_a_full_disk_leaves_no_file(tmp_path):
    # /dev/full stands for a disk with no space: every write to it fails with ENOSPC.
    with pytest.raises(SFDError, match="no space left"), files.written(tmp_path / "a") as partial:
        partial.touch()
        with Path("/dev/full").open("wb", buffering=0) as full:
            full.write(b"x")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_explained_for_any_path():
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert "holds .;" in str(files.explained(full, Path()))
    assert "holds /a/b;" in str(files.explained(full, Path("/a/b/.c.partial/d.safetensors")))


@pytest.mark.parametrize("folder", [False, True])
def test_what_a_killed_process_left_is_removed(tmp_path, folder):
    with files.written(tmp_path / "a") as partial:
        partial.touch()
    (tmp_path / "a").unlink()
    if folder:
        partial.mkdir()
        (partial / "half").touch()
    else:
        partial.write_text("half")
    with files.written(tmp_path / "a") as partial:
        assert not partial.exists()
        partial.mkdir()
        (partial / "whole").touch()
    assert [p.relative_to(tmp_path).as_posix() for p in sorted(tmp_path.rglob("*"))] == ["a", "a/whole"]


def test_written_files_have_the_usual_mode(tmp_path):
    (tmp_path / "usual").touch()
    (tmp_path / "usual folder").mkdir()
    files.write_tensors(tmp_path / "alone", {"a": torch.ones(1)})
    with files.written(tmp_path / "folder") as partial:
        partial.mkdir()
        files.write_tensors(partial / "inside", {"a": torch.ones(1)})
        (partial / "private").touch(mode=0o600)
    modes = {name: (tmp_path / name).stat().st_mode for name in ("alone", "folder/inside", "folder/private")}
    assert set(modes.values()) == {(tmp_path / "usual").stat().st_mode}
    assert (tmp_path / "folder").stat().st_mode == (tmp_path / "usual folder").stat().st_mode


def test_tensors_come_back(tmp_path):
    tensors = {"a": torch.randn(3), "b": torch.arange(4)}
    files.write_tensors(tmp_path / "t.safetensors", tensors)
    back = files.read_tensors(tmp_path / "t.safetensors")
    assert all(torch.equal(back[k], tensors[k]) for k in tensors)


def test_truncated_tensors_are_named(tmp_path):
    files.write_tensors(tmp_path / "t.safetensors", {"a": torch.randn(100)})
    whole = (tmp_path / "t.safetensors").read_bytes()
    (tmp_path / "t.safetensors").write_bytes(whole[:-7])
    with pytest.raises(SFDError, match=r"t\.safetensors is no intact"):
        files.read_tensors(tmp_path / "t.safetensors")


def test_damaged_json_is_named(tmp_path):
    (tmp_path / "model.json").write_text("{")
    with pytest.raises(SFDError, match=r"model\.json is damaged"):
        files.read_json(tmp_path / "model.json", "model directory")


def test_a_folder_in_use_is_refused(tmp_path):
    code = "import sys; from pathlib import Path; from sfd import files, errors\n"
    code += "try:\n  files.exclusive(Path(sys.argv[1])).__enter__()\nexcept errors.SFDError as e: print(e)"
    with files.exclusive(tmp_path):
        seen = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert "is in use by another run" in seen.stdout


def test_a_folder_is_free_again_afterwards(tmp_path):
    with files.exclusive(tmp_path):
        pass
    with files.exclusive(tmp_path):
        pass
