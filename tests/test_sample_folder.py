"""Sampling into a folder over interruptions, processes and batch sizes: what is equal, and what differs."""

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

from random_model import CLASSES, random_model
from sfd.cli import main as cli
from sfd.evaluation.samples import load_samples
from sfd.generation.device_memory import MOST, Sampler, power_of_two
from sfd.generation.folder import image_path, read_images, write_samples
from sfd.generation.generate import SamplingConfig, decode, generate
from sfd.sampling import initial_noise
from sfd.utils import files
from sfd.utils.errors import SFDError
from sfd.utils.shares import WHOLE, Share, choose_share
from test_processes import pair
from tiny import write_recipe

COUNT = 1000
OPTIONS = ["--seeds", f"0-{COUNT - 1}", "--in-turn", "--solver", "euler", "--steps", "3", "--device", "cpu"]
SETTINGS = SamplingConfig(solver="euler", steps=3, batch_size=4)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "model"
    random_model(0).save(folder)
    return folder


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory) -> Path:
    """All images, in one go, 64 at a time."""
    return sampled(model, tmp_path_factory.mktemp("samples") / "whole", "--batch-size", "64")


def sampled(model: Path, out: Path, *options: str) -> Path:
    result = CliRunner().invoke(cli.main, ["sample", str(model), "--out", str(out), *OPTIONS, *options])
    assert result.exit_code == 0, result.output
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.endswith(".lock")}


def few(folder: Path, count: int = 10, share: Share = WHOLE, settings: SamplingConfig = SETTINGS, **changed) -> int:
    given = {"labels": [i % 3 for i in range(count)], "seeds": list(range(count)), "weak": None, **changed}
    return write_samples(folder, random_model(0), settings=settings, share=share, **given)


def test_killed_and_resumed_by_other_processes_the_bytes_are_the_same(model, whole, tmp_path):
    out = tmp_path / "o"
    command = [sys.executable, "-m", "sfd", "sample", str(model), "--out", str(out), *OPTIONS, "--batch-size", "64"]
    launched = [os.environ | {"WORLD_SIZE": "2", "RANK": str(rank)} for rank in range(2)]  # as torchrun does
    processes = [subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) for environment in launched]
    while len(list(out.glob("*.png"))) < 100 and any(process.poll() is None for process in processes):
        time.sleep(0.005)
    for process in processes:
        process.kill()
        process.wait()
    made = len(list(out.glob("*.png")))
    sampled(model, out, "--batch-size", "64", "--part", "3/4")
    after = len(list(out.glob("*.png")))
    assert 100 <= made < after < COUNT
    assert not (out / "grid.png").exists()
    assert contents(sampled(model, out)) == contents(whole)


def test_another_batch_size_over_processes_differs_by_rounding_alone(model, whole, tmp_path):
    for part in ("2/2", "1/2"):
        sampled(model, tmp_path, "--batch-size", "7", "--part", part)
    ours, theirs = (files.read_json(folder / "samples.json", "samples") for folder in (tmp_path, whole))
    assert ours["sampling"].pop("batch_size") == 7 and theirs["sampling"].pop("batch_size") == 64
    assert ours == theirs
    assert contents(tmp_path).keys() == contents(whole).keys()
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
    image_path(tmp_path, 5).unlink()
    assert few(tmp_path) == 0
    assert contents(tmp_path) == before
    assert [path.name for path, then in times.items() if path.stat().st_mtime_ns != then] == ["000005.png"]


def test_a_share_leaves_the_others_batches(tmp_path):
    assert few(tmp_path, share=Share(2, 3)) == 6
    assert {path.name for path in tmp_path.glob("*.png")} == {f"00000{i}.png" for i in (4, 5, 6, 7)}


def test_what_a_killed_process_left_is_removed_by_its_share_alone(tmp_path):
    few(tmp_path, share=Share(1, 3))
    own, other = tmp_path / ".000005.png.0badcafe.partial", tmp_path / ".000001.png.0badcafe.partial"
    own.touch()
    other.touch()
    few(tmp_path, share=Share(2, 3))
    assert (own.exists(), other.exists()) == (False, True)


@pytest.mark.parametrize(
    ("settings", "changed", "message"),
    [
        ({"guidance": 2.0}, {}, "with sampling.guidance = 1.0, but this command has 2.0"),
        ({"batch_size": 5}, {}, "with sampling.batch_size = 4, but this command has 5"),
        ({}, {"seeds": list(range(1, 11))}, "with other seeds"),
        ({}, {"labels": [0] * 10}, "with other labels"),
        ({"guidance": 2.0}, {"weak": random_model(1)}, "with weak = None, but"),
    ],
    ids=["guidance", "batch size", "seeds", "labels", "weak model"],
)
def test_another_command_into_the_same_folder_is_refused_by_name(tmp_path, settings, changed, message):
    few(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(SFDError, match=message):
        few(tmp_path, settings=SETTINGS.model_copy(update=settings), **changed)
    assert contents(tmp_path) == before


def test_without_a_batch_size_the_folders_is_taken(tmp_path):
    few(tmp_path, share=Share(1, 3))
    assert few(tmp_path, settings=SETTINGS.model_copy(update={"batch_size": None})) == 0
    assert files.read_json(tmp_path / "samples.json", "samples")["sampling"]["batch_size"] == 4


def test_a_share_that_is_being_made_is_refused(tmp_path):
    held = files.file_lock(tmp_path / ".part-1-of-2.lock", "")
    with held, pytest.raises(SFDError, match=r"part 1/2 .* is being made by another process"):
        few(tmp_path, share=Share(1, 2))


def test_a_disk_without_room_is_refused_before_anything_is_computed(tmp_path, monkeypatch):
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    with pytest.raises(SFDError, match="ask for fewer images"):
        few(tmp_path)
    assert not (tmp_path / "samples.json").exists()


def test_half_made_samples_are_not_evaluated(tmp_path):
    few(tmp_path, share=Share(1, 2))
    with pytest.raises(SFDError, match="6 of its 10 images"):
        load_samples(tmp_path)


def test_a_batch_that_does_not_fit_is_sampled_in_pieces():
    model, sizes = random_model(0), []

    def memory(module, arguments):
        sizes.append(len(arguments[0]))
        if sizes[-1] > 3:
            raise torch.cuda.OutOfMemoryError

    labels, seeds = [0, 1, 2] * 4, list(range(12))
    expected = np.concatenate([g.images for g in generate(model, labels, seeds, SETTINGS)])
    model.transformer.register_forward_pre_hook(memory)
    sampler = Sampler(model, SETTINGS, None)
    assert abs(sampler(labels, seeds).astype(int) - expected).max() <= 1
    assert (sizes[:3], max(sizes[2:])) == ([12, 6, 3], 3)
    sizes.clear()
    sampler(labels, seeds)
    assert max(sizes) == 3, "what was learnt is not tried again"


def test_one_image_that_does_not_fit_is_an_error():
    model = random_model(0)

    def memory(module, arguments):
        raise torch.cuda.OutOfMemoryError

    model.transformer.register_forward_pre_hook(memory)
    with pytest.raises(SFDError, match="does not hold the sampling of one image"):
        Sampler(model, SETTINGS, None)([0, 1], [0, 1])


def test_many_latents_are_decoded_a_few_at_a_time():
    model, sizes = random_model(0), []
    packed = initial_noise(range(70), model.composite)
    piecewise = np.concatenate([decode(model, packed[i : i + 1]) for i in range(70)])
    whole = model.texture.decode
    model.texture.decode = lambda z: (sizes.append(len(z)), whole(z))[1]
    assert abs(decode(model, packed).astype(int) - piecewise).max() <= 1
    assert sum(sizes) == 70 and max(sizes) <= 32


@pytest.mark.parametrize(("limit", "expected"), [(0.3, 1), (1, 1), (63.9, 32), (64, 64), (1e9, MOST)])
def test_batch_sizes_are_powers_of_two(limit, expected):
    assert power_of_two(limit) == expected


def test_processes_of_a_launcher_take_their_own_parts(monkeypatch):
    assert choose_share(None) == WHOLE
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(SFDError, match="RANK is not set"):
        choose_share(None)
    monkeypatch.setenv("RANK", "2")
    assert choose_share(None) == Share(3, 4)
    with pytest.raises(SFDError, match="leave --part out"):
        choose_share("1/2")


def test_a_run_s_processes_share_its_samples(finished, tmp_path):
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
        assert (folders[0] / ".part-2-of-2.lock").exists() and (folders[0] / "grid.png").exists()


def test_each_process_in_parts_says_itself_what_is_wrong(model, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    arguments = ["sample", str(model), "--out", str(tmp_path), *OPTIONS, "--batch-size", "none"]
    assert "--batch-size 'none' is no number" in CliRunner().invoke(cli.main, arguments).output
