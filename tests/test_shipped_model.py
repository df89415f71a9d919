"""The model that ships with the project."""

from pathlib import Path

import numpy as np
import torch

from sfd.generation.generate import SamplingConfig, generate
from sfd.generation.model import load_model

FOLDER = Path(__file__).parent.parent / "models" / "shapes"


def test_it_is_small():
    assert sum(path.stat().st_size for path in FOLDER.rglob("*.safetensors")) <= 4_000_000


def test_a_bar_is_not_a_ring():
    """Samples of two classes differ where the shapes do: a bar covers the middle of the image, a ring does not."""
    model = load_model(FOLDER, torch.device("cpu"))
    settings = SamplingConfig(steps=12, guidance=2.0)
    seeds = list(range(24))
    differences = {}
    for name in ("bar", "ring"):
        labels = model.class_indices([name]) * len(seeds)
        images = np.concatenate([g.images for g in generate(model, labels, seeds, settings)]).astype(float)
        middle = images[:, 14:18, 14:18].mean((1, 2))
        corners = np.concatenate([images[:, :4, :4], images[:, -4:, -4:]], axis=1).mean((1, 2))
        differences[name] = np.abs(middle - corners).sum(1)
    # In most images the middle has the background's colour inside a ring, and another one inside a bar.
    assert np.median(differences["bar"]) > 2 * np.median(differences["ring"])
