"""The model that ships with the project."""

from pathlib import Path

import numpy as np
import pytest

import sfd

FOLDER = Path(__file__).parent.parent / "models" / "shapes"
REFERENCE = Path(__file__).parent / "helpers" / "shapes_images.npz"


@pytest.fixture(scope="module")
def model():
    return sfd.load(FOLDER, device="cpu")


def test_it_is_small():
    assert sum(path.stat().st_size for path in FOLDER.rglob("*.safetensors")) <= 4_000_000


@pytest.mark.parametrize(
    ("key", "settings"),
    [
        ("multistep-25-2.0", {"solver": "multistep", "steps": 25, "guidance": 2.0}),
        ("heun-8-2.0", {"solver": "heun", "steps": 8, "guidance": 2.0}),
        ("sde-20-2.0", {"solver": "sde", "steps": 20, "guidance": 2.0}),
        ("dopri5-None-1.0", {"solver": "dopri5"}),
    ],
)
def test_its_images_stay_the_same(model, key, settings):
    """Images of the release that the model came with, within one level per pixel."""
    images = model.sample(["star", "heart"] * 2, seeds=range(4), output="array", **settings)
    assert np.abs(images[:2].astype(int) - np.load(REFERENCE)[key]).max() <= 1


def test_a_bar_is_not_a_ring(model):
    """Samples of two classes differ where the shapes do: a bar covers the middle of the image, a ring does not."""
    differences = {}
    for name in ("bar", "ring"):
        images = model.sample(name, seeds=range(24), output="array", steps=12, guidance=2).astype(float)
        middle = images[:, 14:18, 14:18].mean((1, 2))
        corners = np.concatenate([images[:, :4, :4], images[:, -4:, -4:]], axis=1).mean((1, 2))
        differences[name] = np.abs(middle - corners).sum(1)
    # In most images the middle has the background's colour inside a ring, and another one inside a bar.
    assert np.median(differences["bar"]) > 2 * np.median(differences["ring"])
