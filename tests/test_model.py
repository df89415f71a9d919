"""Model directories: what is saved comes back, and what was changed since is noticed."""

from __future__ import annotations

import json

import pytest
import torch

from random_model import random_model
from sfd.generation.model import load_model
from sfd.utils import files
from sfd.utils.errors import SFDError

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path):
    random_model(0).save(tmp_path / "model")
    return tmp_path / "model"


def change(folder, **fields):
    path = folder / "model.json"
    path.write_text(json.dumps({**files.read_json(path, "model"), **fields}))


def test_a_saved_model_is_the_same_again(folder):
    model, loaded = random_model(0), load_model(folder, CPU)
    assert (loaded.identity, loaded.classes, loaded.composite) == (model.identity, model.classes, model.composite)
    assert loaded.schedule.spec == model.schedule.spec
    assert all(torch.equal(t, loaded.transformer.state_dict()[n]) for n, t in model.transformer.state_dict().items())


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 1},
        {"seed": 0, "classes": ("disk", "ring", "star", "cross")},
        {"seed": 0, "name": "synchronous"},
        {"seed": 0, "name": "offset", "delta": 0.4},
    ],
    ids=["weights", "architecture", "schedule", "its settings"],
)
def test_identity_tells_models_apart(other):
    assert random_model(**other).identity != random_model(0).identity


def test_defaults_of_the_schedule_may_be_spelt_out():
    spelt = random_model(0, name="offset", delta=0.3, leaders=["semantic"])
    assert spelt.identity == random_model(0).identity


@pytest.mark.parametrize("given", [2, 0, "1", None])
def test_an_unknown_format_is_refused(folder, given):
    change(folder, format=given, field_of_the_future=1)
    with pytest.raises(SFDError, match=f"is of format {given!r}, this program reads format 1"):
        load_model(folder, CPU)


@pytest.mark.parametrize("part", [".", "texture"])
def test_one_changed_bit_of_weights_is_noticed(folder, part):
    path = folder / part / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-4] ^= 1  # the lowest bit of the last float32
    path.write_bytes(data)
    with pytest.raises(SFDError, match=r"model\.safetensors is damaged"):
        load_model(folder, CPU)
