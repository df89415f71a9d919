"""Small models of the published classes, saved as their libraries save them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sfd.convert.transformer import published_config
from sfd.models.dit import LightningDiT
from sfd.utils import rng

KL: dict[str, Any] = {
    "latent_channels": 3,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
    "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
    "norm_num_groups": 4,
}


def save_kl(folder: Path, **changes: Any):
    """Save an `AutoencoderKL` that shrinks images by 2, and give it."""
    from diffusers import AutoencoderKL

    with rng.seeded(0, "kl"):
        model = AutoencoderKL(**{**KL, **changes}).eval()
    model.save_pretrained(folder)
    return model


SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 7, "image_size": 21}
VITS: dict[str, tuple[str, dict[str, Any]]] = {
    "dinov2_with_registers": ("Dinov2WithRegisters", {"num_register_tokens": 3}),
    "dinov2": ("Dinov2", {"use_swiglu_ffn": True}),
}


def save_vit(folder: Path, model_type: str, **changes: Any):
    """Save a vision transformer, and give it; every weight is random, so that each of them matters."""
    import torch
    import transformers

    name, settings = VITS[model_type]
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **settings, **changes})
    network = getattr(transformers, f"{name}Model")(config).eval()
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.3)
    network.save_pretrained(folder)
    return network


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """No model in the hub's cache, and no network."""
    for module in ("constants", "file_download"):
        monkeypatch.setattr(f"huggingface_hub.{module}.HF_HUB_CACHE", str(tmp_path / "cache"), raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


# In the published transformer's format.
TRANSFORMER: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 32,
    "num_heads": 2,
    "input_size": 4,
    "patch_size": 1,
    "in_channels": 7,
    "num_classes": 5,
    "class_dropout_prob": 0.1,
    "use_qknorm": True,
    "use_swiglu": True,
    "use_rope": True,
    "use_rmsnorm": True,
    "wo_shift": False,
    "use_repa": True,
    "repa_dino_version": "dinov2_vits14_reg",
    "repa_depth": 1,
    "repa_projector_dim": 16,
    "semantic_chans": 3,
    "semfirst_delta_t": 0.3,
}


def random_transformer(config: dict[str, Any], seed: int) -> LightningDiT:
    """Build a network with random weights everywhere, also where a new one has zeros."""
    import torch

    network = LightningDiT(published_config(config)).eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    return network
