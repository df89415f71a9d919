"""The public interface: what `import sfd` offers, lazily, and what the methods of a model take."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import sfd
from helpers.random_model import COMPOSITE, random_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    model = random_model(0)
    model.sampling = sfd.SamplingConfig(solver="euler", steps=3, guidance=2.0)
    path = tmp_path_factory.mktemp("api") / "model"
    model.save(path)
    return path


@pytest.fixture(scope="module")
def model(folder):
    return sfd.load(folder, device="cpu")


def test_every_public_name_can_be_imported():
    assert all(getattr(sfd, name) is not None for name in sfd.__all__)
    with pytest.raises(AttributeError):
        _ = sfd.nothing_of_this_name


def test_importing_is_lazy():
    code = "import sys, sfd; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu")])
def test_paths_and_devices_may_be_strings_or_objects(folder, device):
    for path in (folder, str(folder)):
        assert sfd.load(path, device=device).identity == random_model(0).identity


def test_an_unknown_model_is_one_sentence(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("nowhere", "somebody/nothing"):
        with pytest.raises(sfd.SFDError) as refusal:
            sfd.load(name)
        assert name in str(refusal.value) and "\n" not in str(refusal.value)


def test_outputs_are_the_same_images(model):
    given = {"classes": ["disk", "star"], "seeds": [3, 4]}
    array = model.sample(**given, output="array")
    assert array.shape == (2, 4, 4, 3) and array.dtype == np.uint8
    assert np.array_equal(np.stack([np.asarray(image) for image in model.sample(**given)]), array)
    tensor = model.sample(**given, output="tensor")
    assert np.array_equal((tensor * 255).round().byte().permute(0, 2, 3, 1).numpy(), array)
    latents = model.sample(**given, output="latent")
    assert latents.shape == (2, COMPOSITE.size) and np.array_equal(model.decode(latents), array)
    states = model.trajectory(**given)
    assert len(states) == 4 and torch.equal(states[0].x, sfd.initial_noise(given["seeds"], COMPOSITE))
    assert torch.equal(states[-1].x, latents)
    with pytest.raises(sfd.SFDError, match="did you mean 'array'"):
        model.sample(**given, output="aray")


def test_one_class_or_one_seed_is_used_for_all_images(model):
    one_class = model.sample("ring", seeds=[1, 2], output="latent")
    assert torch.equal(one_class, model.sample(["ring", 1], seeds=[1, 2], output="latent"))
    one_seed = model.sample(["disk", "ring"], seeds=1, output="latent")
    torch.testing.assert_close(one_seed[1:], model.sample("ring", seeds=1, output="latent"))
    assert len(model.sample()) == 3, "one image of each class"
    in_turn = model.sample(seeds=range(4), output="latent")
    torch.testing.assert_close(in_turn[3:], model.sample("disk", 3, output="latent"))
    with pytest.raises(sfd.SFDError, match="2 classes were given for 3 seeds"):
        model.sample(["disk", "ring"], seeds=[0, 1, 2])


def test_a_models_own_settings_are_the_defaults(model):
    own = model.sample("star", 0, output="latent")
    assert torch.equal(own, model.sample("star", 0, output="latent", solver="euler", steps=3, guidance=2))
    assert not torch.equal(own, model.sample("star", 0, output="latent", guidance=1))
    with pytest.raises(sfd.SFDError, match="did you mean 'steps'"):
        model.sample(step=4)


def test_the_velocity_is_the_networks(model):
    x, t = sfd.initial_noise([0, 1], COMPOSITE), torch.tensor([0.3, 0.6])
    expected = model.transformer(x, t.expand(2, -1), torch.tensor([2, 2])).velocity
    for times in (t, [0.3, 0.6], {"semantic": 0.6, "texture": 0.3}):
        torch.testing.assert_close(model.velocity(x, times, "star"), expected)
    null = model.transformer(x, t.expand(2, -1), torch.tensor([3, 3])).velocity
    torch.testing.assert_close(model.velocity(x, t), null)
