"""What `sfd convert` does: finds out what it is given, and writes the same weights in the other format.

Three pairs: a published transformer and a model directory, a published SemVAE and a compressor's folder, an autoencoder
in the LDM format and one in diffusers'. Every tensor is accounted for; what is left out is listed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, cast

import click
import torch

from sfd.convert import autoencoder, model_directory, semvae
from sfd.convert.checkpoint_files import Checkpoint, read_checkpoint, write_checkpoint
from sfd.generation.model import RECORD, load_model, model_folder
from sfd.models import component
from sfd.utils import files
from sfd.utils.errors import SFDError

if TYPE_CHECKING:
    from sfd.encoders.kl import PublishedAutoencoder
    from sfd.models.semvae import SemVAE

MODEL, TRANSFORMER = "model directory", "published transformer"
COMPRESSOR, SEMVAE = "compressor's folder", "published SemVAE"
DIFFUSERS, LDM = "autoencoder in diffusers' format", "autoencoder in the LDM format"
# A tensor that only one kind of checkpoint has; compared after wrappers' prefixes are taken off.
_SIGNS = {"x_embedder.proj.weight": TRANSFORMER, "encoder.0.weight": SEMVAE, "encoder.conv_in.weight": LDM}


@dataclass(frozen=True)
class Options:
    """What the command line says beside SOURCE and OUT; None where it says nothing."""

    state: str | None
    heads: int | None
    model: model_directory.Options


def convert(source: Path, out: Path, options: Options) -> None:
    """Convert `source` into `out`; see `sfd convert --help`.

    Raises:
        SFDError: the source is damaged, of no kind that is known, or does not fit the options; `out` is something else.
    """
    kind = recognised(source, options.state)
    target, work = _CONVERSIONS[kind]
    _check_options(kind, options)
    _check_place(out, target)
    click.echo(f"{source}: {kind}")
    work(source, out, options)
    click.echo(f"{out}: {target}, written")


def _check_options(kind: str, options: Options) -> None:
    """Refuse options that would do nothing."""
    given = {field.name: getattr(options.model, field.name) for field in fields(options.model)}
    unused = [name for name, value in given.items() if value not in (None, ())] if kind != TRANSFORMER else []
    unused += ["heads"] if options.heads and kind != SEMVAE else []
    unused += ["weights"] if options.state and kind not in (TRANSFORMER, SEMVAE, LDM) else []
    if unused:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in unused)
        raise SFDError(f"{names} does nothing for this kind of source ({kind}); leave it out")


def _check_place(out: Path, target: str) -> None:
    """Let what is written replace only its like, or an empty folder."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    try:
        found = recognised(out)
    except SFDError:
        found = "something else"
    if found != target:
        raise SFDError(
            f"{out} exists and holds another kind ({found}) than would replace it ({target}); choose another"
        )


def recognised(path: Path, state: str | None = None) -> str:
    """Say of what kind a file or folder is.

    Raises:
        SFDError: it is missing, damaged, or of no kind that can be converted.
    """
    if path.is_dir():
        return _recognised_folder(path)
    checkpoint = read_checkpoint(path, state)
    for name, kind in _SIGNS.items():
        if name in checkpoint.tensors:
            return kind
    some = ", ".join(sorted(checkpoint.tensors)[:3])
    raise SFDError(f"{path} is no checkpoint that is known here: its tensors are {some}, …")


def _recognised_folder(path: Path) -> str:
    if (model_folder(path) / RECORD).exists():
        return MODEL
    about = files.read_json(path / component.CONFIG_FILE, "model directory, part or autoencoder")
    found = about.get("_class_name") or about.get("name")
    kind = {"AutoencoderKL": DIFFUSERS, "kl": DIFFUSERS, "semvae": COMPRESSOR}.get(str(found))
    if kind is None:
        raise SFDError(
            f"{path} holds {found!r}, which has no published format; give a model, a SemVAE or an autoencoder"
        )
    return kind


def _model_to_published(source: Path, out: Path, options: Options) -> None:
    model = load_model(model_folder(source), torch.device("cpu"))
    write_checkpoint(out, model_directory.to_published(model), "ema")
    click.echo(
        "left out, as the published format has no place for them: classes, schedule, statistics, texture encoder"
    )


def _published_to_model(source: Path, out: Path, options: Options) -> None:
    checkpoint = read_checkpoint(source, options.state)
    _say_what_else(checkpoint)
    model = model_directory.from_published(checkpoint, options.model, source.name)
    model.save(out)
    config = model.transformer.config
    streams = " + ".join(f"{s.name} {s.channels}" for s in model.composite.streams)
    click.echo(
        f"depth {config.depth}, width {config.width}, {config.heads} heads; {streams} channels on "
        f"{config.composite.token_grid}×{config.composite.token_grid} tokens; {len(model.classes)} classes; "
        f"schedule {model.schedule.spec}; {'REPA projector kept' if config.repa_channels else 'no REPA projector'}"
    )


def _semvae_to_part(source: Path, out: Path, options: Options) -> None:
    checkpoint = read_checkpoint(source, options.state)
    _say_what_else(checkpoint)
    config = semvae.inferred_config(checkpoint.shapes, *([options.heads] if options.heads else []))
    model = semvae.from_published(checkpoint.tensors, config)
    with files.atomic_write(out) as partial:
        model.save(partial)
    click.echo(
        f"{config.input_channels} channels to {config.latent_channels}; {config.blocks} blocks, {config.heads} heads"
    )


def _part_to_semvae(source: Path, out: Path, options: Options) -> None:
    from sfd.models.compressor import load_compressor

    write_checkpoint(out, semvae.to_published(cast("SemVAE", load_compressor(source))), "model_state_dict")


def _ldm_to_diffusers(source: Path, out: Path, options: Options) -> None:
    checkpoint = read_checkpoint(source, options.state)
    _say_what_else(checkpoint)
    kept, left_out = autoencoder.split_training_only(checkpoint.tensors)
    config = autoencoder.inferred_config({name: tuple(t.shape) for name, t in kept.items()})
    network = autoencoder.from_published(kept, config)
    with files.atomic_write(out) as partial:
        network.save_pretrained(partial)
    _list(left_out, "tensors that only training needs")


def _diffusers_to_ldm(source: Path, out: Path, options: Options) -> None:
    from sfd.encoders import open_texture

    network = cast("PublishedAutoencoder", open_texture(str(source))).net
    write_checkpoint(out, autoencoder.to_published(network), "state_dict")


def _say_what_else(checkpoint: Checkpoint) -> None:
    if checkpoint.state:
        click.echo(f"its weights are those of {checkpoint.state!r}")
    _list(sorted(checkpoint.others), "what else the file holds")


def _list(names: Sequence[str], what: str) -> None:
    if names:
        click.echo(f"left out, {what} ({len(names)}): {', '.join(names)}")


_Work = Callable[[Path, Path, Options], None]
_CONVERSIONS: dict[str, tuple[str, _Work]] = {
    TRANSFORMER: (MODEL, _published_to_model),
    MODEL: (TRANSFORMER, _model_to_published),
    SEMVAE: (COMPRESSOR, _semvae_to_part),
    COMPRESSOR: (SEMVAE, _part_to_semvae),
    LDM: (DIFFUSERS, _ldm_to_diffusers),
    DIFFUSERS: (LDM, _diffusers_to_ldm),
}
