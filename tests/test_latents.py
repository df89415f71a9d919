"""Latent shards: content, statistics, ranks, interruption and damage."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import sfd.data.shards
from helpers.compare import contents
from helpers.encoders import Encoder, pool
from sfd.data.encode import LatentSettings, LatentWriter
from sfd.data.images import to_tensor
from sfd.data.shapes import ShapesSource
from sfd.data.shards import FEATURES, LatentSet
from sfd.utils import files
from sfd.utils.errors import SFDError

SOURCE = ShapesSource(50, 0, 16)
SETTINGS = LatentSettings(shard_size=20, batch_size=8)


POOL, COARSE = pool(4), pool(8)


def writer(folder, source=SOURCE, texture=POOL, semantic=COARSE, compressor=None, **fields):
    return LatentWriter(source, texture, semantic, compressor, folder, SETTINGS.model_copy(update=fields))


def make(folder, *arguments, **options):
    writer(folder, *arguments, **options).write()
    return LatentSet(folder)


def everything(latents, name, flip=False, **options):
    return latents.read(name, np.arange(len(latents)), np.full(len(latents), flip), **options)


@pytest.mark.parametrize("large", [0, 1 << 14])
def test_latents_are_read_in_any_order_and_orientation(tmp_path, monkeypatch, large):
    monkeypatch.setattr(sfd.data.shards, "LARGE", large)
    latents = make(tmp_path)
    images = to_tensor(SOURCE.load(range(50)))
    generator = np.random.default_rng(1)
    order, flips = generator.integers(0, 50, 70), generator.random(70) < 0.5
    stored = torch.where(torch.from_numpy(flips)[:, None, None, None], images.flip(-1)[order], images[order])
    assert torch.equal(latents.read("texture", order, flips), F.avg_pool2d(stored, 4))
    assert torch.equal(latents.read(FEATURES, order, flips, dtype=None), F.avg_pool2d(stored, 8).half())
    assert np.array_equal(latents.labels.numpy(), SOURCE.labels)
    with pytest.raises(SFDError, match="no indices"):
        latents.read("texture", order[:0], flips[:0])


def test_statistics_are_of_all_shards(tmp_path):
    latents = make(tmp_path)
    values = everything(latents, "texture").double().transpose(0, 1).flatten(1)
    assert latents.manifest.streams["texture"].mean == pytest.approx(values.mean(1).tolist())
    assert latents.manifest.streams["texture"].std == pytest.approx(values.std(1).tolist())


def test_latents_do_not_depend_on_the_batch_size(tmp_path):
    assert make(tmp_path / "a").manifest == make(tmp_path / "b", batch_size=3, workers=1).manifest


@pytest.mark.parametrize(
    ("options", "held"),
    [
        ({}, {"texture", FEATURES}),
        ({"features": False}, {"texture"}),
        ({"semantic": None}, {"texture"}),
        ({"compressor": Encoder(lambda features: features[:, :1])}, {"texture", "semantic", FEATURES}),
    ],
)
def test_shards_contain_the_streams_and_features_of_the_run(tmp_path, options, held):
    latents, both = make(tmp_path, **options), {f"{name}{suffix}" for name in held for suffix in ("", "_flip")}
    assert set(files.read_tensors(tmp_path / "shard-00000.safetensors")) == {"labels", *both}
    assert set(latents.manifest.streams) == held - {FEATURES}
    assert (latents.manifest.features is not None) == (FEATURES in held)


def test_an_interrupted_encoding_resumes(tmp_path):
    calls = 0

    def stop_later(images):
        nonlocal calls
        calls += 1
        if calls > 10:  # in the second shard
            raise KeyboardInterrupt
        return F.avg_pool2d(images, 4)

    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "a", texture=Encoder(stop_later))
    assert contents(tmp_path / "a").keys() == {"shard-00000.safetensors"}
    make(tmp_path / "a")
    make(tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.parametrize("damage", ["truncated", "missing", "of another kind"])
def test_only_a_damaged_shard_is_made_again(tmp_path, damage):
    make(tmp_path)
    before, path = contents(tmp_path), tmp_path / "shard-00001.safetensors"
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-1])
    elif damage == "missing":
        path.unlink()
    else:
        files.write_tensors(path, {"a": torch.zeros(1)})
    assert writer(tmp_path).missing() == [1]
    make(tmp_path)
    assert contents(tmp_path) == before


def test_latents_of_another_tokenizer_or_with_nan_are_refused(tmp_path):
    with pytest.raises(SFDError, match="non-finite values in 'texture'"):
        make(tmp_path / "nan", texture=Encoder(lambda images: F.avg_pool2d(images, 4) / 0))
    make(tmp_path)
    with pytest.raises(SFDError, match=r"made with tokenizer\.texture pool, but this run has other"):
        make(tmp_path, texture=Encoder(pool(4).encode, "other"))


@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_opening_damaged_latents_names_the_shard(tmp_path, damage):
    path = make(tmp_path).folder / "shard-00001.safetensors"
    path.unlink() if damage == "missing" else path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(SFDError, match=r"shard-00001\.safetensors is (missing|damaged)"):
        LatentSet(tmp_path)


def test_a_manifest_of_version_0_1_is_read(tmp_path):
    make(tmp_path)
    record = json.loads((tmp_path / "manifest.json").read_text())
    record["shards"][0]["sha256"], record["checksum"] = "0" * 64, "1" * 64
    (tmp_path / "manifest.json").write_text(json.dumps(record))
    assert len(LatentSet(tmp_path)) == 50
