"""Encoders: one per module, found by name. Texture encoders also decode; semantic ones give features."""

from sfd.encoders._base import (
    SEMANTIC,
    TEXTURE,
    EncoderConfig,
    SemanticEncoder,
    TextureEncoder,
    encoder_module,
    load_encoder,
    load_published,
    open_semantic,
    open_texture,
    planned_encoder,
    save_semantic,
    semantic_identity,
)

__all__ = ["SEMANTIC", "TEXTURE", "EncoderConfig", "SemanticEncoder", "TextureEncoder"]
__all__ += ["encoder_module", "load_encoder", "load_published", "open_semantic", "open_texture"]
__all__ += ["planned_encoder", "save_semantic", "semantic_identity"]
