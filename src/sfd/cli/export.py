"""`sfd export`: a model in this project's format or in that of diffusers, with a model card."""

from __future__ import annotations

import shutil
from pathlib import Path

import click
import torch

from sfd.encoders import open_semantic, save_semantic
from sfd.evaluation.evaluate import read_metrics
from sfd.generation.card import model_card
from sfd.generation.directory import COMPRESSOR_FOLDER, SEMANTIC_FOLDER, model_folder
from sfd.generation.folder import GRID
from sfd.generation.model import Model, load_model
from sfd.models.compressor import load_compressor
from sfd.run import stages
from sfd.utils import files
from sfd.utils.errors import SFDError

CARD, PICTURE = "README.md", "samples.png"


def export_model(source: Path, out: Path, form: str, dtype: str, licence: str | None, step: int | None) -> None:
    """Write a model directory, a run's model or a pipeline to `out`; see `sfd export --help`."""
    files.check_replaceable(out)
    model = _load(source) if step is None else _at_step(source, step)
    with files.atomic_write(out) as partial:
        if form == "diffusers":
            from sfd.diffusers.conversion import EVALUATIONS, from_model

            solver = model.sampling.solver
            if solver not in EVALUATIONS:
                click.echo(f"the scheduler for diffusers has no {solver}; it takes the multistep method", err=True)
            pipeline = from_model(model)
            if dtype == "float16":
                pipeline.transformer.half()
                pipeline.vae.half()
            pipeline.save_pretrained(partial)
            if model.semantic is not None and model.compressor is not None:  # diffusers has no use for them
                save_semantic(model.semantic, partial / SEMANTIC_FOLDER, getattr(torch, dtype))
                model.compressor.save(partial / COMPRESSOR_FOLDER, getattr(torch, dtype))
        else:
            model.save(partial, getattr(torch, dtype))
        _describe(model, source if step is None else None, partial, out.name, form, licence)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    click.echo(f"{out}: {size / 1e6:.2f} MB")


def _load(source: Path) -> Model:
    if (source / "model_index.json").is_file():
        from diffusers.utils import logging

        from sfd.diffusers import SFDPipeline, to_model

        logging.disable_progress_bar()
        model = to_model(SFDPipeline.from_pretrained(source))
        if (source / COMPRESSOR_FOLDER).is_dir():
            model.semantic = open_semantic(source / SEMANTIC_FOLDER)
            model.compressor = load_compressor(source / COMPRESSOR_FOLDER)
        return model
    return load_model(model_folder(source), torch.device("cpu"))


def _at_step(run: Path, step: int) -> Model:
    from sfd.run.pipeline import Pipeline
    from sfd.run.recipe import load_recipe

    recipe = run / "recipe.yaml"
    if not recipe.exists():
        raise SFDError(f"--step takes the checkpoint of a run, and {run} is none: it has no recipe.yaml")
    return Pipeline(load_recipe(recipe), run, torch.device("cpu")).transformer.model_at(step)


def _describe(model: Model, run: Path | None, out: Path, name: str, form: str, licence: str | None) -> None:
    """Write the model card; a run gives its metrics and a grid of its samples too."""
    found = sorted(run.glob("metrics/*.json")) if run else []
    metrics = [read_metrics(path).model_dump(mode="json") for path in found if path.name != stages.RECORD]
    grid = next(iter(sorted(run.glob(f"samples/*/{GRID}"))), None) if run else None
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
