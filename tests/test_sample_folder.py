"""Sampling into a folder: interruptions, ranks and batch sizes, and other settings in the same folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from helpers.cli import done
from helpers.compare import contents
from helpers.random_model import CLASSES, random_model
from sfd.evaluation.samples import load_samples
from sfd.generation.config import SamplingConfig
from sfd.generation.folder import image_path, read_images, write_samples
from sfd.utils.errors import SFDError

COUNT = 400
OPTIONS = ["--seeds", f"0-{COUNT - 1}", "--in-turn", "--solver", "euler", "--steps", "3", "--device", "cpu"]
CONFIG = SamplingConfig(solver="euler", steps=3, batch_size=4)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "model"
    random_model(0).save(folder)
    return folder


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory) -> Path:
    """All images of one uninterrupted command, 64 per batch."""
    return sampled(model, tmp_path_factory.mktemp("samples") / "whole")


def sampled(model: Path, out: Path, *options: str) -> Path:
    done("sample", model, "--out", out, *OPTIONS, *options)
    return out


def few(folder: Path, count: int = 10, config: SamplingConfig = CONFIG, **changed) -> int:
    given = {"labels": [i % 3 for i in range(count)], "seeds": list(range(count)), "guiding": None, **changed}
    return write_samples(folder, random_model(0), config=config, **given)


def as_rank(monkeypatch: pytest.MonkeyPatch, rank: int, world_size: int) -> None:
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(world_size))


def test_resuming_with_other_ranks_gives_the_same_bytes(model, whole, tmp_path, monkeypatch):
    for rank, world_size in ((1, 2), (2, 4)):
        with monkeypatch.context() as patched:
            as_rank(patched, rank, world_size)
            sampled(model, tmp_path)
    assert 200 < len(list(tmp_path.glob("*.png"))) < COUNT and not (tmp_path / "grid.png").exists()
    assert contents(sampled(model, tmp_path)) == contents(whole)
    samples = load_samples(whole)
    assert samples.balanced and samples.labels == tuple(i % len(CLASSES) for i in range(COUNT))
    assert samples.record["seeds"] == list(range(COUNT))


def test_another_batch_size_changes_rounding_alone(model, whole, tmp_path):
    sampled(model, tmp_path, "batch_size=7")
    images, others = (read_images(folder, range(COUNT)).astype(int) for folder in (tmp_path, whole))
    assert abs(images - others).max() <= 1


def test_only_a_missing_image_is_made_again(tmp_path):
    few(tmp_path)
    before, times = contents(tmp_path), {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.png")}
    image_path(tmp_path, 5, 10).unlink()
    (tmp_path / ".000005.png.0badcafe.partial").touch()  # of a killed process
    assert few(tmp_path) == 0
    assert contents(tmp_path) == before
    assert [path.name for path, then in times.items() if path.stat().st_mtime_ns != then] == ["000005.png"]


def test_each_rank_samples_its_own_batches(tmp_path, monkeypatch):
    as_rank(monkeypatch, 1, 3)
    assert few(tmp_path) == 6
    assert {path.name for path in tmp_path.glob("*.png")} == {f"00000{i}.png" for i in (4, 5, 6, 7)}
    with pytest.raises(SFDError, match="4 of its 10 images"):
        load_samples(tmp_path)


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
def test_other_settings_in_the_same_folder_are_refused_by_name(tmp_path, config, changed, message):
    few(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(SFDError, match=message):
        few(tmp_path, config=CONFIG.model_copy(update=config), **changed)
    assert contents(tmp_path) == before


def test_a_full_disk_is_refused_before_sampling(tmp_path, monkeypatch):
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    with pytest.raises(SFDError, match="ask for fewer images"):
        few(tmp_path)
    assert not any(tmp_path.iterdir())


def test_an_out_of_memory_error_suggests_a_smaller_batch(tmp_path, monkeypatch):
    def memory(*_, **__):
        raise torch.OutOfMemoryError

    monkeypatch.setattr("sfd.generation.model.integrate", memory)
    with pytest.raises(SFDError, match="set batch_size"):
        few(tmp_path)


def test_the_models_settings_are_the_defaults_of_the_command(tmp_path):
    model = random_model(0)
    model.sampling = SamplingConfig(solver="dopri5", options={"rtol": 1e-2}, guidance=2.0)
    model.save(tmp_path / "model")
    for name, given, changed in [
        ("own", [], {}),
        ("one", ["--guidance", "1.5", "options.atol=1e-3"], {"guidance": 1.5, "options": {"rtol": 1e-2, "atol": 1e-3}}),
        ("another solver", ["--solver", "heun"], {"solver": "heun", "options": {}}),
    ]:
        command = ["sample", tmp_path / "model", "--seeds", "0", "--device", "cpu", "--out", tmp_path / name, *given]
        done(*command)
        expected = model.sampling.model_copy(update=changed).model_dump(mode="json")
        assert load_samples(tmp_path / name).record["sampling"] == expected


def test_a_damaged_image_is_named_with_what_makes_it_again(tmp_path):
    few(tmp_path)
    before = contents(tmp_path)
    image_path(tmp_path, 5, 10).write_bytes(b"version https://git-lfs.github.com/spec/v1")
    with pytest.raises(SFDError, match=r"000005\.png: .*remove it"):
        read_images(tmp_path, range(10))
    image_path(tmp_path, 5, 10).unlink()
    assert few(tmp_path) == 0 and contents(tmp_path) == before


@pytest.mark.parametrize("name", ["cat/photo.jpg", "photo.JPG", "grid.png"])
def test_samples_are_not_put_among_other_images(name, tmp_path):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    with pytest.raises(SFDError, match="holds images or folders"):
        few(tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / name]
