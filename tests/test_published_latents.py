"""Published latent shards: reading in any order, statistics, damage, and writing; numbers: tests/reference."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.latents import open_published
from sfd.data.published import identity, write_published
from sfd.data.shards import FEATURES
from sfd.utils import files
from sfd.utils.errors import SFDError

GOLDEN = Path(__file__).parent / "golden"
SHARDS = GOLDEN / "latent_shards"
NAMES = ["latents_rank00_shard000.safetensors", "latents_rank00_shard001.safetensors"]


@pytest.fixture(scope="module")
def latents():
    return open_published(SHARDS)


@pytest.fixture(scope="module")
def expected():
    return files.read_tensors(GOLDEN / "latent_shards.expected.safetensors")


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(SHARDS, tmp_path / "shards")


def everything(latents, name, flip):
    return latents.read(name, np.arange(len(latents)), np.full(len(latents), flip))


def change(path, **tensors):
    """Replace tensors of a shard, or take them out (None)."""
    changed = {**files.read_tensors(path), **tensors}
    files.write_tensors(path, {name: t for name, t in changed.items() if t is not None})


@given(st.permutations(range(10)), st.integers(1, 10), st.lists(st.booleans(), min_size=10, max_size=10))
def test_images_are_read_in_any_order(latents, expected, order, count, flips):
    both = torch.stack([expected["features_plain"], expected["features_flip"]])
    read = latents.read(FEATURES, np.array(order[:count]), np.array(flips[:count]))
    assert torch.equal(read, both[torch.tensor(flips[:count]).long(), torch.tensor(order[:count])])


@pytest.mark.parametrize("shape", [(1, -1, 1, 1), (-1,)])
def test_stored_statistics_are_used(folder, latents, shape):
    for name, key in (("texture", "latents"), ("semantic", "latents_sv")):
        record = latents.manifest.streams[name]
        values = {"mean": torch.tensor(record.mean) + 0.125, "std": 1.25 * torch.tensor(record.std)}
        torch.save({k: v.view(shape) for k, v in values.items()}, folder / f"{key}_stats.pt")
    read = open_published(folder).manifest.streams["semantic"]
    before = latents.manifest.streams["semantic"]
    assert read.mean == pytest.approx([m + 0.125 for m in before.mean], abs=1e-6)
    assert read.std == pytest.approx([1.25 * s for s in before.std])


ONES = torch.ones(1, 8, 1, 1)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"mean": ONES[:, :4], "std": ONES[:, :4]}, r"\[1, 4, 1, 1\], but the latents have 8 channels"),
        ({"mean": ONES, "std": 0 * ONES}, "not positive"),
        ({"mean": ONES, "std": 100 * ONES}, "not of these latents"),
        ({"mean": ONES}, "no tensors 'mean' and 'std'"),
        ({"mean": ONES, "std": Path("x")}, "cannot be read as tensors alone"),
    ],
    ids=["length", "zero", "of other data", "missing", "objects"],
)
def test_unusable_statistics_are_refused(folder, values, words):
    torch.save(values, folder / "latents_stats.pt")
    with pytest.raises(SFDError, match=f"latents_stats.pt.*{words}"):
        open_published(folder)


def test_a_truncated_shard_is_named(folder):
    path = folder / NAMES[1]
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(SFDError, match=rf"{NAMES[1]} is damaged"):
        open_published(folder)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"latents_sv_flip": None}, "lacks 'latents_sv_flip'"),
        ({"labels": torch.zeros(4, dtype=torch.int64)}, "as many as there are labels"),
        ({"labels": torch.tensor([0, 1, 2, 3, -4])}, "labels are between -4 and 3"),
        ({"latents_flip": torch.zeros(5, 8, 4, 4)}, "latents_flip differ in type or shape"),
        ({"latents": torch.full((5, 8, 8, 8), torch.nan)}, "not finite"),
    ],
)
def test_a_malformed_shard_is_named(folder, tensors, words):
    change(folder / NAMES[1], **tensors)
    with pytest.raises(SFDError, match=f"{NAMES[1]}.*{words}"):
        open_published(folder)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({k: torch.zeros(5, 4, 4, 4) for k in ("latents_sv", "latents_sv_flip")}, "F32 4×8×8.*F32 4×4×4"),
        (dict.fromkeys(("feats_dino", "feats_dino_flip")), "feats_dino is F16 16×8×8.*absent"),
    ],
)
def test_shards_of_different_shapes_are_named(folder, tensors, words):
    change(folder / NAMES[1], **tensors)
    with pytest.raises(SFDError, match=f"{NAMES[0]} and {NAMES[1]} do not belong together.*{words}"):
        open_published(folder)


def test_a_folder_without_shards_is_refused(tmp_path):
    with pytest.raises(SFDError, match="give the folder of the published"):
        open_published(tmp_path)
    with pytest.raises(SFDError, match="there is no folder"):
        open_published(tmp_path / "none")


def test_identity_depends_on_the_content_alone(folder):
    assert identity(folder) == identity(SHARDS)
    change(folder / NAMES[0], version=torch.tensor(1))  # a tensor without dimensions
    assert identity(folder) != identity(SHARDS)
    change(folder / NAMES[0], version=None)
    sv = files.read_tensors(folder / NAMES[0])["latents_sv"]
    change(folder / NAMES[0], latents_sv=sv + 1)
    assert identity(folder) != identity(SHARDS)


@pytest.mark.parametrize("shard_size", [3, 100])
def test_written_latents_are_read_back(latents, tmp_path, shard_size):
    write_published(latents, tmp_path / "out", shard_size)
    with pytest.raises(SFDError, match="not overwritten"):
        write_published(latents, tmp_path / "out", shard_size)
    again = open_published(tmp_path / "out")
    for name in ("texture", "semantic", FEATURES):
        for flip in (False, True):
            assert torch.equal(everything(again, name, flip), everything(latents, name, flip))
    assert torch.equal(again.labels, latents.labels)
    for name, record in latents.manifest.streams.items():
        assert again.manifest.streams[name].mean == pytest.approx(record.mean, abs=1e-6)
        assert again.manifest.streams[name].std == pytest.approx(record.std, rel=1e-6)
