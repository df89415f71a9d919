"""Encoders: one per module, found by name. Texture encoders also decode; semantic ones give features."""

from sfd.encoders._base import (
    SEMANTIC,
    TEXTURE,
    EncoderConfig,
    SemanticEncoder,
    TextureEncoder,
    encoder_module,
    load_encoder,
    open_semantic,
    open_texture,
    planned_encoder,
)

__all__ = ["SEMANTIC", "TEXTURE", "EncoderConfig", "SemanticEncoder", "TextureEncoder"]
__all__ += ["encoder_module", "load_encoder", "open_semantic", "open_texture", "planned_encoder"]
