"""What goes to the hub comes back the same, and its card says what is known."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import sfd
from helpers.hub import COMMIT, hub
from helpers.random_model import random_model
from sfd.encoders import autoencoder_kl, convnet
from sfd.evaluation.evaluate import Metrics
from sfd.generation.card import model_card
from sfd.generation.model import Model
from sfd.models import pca, semvae
from sfd.models.component import Component
from sfd.utils.errors import SFDError

__all__ = ["hub"]

ROOT = Path(__file__).parent.parent


def components() -> list[Component]:
    return [
        pca.PCA(pca.PCAConfig(input_channels=4, latent_channels=2)),
        semvae.SemVAE(semvae.SemVAEConfig(input_channels=4, latent_channels=2, width=8, heads=2, blocks=1)),
        convnet.build(convnet.Config(widths=(8,), channels=3)),
        autoencoder_kl.build(autoencoder_kl.Config(patch=2, widths=(8,), latent_channels=2)),
    ]


@pytest.mark.parametrize("component", components(), ids=lambda component: component.name)
def test_a_component_comes_back_from_the_hub(component, hub):
    component.push_to_hub("someone/component")
    found = type(component).from_pretrained("someone/component")
    assert found.identity == component.identity and found.config == component.config
    states = zip(found.state_dict().values(), component.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in states)


def test_a_component_is_not_loaded_as_another(tmp_path):
    components()[0].save_pretrained(tmp_path)
    with pytest.raises(SFDError, match="pca"):
        semvae.SemVAE.from_pretrained(tmp_path)


def test_a_model_comes_back_from_the_hub(hub):
    model = random_model(0)
    model.push_to_hub("someone/model")
    expected = model.sample("ring", seeds=3, steps=4, output="latent")
    for found in (Model.from_pretrained("someone/model", device="cpu"), sfd.load("someone/model", device="cpu")):
        assert found.identity == model.identity
        assert torch.allclose(found.sample("ring", seeds=3, steps=4, output="latent"), expected, atol=1e-5)
    (folder,) = hub.glob(f"models--someone--model/snapshots/{COMMIT}")
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "model.json", "model.safetensors", "texture"]


def test_saving_leaves_other_files_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    random_model(0).save_pretrained(tmp_path)
    random_model(1).save_pretrained(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert Model.from_pretrained(tmp_path, device="cpu").identity == random_model(1).identity


def test_an_absent_name_is_one_sentence(hub):
    with pytest.raises(SFDError, match="someone/else"):
        Model.from_pretrained("someone/else")


@pytest.mark.parametrize("load", [sfd.load, Model.from_pretrained])
def test_a_name_without_an_owner_never_goes_to_the_network(load, monkeypatch):
    monkeypatch.setattr("sfd.utils.hub.snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(SFDError, match="shpaes"):
        load("shpaes")


def test_the_card_loads_the_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "copy").symlink_to(ROOT / "models" / "shapes")
    card = model_card(sfd.load("shapes", device="cpu"), name="copy", licence="mit")
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    found: dict = {}
    exec(code, found)
    assert len(found["images"]) == 2
    assert card.startswith('---\nlicense: "mit"\n') and "heart" in card and "Not measured" in card


def test_the_card_gives_metrics_with_intervals_and_doubts():
    protocol = {
        "reference": "held-out images", "reference_identity": "a", "reference_count": 600, "stored_moments": False,
        "extractor": "classifier", "extractor_identity": "judge-1", "extractor_task": "", "neighbours": 3,
        "extractor_accuracy": None, "extractor_images": None,
    }  # fmt: skip
    row = {
        "name": "guided samples", "n_samples": 400, "intervals": {"recall": (0.4, 0.6)}, "recall": 0.5,
        "caveats": {"recall": ("400 samples, fewer than 1,000",)}, "protocol": protocol, "sampling": {"steps": 25},
    }  # fmt: skip
    assert set(row) <= set(Metrics.model_fields)
    card = model_card(random_model(0), metrics=[row], grid="samples.png")
    assert "| recall | 0.500 | 0.400 to 0.600 | 400 samples, fewer than 1,000 |" in card
    assert "600 images of held-out images, by judge-1" in card and "![samples](samples.png)" in card
