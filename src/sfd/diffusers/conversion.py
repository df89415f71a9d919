"""A model as a pipeline and back. Both share their weights."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch

from sfd.diffusers.autoencoder import SFDAutoencoder
from sfd.diffusers.pipeline import SFDPipeline
from sfd.diffusers.scheduler import EVALUATIONS, SFDScheduler
from sfd.diffusers.transformer import SFDTransformer
from sfd.encoders import TextureEncoder, kl
from sfd.generation.config import SamplingConfig
from sfd.generation.model import Model
from sfd.latents import TEXTURE
from sfd.models.component import Component
from sfd.utils.config import parse


def from_model(model: Model) -> SFDPipeline:
    """Make a pipeline; a solver that the scheduler lacks is replaced by its default, the multistep method."""
    with torch.device("meta"):
        transformer = SFDTransformer(architecture=model.transformer.config.model_dump(mode="json"))
    transformer.dit = model.transformer
    sampling, composite = model.sampling, model.composite
    # diffusers takes what is not given by name for a default, and forgets it.
    scheduler = SFDScheduler(
        streams=list(composite.names),
        sizes=list(composite.sizes),
        schedule=model.schedule.spec,
        solver=sampling.solver if sampling.solver in EVALUATIONS else "multistep",
        solver_order=sampling.options.get("order", 3),
        shift=sampling.shift,
        flow_map=list(model.transformer.config.flow_map),
    )
    return SFDPipeline(
        transformer.eval(),
        scheduler,
        _autoencoder(cast(Component, model.texture)),
        id2label={str(number): name for number, name in enumerate(model.classes)},
        sampling=sampling.model_dump(mode="json"),
        history=model.history,
        identity=model.identity,
    )


def to_model(pipeline: SFDPipeline) -> Model:
    """Make a model of a pipeline's weights, as float32."""
    dit = _in_float32(pipeline.transformer).dit
    return Model(
        dit.eval().requires_grad_(False),
        pipeline.scheduler.schedule,
        _texture(pipeline, dit.config.composite[TEXTURE].tokenizer),
        pipeline.classes,
        dict(pipeline.config["history"]),
        pipeline.config["identity"],
        parse(SamplingConfig, pipeline.config["sampling"], "model_index.json"),
    )


def _autoencoder(texture: Component) -> torch.nn.Module:
    if texture.name == "kl":
        return cast(torch.nn.Module, texture.net)
    with torch.device("meta"):
        autoencoder = SFDAutoencoder(encoder=texture.name, settings=texture.config.model_dump(mode="json"))
    autoencoder.net = texture
    return autoencoder.eval()


def _texture(pipeline: SFDPipeline, identity: str) -> TextureEncoder:
    vae = _in_float32(pipeline.vae)
    if isinstance(vae, SFDAutoencoder):
        texture = vae.net
    else:
        fields = {name: vae.config[name] for name in kl.Config.model_fields}
        texture = kl.PublishedAutoencoder(parse(kl.Config, fields, "vae"), vae)
    texture.saved_identity = identity
    return cast(TextureEncoder, texture.eval().requires_grad_(False))


def _in_float32(network: Any) -> Any:
    return network if network.dtype == torch.float32 else copy.deepcopy(network).float()
