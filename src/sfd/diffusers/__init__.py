"""Models in the form that the diffusers library loads: transformer, scheduler, texture autoencoder and pipeline.

    pipeline = SFDPipeline.from_pretrained("exported")
    images = pipeline("star", generator=torch.Generator().manual_seed(0)).images

Importing a name imports diffusers, which takes seconds. See docs/diffusers.md.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "SFDTransformer": "transformer",
    "SFDScheduler": "scheduler",
    "SFDAutoencoder": "autoencoder",
    "SFDPipeline": "pipeline",
    "from_model": "conversion",
    "to_model": "conversion",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    """Import a name when it is first used (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module 'sfd.diffusers' has no attribute {name!r}")
    return getattr(importlib.import_module(f"sfd.diffusers.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
