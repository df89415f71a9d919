"""`sfd convert`: recognise a published checkpoint and write it in this project's format.

Every tensor is accounted for; what is left out is listed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from sfd.convert import autoencoder, published_model, semvae
from sfd.convert.checkpoint import Checkpoint, read_checkpoint
from sfd.models.component import assemble
from sfd.models.semvae import SemVAE
from sfd.utils import files
from sfd.utils.errors import SFDError

TRANSFORMER, SEMVAE, LDM = "published transformer", "published SemVAE", "autoencoder in the LDM format"
# A tensor that only one kind of checkpoint has; compared after wrappers' prefixes are taken off.
_SIGNS = {"x_embedder.proj.weight": TRANSFORMER, "encoder.0.weight": SEMVAE, "encoder.conv_in.weight": LDM}


def convert(source: Path, out: Path, weights: str | None, heads: int | None, **model: Any) -> None:
    """Convert `source` into the folder `out`; see `sfd convert --help`. `model`: fields of `Options`."""
    files.check_replaceable(out)
    checkpoint = read_checkpoint(source, weights)
    kind = next((kind for name, kind in _SIGNS.items() if name in checkpoint.tensors), None)
    if kind is None:
        some = ", ".join(sorted(checkpoint.tensors)[:3])
        raise SFDError(f"{source} is not a supported checkpoint: its tensors are {some}, …")
    click.echo(f"{source}: {kind}")
    if checkpoint.state:
        click.echo(f"its weights are those of {checkpoint.state!r}")
    _list(sorted(checkpoint.others), "left out, what else the file holds")
    _list(checkpoint.foreign, "objects of other libraries, not loaded")
    if kind == TRANSFORMER:
        _transformer(source, checkpoint, out, published_model.Options(**model))
    elif kind == SEMVAE:
        _semvae(source, checkpoint, out, heads)
    else:
        _autoencoder(checkpoint, out)
    click.echo(f"{out}: written")


def _transformer(source: Path, checkpoint: Checkpoint, out: Path, options: published_model.Options) -> None:
    model = published_model.from_published(checkpoint, options, source.name)
    model.save(out)
    config, grid = model.transformer.config, model.composite.token_grid
    streams = " + ".join(f"{s.name} {s.channels}" for s in model.composite.streams)
    click.echo(
        f"depth {config.depth}, width {config.width}, {config.heads} heads; {streams} channels on {grid}×{grid} "
        f"tokens; {len(model.classes)} classes; schedule {model.schedule.spec}; "
        f"{'REPA projector kept' if config.repa_channels else 'no REPA projector'}"
    )


def _semvae(source: Path, checkpoint: Checkpoint, out: Path, heads: int | None) -> None:
    config = semvae.inferred_config(checkpoint.shapes, *([heads] if heads else []))
    model = assemble(lambda: SemVAE(config), checkpoint.tensors, str(source))
    with files.atomic_write(out) as partial:
        model.save(partial)
    click.echo(
        f"{config.input_channels} channels to {config.latent_channels}; {config.blocks} blocks, {config.heads} heads"
    )


def _autoencoder(checkpoint: Checkpoint, out: Path) -> None:
    config = autoencoder.inferred_config(checkpoint.shapes)
    network = autoencoder.from_published(checkpoint.tensors, config)
    with files.atomic_write(out) as partial:
        network.save_pretrained(partial)
    left_out = [name for name in sorted(checkpoint.tensors) if name.startswith(autoencoder.TRAINING_ONLY)]
    _list(left_out, "left out, tensors that only training needs")


def _list(names: Sequence[str], what: str) -> None:
    if names:
        click.echo(f"{what} ({len(names)}): {', '.join(names)}")
