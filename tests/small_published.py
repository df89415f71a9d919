"""Small models of the published classes, saved as their libraries save them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sfd.convert.transformer import composite_of
from sfd.models.dit import LightningDiT
from sfd.models.dit_config import DiTConfig
from sfd.models.layers import sincos_pos_embed
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


def published_config(values: dict[str, Any]) -> DiTConfig:
    """Read the published network's arguments."""
    repa, width = values["use_repa"], {"s": 384, "b": 768, "l": 1024, "g": 1536}  # of DINOv2
    return DiTConfig(
        depth=values["depth"],
        width=values["hidden_size"],
        heads=values["num_heads"],
        composite=composite_of(
            values["in_channels"], values["semantic_chans"], values["input_size"], values["patch_size"]
        ),
        num_classes=values["num_classes"],
        clocks=("semantic", "texture") if values["semfirst_delta_t"] > 0 else (),
        repa_block=values["repa_depth"] if repa else None,
        repa_width=values["repa_projector_dim"] if repa else 2048,
        repa_channels=width[values["repa_dino_version"].partition("_vit")[2][0]] if repa else None,
    )


def to_published(state: dict[str, Any], config: DiTConfig) -> dict[str, Any]:
    """Give a transformer's tensors in the published names and layouts, position tables included."""
    import torch

    state = {name: tensor.detach() for name, tensor in state.items()}
    streams, grid = config.composite.streams, config.composite.token_grid
    patch, theirs = streams[0].patch_size, {}
    columns = [
        state.pop(f"embeddings.{k}.weight").unflatten(1, (patch, patch, s.channels)) for k, s in enumerate(streams)
    ]
    theirs["x_embedder.proj.weight"] = torch.cat(columns, dim=3).permute(0, 3, 1, 2).contiguous()
    for kind in ("weight", "bias"):
        rows = [state.pop(f"heads.{k}.{kind}").unflatten(0, (patch, patch, s.channels)) for k, s in enumerate(streams)]
        theirs[f"final_layer.linear.{kind}"] = torch.cat(rows, dim=2).flatten(0, 2)
    clocks = {"semantic": "t_embedder_sem", "texture": "t_embedder_tex"}
    names = {f"time_embedders.{k}": clocks.get(c, "t_embedder") for k, c in enumerate(config.clocks or ("",))}
    names |= {
        "class_embedding": "y_embedder.embedding_table",
        "embedding_bias": "x_embedder.proj.bias",
        "final_norm": "final_layer.norm_final",
        "final_modulation": "final_layer.adaLN_modulation.1",
        "projector": "repa_projector",
        ".attention_norm": ".norm1",
        ".mlp_norm": ".norm2",
        ".attention.qkv": ".attn.qkv",
        ".attention.out": ".attn.proj",
        ".modulation": ".adaLN_modulation.1",
    }
    for name, tensor in state.items():
        if name.endswith("qk_weight"):
            for letter, weight in zip("qk", tensor[:, 0], strict=True):
                theirs[name.replace("attention.qk_weight", f"attn.{letter}_norm.weight")] = weight.clone()
            continue
        for ours, published in names.items():
            name = name.replace(ours, published)
        theirs[name] = tensor
    half = config.width // config.heads // 2
    frequency = 1 / 10000 ** (torch.arange(0, half, 2).float() / half)
    axis = (torch.arange(grid)[:, None] * frequency).repeat_interleave(2, dim=1)  # both channels of a pair
    angle = torch.cat([axis[:, None].expand(grid, grid, -1), axis.expand(grid, grid, -1)], dim=2).flatten(0, 1)
    theirs["pos_embed"] = sincos_pos_embed(config.width, grid)[None]
    return theirs | {"feat_rope.freqs_cos": angle.cos(), "feat_rope.freqs_sin": angle.sin()}
