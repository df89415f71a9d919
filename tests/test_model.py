"""Model directories: saving, loading, identity and damage."""

from __future__ import annotations

import json

import pytest
import torch

from helpers.random_model import random_model
from sfd.generation.config import SamplingConfig
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


def test_a_model_is_saved_and_loaded(tmp_path):
    model = random_model(0)
    model.sampling = SamplingConfig(steps=7, guidance={"semantic": 2.0})
    model.save(tmp_path / "model")
    loaded = load_model(tmp_path / "model", CPU)
    for name in ("identity", "classes", "composite", "sampling"):
        assert getattr(loaded, name) == getattr(model, name)
    assert loaded.schedule.spec == model.schedule.spec
    assert all(torch.equal(t, loaded.transformer.state_dict()[n]) for n, t in model.transformer.state_dict().items())


def test_a_copy_at_half_precision_keeps_the_identity(folder, tmp_path):
    load_model(folder, CPU).save(tmp_path / "half", torch.float16)
    assert load_model(tmp_path / "half", CPU).identity == random_model(0).identity


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
def test_identity_differs_between_models(other):
    assert random_model(**other).identity != random_model(0).identity


def test_explicit_defaults_of_the_schedule_keep_the_identity():
    spelt = random_model(0, name="offset", delta=0.3, leaders=["semantic"])
    assert spelt.identity == random_model(0).identity


@pytest.mark.parametrize("given", [2, "1", None])
def test_an_unknown_format_is_refused(folder, given):
    change(folder, format=given, field_of_the_future=1)
    with pytest.raises(SFDError, match="reads format 1"):
        load_model(folder, CPU)


@pytest.mark.parametrize("part", [".", "texture"])
def test_a_changed_bit_of_the_weights_is_detected(folder, part):
    path = folder / part / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-4] ^= 1  # the lowest bit of the last float32
    path.write_bytes(data)
    with pytest.raises(SFDError, match="damaged"):
        load_model(folder, CPU)
