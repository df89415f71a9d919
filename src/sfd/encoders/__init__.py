"""Encoders: each module is one, found by its name. Texture encoders decode, semantic ones say what is where."""

from sfd.encoders._base import (
    SEMANTIC,
    TEXTURE,
    EncoderConfig,
    SemanticEncoder,
    TextureEncoder,
    encoder_module,
    load_encoder,
    load_semantic_encoder,
    load_texture_encoder,
    open_semantic,
    open_texture,
    planned_encoder,
)

__all__ = [
    "SEMANTIC",
    "TEXTURE",
    "EncoderConfig",
    "SemanticEncoder",
    "TextureEncoder",
    "encoder_module",
    "load_encoder",
    "load_semantic_encoder",
    "load_texture_encoder",
    "open_semantic",
    "open_texture",
    "planned_encoder",
]
