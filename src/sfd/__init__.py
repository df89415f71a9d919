"""Semantic-first diffusion: a semantic latent is denoised slightly ahead of a texture latent (arXiv 2512.04926).

    model = sfd.load("models/shapes")
    images = model.sample(["star", "heart"], seeds=[0, 1], steps=25, guidance=2)

`__all__` is the stable interface, shown by example in docs/api.md. Each name is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_MODULES = {
    "sfd.schedule": ("SCHEDULES", "PiecewiseLinear", "Schedule", "StreamTimes", "build_schedule"),
    "sfd.flow": ("interpolate", "sample_base_time", "velocity_loss", "velocity_target", "cosine_loss", "repa_loss"),
    "sfd.latents": ("CompositeLatent", "Stream"),
    "sfd.guidance": ("guide",),
    "sfd.solvers": ("SOLVERS", "Solver"),
    "sfd.sampling": ("Progress", "initial_noise", "integrate"),
    "sfd.models.dit": ("LightningDiT",),
    "sfd.models.dit_config": ("DiTConfig",),
    "sfd.data.encode": ("LatentSettings", "LatentWriter"),
    "sfd.data.shards": ("LatentSet",),
    "sfd.training.config": ("TrainSettings",),
    "sfd.training.trainer": ("fit",),
    "sfd.training.tasks.diffusion": ("DiffusionTask", "LossSettings"),
    "sfd.generation.config": ("SamplingConfig",),
    "sfd.generation.model": ("Model", "load"),
    "sfd.evaluation.metrics": ("frechet_distance", "precision_recall"),
    "sfd.utils.errors": ("SFDError",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    """Import a name of the public interface (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module 'sfd' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
