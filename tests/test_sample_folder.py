"""Sampling into a folder over interruptions, ranks and batch sizes: what is equal, and what differs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from helpers.launch import pair
from helpers.random_model import CLASSES, random_model
from sfd.cli import main as cli
from sfd.evaluation.samples import load_samples
from sfd.generation.config import SamplingConfig
from sfd.generation.folder import image_path, read_images, write_samples
from sfd.utils.errors import SFDError
from tiny import write_recipe

COUNT = 1000
OPTIONS = ["--seeds", f"0-{COUNT - 1}", "--in-turn", "--solver", "euler", "--steps", "3", "--device", "cpu"]
CONFIG = SamplingConfig(solver="euler", steps=3, batch_size=4)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "model"
    random_model(0).save(folder)
    return folder


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory) -> Path:
    """All images, in one go, 64 at a time."""
    return sampled(model, tmp_path_factory.mktemp("samples") / "whole")


def sampled(model: Path, out: Path, *options: str) -> Path:
    result = CliRunner().invoke(cli.main, ["sample", str(model), "--out", str(out), *OPTIONS, *options])
    assert result.exit_code == 0, result.output
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def few(folder: Path, count: int = 10, config: SamplingConfig = CONFIG, **changed) -> int:
    given = {"labels": [i % 3 for i in range(count)], "seeds": list(range(count)), "guiding": None, **changed}
    return write_samples(folder, random_model(0), config=config, **given)


def as_rank(monkeypatch: pytest.MonkeyPatch, rank: int, world_size: int) -> None:
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(world_size))


def test_killed_and_resumed_by_other_ranks_the_bytes_are_the_same(model, whole, tmp_path, monkeypatch):
    out = tmp_path / "o"
    command = [sys.executable, "-m", "sfd", "sample", str(model), "--out", str(out), *OPTIONS]
    launched = [os.environ | {"WORLD_SIZE": "2", "RANK": str(rank)} for rank in range(2)]  # as torchrun does
    processes = [subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) for environment in launched]
    while len(list(out.glob("*.png"))) < 100 and any(process.poll() is None for process in processes):
        time.sleep(0.005)
    for process in processes:
        process.kill()
        process.wait()
    made = len(list(out.glob("*.png")))
    with monkeypatch.context() as patched:
        as_rank(patched, 2, 4)
        sampled(model, out)
    after = len(list(out.glob("*.png")))
    assert 100 <= made < after < COUNT
    assert not (out / "grid.png").exists()
    assert contents(sampled(model, out)) == contents(whole)


def test_another_batch_size_differs_by_rounding_alone(model, whole, tmp_path):
    sampled(model, tmp_path, "batch_size=7")
    images, others = (read_images(folder, range(COUNT)).astype(int) for folder in (tmp_path, whole))
    assert abs(images - others).max() <= 1


def test_a_thousand_images_are_balanced_and_no_noise_repeats(whole):
    samples = load_samples(whole)
    assert samples.balanced
    assert samples.labels == tuple(i % len(CLASSES) for i in range(COUNT))
    assert samples.record["seeds"] == list(range(COUNT))


def test_a_lost_image_is_made_again_and_no_other_touched(tmp_path):
    few(tmp_path)
    before, times = contents(tmp_path), {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.png")}
    image_path(tmp_path, 5, 10).unlink()
    (tmp_path / ".000005.png.0badcafe.partial").touch()  # of a killed process
    assert few(tmp_path) == 0
    assert contents(tmp_path) == before
    assert [path.name for path, then in times.items() if path.stat().st_mtime_ns != then] == ["000005.png"]


def test_ranks_make_their_own_batches(tmp_path, monkeypatch):
    as_rank(monkeypatch, 1, 3)
    assert few(tmp_path) == 6
    assert {path.name for path in tmp_path.glob("*.png")} == {f"00000{i}.png" for i in (4, 5, 6, 7)}
    with pytest.raises(SFDError, match="4 of its 10 images"):
        load_samples(tmp_path)


def test_names_sort_by_number_beyond_a_million():
    names = [image_path(Path(), number, 2_000_000).name for number in (0, 999_999, 1_000_000, 1_999_999)]
    assert names == sorted(names)
    assert image_path(Path(), 5, 1000).name == "000005.png"


@pytest.mark.parametrize(
    ("config", "changed", "message"),
    [
        ({"guidance": 2.0}, {}, "guidance = 1.0, but this command has 2.0"),
        ({}, {"seeds": list(range(1, 11))}, "other seeds"),
        ({}, {"labels": [0] * 10}, "other labels"),
        ({"guidance": 2.0, "guidance_from": "guiding_model"}, {"guiding": random_model(1)}, "guiding = None, but"),
    ],
    ids=["guidance", "seeds", "labels", "guiding model"],
)
def test_another_command_into_the_same_folder_is_refused_by_name(tmp_path, config, changed, message):
    few(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(SFDError, match=message):
        few(tmp_path, config=CONFIG.model_copy(update=config), **changed)
    assert contents(tmp_path) == before


def test_a_disk_without_room_is_refused_before_anything_is_computed(tmp_path, monkeypatch):
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    with pytest.raises(SFDError, match="ask for fewer images"):
        few(tmp_path)
    assert not any(tmp_path.iterdir())


def test_a_batch_that_does_not_fit_memory_is_one_sentence(tmp_path, monkeypatch):
    def memory(*_, **__):
        raise torch.OutOfMemoryError

    monkeypatch.setattr("sfd.generation.model.integrate", memory)
    with pytest.raises(SFDError, match="set batch_size"):
        few(tmp_path)


def test_ranks_of_a_run_share_its_samples(finished, tmp_path):
    kept = shutil.ignore_patterns("samples", "metrics", "report.html")
    shutil.copytree(finished.folder.root, tmp_path / "o", ignore=kept)
    recipe = write_recipe(tmp_path)
    both = pair("report", recipe, "sample.batch_size=4", "--out", tmp_path / "o", "--device", "cpu")
    messages = [process.communicate()[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], messages
    for name in ("guided", "unguided"):
        folders = [root / "samples" / name for root in (tmp_path / "o", finished.folder.root)]
        images, others = (read_images(folder, range(20)).astype(int) for folder in folders)
        assert abs(images - others).max() <= 1
        assert (folders[0] / "grid.png").exists()


def test_images_are_read_by_number(tmp_path):
    few(tmp_path)
    assert np.array_equal(read_images(tmp_path, [7, 2]), read_images(tmp_path, range(10))[[7, 2]])


def test_a_models_own_settings_are_the_commands_defaults(tmp_path):
    model = random_model(0)
    model.sampling = SamplingConfig(solver="dopri5", options={"rtol": 1e-2}, guidance=2.0)
    model.save(tmp_path / "model")
    for name, given, changed in [
        ("own", [], {}),
        ("one", ["--guidance", "1.5", "options.atol=1e-3"], {"guidance": 1.5, "options": {"rtol": 1e-2, "atol": 1e-3}}),
        ("another solver", ["--solver", "heun"], {"solver": "heun", "options": {}}),
    ]:
        command = ["sample", tmp_path / "model", "--seeds", "0", "--device", "cpu", "--out", tmp_path / name, *given]
        assert CliRunner().invoke(cli.main, list(map(str, command))).exit_code == 0
        expected = model.sampling.model_copy(update=changed).model_dump(mode="json")
        assert load_samples(tmp_path / name).record["sampling"] == expected
