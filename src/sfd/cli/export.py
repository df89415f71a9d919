"""`sfd export`: a model in this project's format or in that of diffusers, with a model card."""

from __future__ import annotations

import shutil
from pathlib import Path

import click
import torch

from sfd.evaluation.evaluate import read_metrics
from sfd.generation.card import model_card
from sfd.generation.directory import model_folder
from sfd.generation.folder import GRID
from sfd.generation.model import Model, load_model
from sfd.run import stages
from sfd.utils import files

CARD, PICTURE = "README.md", "samples.png"


def export_model(source: Path, out: Path, form: str, dtype: str, licence: str | None) -> None:
    """Write a model directory, a run's model or a pipeline to `out`; see `sfd export --help`."""
    files.check_replaceable(out)
    model = _load(source)
    with files.atomic_write(out) as partial:
        if form == "diffusers":
            from sfd.diffusers.conversion import EVALUATIONS, from_model

            if model.sampling.solver not in EVALUATIONS:
                click.echo(
                    f"diffusers' scheduler has no {model.sampling.solver}; it takes the multistep method", err=True
                )
            from_model(model).to(getattr(torch, dtype)).save_pretrained(partial)
        else:
            model.save(partial, getattr(torch, dtype))
        _describe(model, source, partial, out.name, form, licence)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    click.echo(f"{out}: {size / 1e6:.2f} MB")


def _load(source: Path) -> Model:
    if (source / "model_index.json").is_file():
        from diffusers.utils import logging

        from sfd.diffusers import SFDPipeline, to_model

        logging.disable_progress_bar()
        return to_model(SFDPipeline.from_pretrained(source))
    return load_model(model_folder(source), torch.device("cpu"))


def _describe(model: Model, source: Path, out: Path, name: str, form: str, licence: str | None) -> None:
    """Write the model card; a run gives its metrics and a grid of its samples too."""
    files_of_metrics = sorted(path for path in source.glob("metrics/*.json") if path.name != stages.RECORD)
    metrics = [read_metrics(path).model_dump(mode="json") for path in files_of_metrics]
    grid = next(iter(sorted(source.glob(f"samples/*/{GRID}"))), None)
    if grid is not None:
        shutil.copyfile(grid, out / PICTURE)
    card = model_card(
        model,
        name=name,
        library="diffusers" if form == "diffusers" else "sfd",
        licence=licence,
        metrics=metrics,
        grid=PICTURE if grid else None,
    )
    files.write_text(out / CARD, card)
