"""Latent shards: what is prepared, how much is read ahead, and what is refused."""

import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import sfd.data.shards
from sfd.data.encode import LatentSettings, Preparation, prepare
from sfd.data.images import to_tensor
from sfd.data.shapes import ShapesSource
from sfd.data.shards import FEATURES, LatentSet
from sfd.utils.errors import SFDError
from sfd.utils.shares import Share, parse_share

CPU = torch.device("cpu")
SOURCE = ShapesSource(50, 0, 16)
SETTINGS = LatentSettings(shard_size=20, batch_size=8)
TOKENIZERS = {"texture": "pool", FEATURES: "pool"}


def encode(images):
    return {"texture": F.avg_pool2d(images, 4), FEATURES: F.avg_pool2d(images, 8)}


def make(folder, encode=encode, source=SOURCE, tokenizers=TOKENIZERS, **fields):
    return prepare(source, encode, tokenizers, folder, SETTINGS.model_copy(update=fields), device=CPU)


@pytest.mark.parametrize("flip", [False, True])
def test_both_orientations_read_back(tmp_path, flip):
    make(tmp_path)
    images = to_tensor(SOURCE.load(range(50)))
    expected = encode(images.flip(-1) if flip else images)
    order = np.random.default_rng(0).permutation(50)
    latents = LatentSet(tmp_path)
    assert torch.equal(latents.read("texture", order, np.full(50, flip)), expected["texture"][order])
    assert torch.equal(latents.read(FEATURES, order, np.full(50, flip)), expected[FEATURES][order].half().float())
    assert np.array_equal(latents.labels.numpy(), SOURCE.labels)


@pytest.mark.parametrize("large", [0, 1 << 14])
def test_images_are_gathered_from_shards_and_orientations_in_the_order_asked_for(tmp_path, monkeypatch, large):
    monkeypatch.setattr(sfd.data.shards, "LARGE", large)
    make(tmp_path)
    images = to_tensor(SOURCE.load(range(50)))
    generator = np.random.default_rng(1)
    order, flips = generator.integers(0, 50, 70), generator.random(70) < 0.5
    stored = torch.where(torch.from_numpy(flips)[:, None, None, None], images.flip(-1)[order], images[order])
    latents, expected = LatentSet(tmp_path), encode(stored)
    assert torch.equal(latents.read("texture", order, flips), expected["texture"])
    assert torch.equal(latents.read(FEATURES, order, flips, dtype=None), expected[FEATURES].half())
    with pytest.raises(SFDError, match="no indices"):
        latents.read("texture", order[:0], flips[:0])


def test_statistics_cover_all_shards(tmp_path):
    record = make(tmp_path).streams["texture"]
    values = encode(to_tensor(SOURCE.load(range(50))))["texture"].double().transpose(0, 1).flatten(1)
    assert record.mean == pytest.approx(values.mean(1).tolist())
    assert record.std == pytest.approx(values.std(1).tolist())


def test_the_batch_size_changes_nothing(tmp_path):
    assert make(tmp_path / "a") == make(tmp_path / "b", batch_size=3, workers=1)


def test_features_can_be_left_out(tmp_path):
    assert make(tmp_path, features=False).features is None
    assert set(LatentSet(tmp_path)._shards[0]) == {"labels", "texture", "texture_flip"}


class Counted(ShapesSource):
    """Counts what has been read."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.read, self.lock = 0, threading.Lock()

    def load(self, indices):
        with self.lock:
            self.read += len(indices)
        return super().load(indices)


@pytest.mark.parametrize("workers", [1, 3])
def test_only_a_few_batches_are_read_ahead(tmp_path, workers):
    source, ahead, encoded = Counted(200, 0, 16), [], 0

    def watch(images):
        nonlocal encoded
        encoded += len(images) / 2  # each comes twice, once flipped
        ahead.append(source.read - encoded)
        return encode(images)

    make(tmp_path, watch, source, shard_size=200, batch_size=4, workers=workers)
    assert encoded == source.read == 200
    assert max(ahead) <= (workers + 1) * 4


def contents(folder):
    """Every file, but for locks, and its bytes."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".lock"}


def test_an_interrupted_preparation_goes_on(tmp_path):
    calls = 0

    def stop_later(images):
        nonlocal calls
        calls += 1
        if calls > 8:  # in the second shard
            raise KeyboardInterrupt
        return encode(images)

    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "a", stop_later)
    assert contents(tmp_path / "a").keys() == {"shard-00000.safetensors", "shard-00000.json"}
    make(tmp_path / "a")
    make(tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def parts(folder, source=SOURCE):
    return Preparation(source, TOKENIZERS, folder, SETTINGS)


@settings(max_examples=12)
@given(st.integers(1, 4), st.data())
def test_parts_in_any_order_give_the_same_bytes(tmp_path_factory, count, data):
    folder = tmp_path_factory.mktemp("parts")
    make(folder / "whole")
    for number in data.draw(st.permutations(range(1, count + 1))):
        parts(folder / "parts").make(encode, CPU, Share(number, count))
    parts(folder / "parts").finish()
    assert contents(folder / "parts") == contents(folder / "whole")


def test_finished_shards_are_not_read_again(tmp_path):
    make(tmp_path)
    for path in tmp_path.glob("*.safetensors"):
        path.write_bytes(bytes(path.stat().st_size))
    assert parts(tmp_path).missing() == []


@pytest.mark.parametrize("damage", ["truncated", "no receipt", "missing"])
def test_a_shard_cut_short_is_made_again(tmp_path, damage):
    make(tmp_path)
    before, path = contents(tmp_path), tmp_path / "shard-00001.safetensors"
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        (path if damage == "missing" else path.with_suffix(".json")).unlink()
    assert parts(tmp_path).missing() == [1]
    make(tmp_path)
    assert contents(tmp_path) == before


def test_a_shard_in_another_process_s_hands_is_left_alone(tmp_path):
    holder = "import sys, time; from pathlib import Path; from sfd.utils import files\n"
    holder += "with files.file_lock(Path(sys.argv[1]), ''): print('held', flush=True); time.sleep(60)"
    command = [sys.executable, "-c", holder, str(tmp_path / ".shard-00001.lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        try:
            with pytest.raises(SFDError, match=r"shard-00001\.safetensors is being made by another process"):
                make(tmp_path)
        finally:
            process.kill()
    make(tmp_path)  # a dead process holds nothing


def test_a_set_is_not_finished_before_its_last_shard(tmp_path):
    parts(tmp_path).make(encode, CPU, Share(1, 2))
    with pytest.raises(SFDError, match=r"shard-00001\.safetensors is missing"):
        parts(tmp_path).finish()


@pytest.mark.parametrize("text", ["0/4", "5/4", "1", "a/b", "1/0", "-1/4", ""])
def test_parts_are_counted_from_one(text):
    with pytest.raises(SFDError, match="is no part"):
        parse_share(text)
    assert parse_share("4/4") == Share(4, 4)


def test_latents_of_another_tokenizer_are_not_mixed(tmp_path):
    make(tmp_path)
    with pytest.raises(SFDError, match=r"made with tokenizer\.texture pool, but this run has other"):
        make(tmp_path, tokenizers={**TOKENIZERS, "texture": "other"})


def test_latents_that_are_not_finite_are_refused(tmp_path):
    with pytest.raises(SFDError, match="non-finite values in 'texture'"):
        make(tmp_path, lambda images: {"texture": encode(images)["texture"] / 0}, tokenizers={"texture": "pool"})
