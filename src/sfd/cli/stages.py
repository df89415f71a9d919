"""The commands that make a run: all of it (`sfd run`), or one of its stages."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from sfd.cli.options import FOLDER, MAX_HOURS_HELP, device_option
from sfd.utils import distributed

if TYPE_CHECKING:
    from sfd.run.pipeline import Pipeline
    from sfd.run.recipe import Recipe

Command = TypeVar("Command", bound=Callable[..., Any])


def recipe_command(function: Command) -> Command:
    """Give a command a recipe, its overrides and a run's folder."""
    decorators = (
        click.argument("recipe", type=FOLDER),
        click.argument("overrides", nargs=-1, metavar="[FIELD=VALUE]..."),
        click.option("--out", type=FOLDER, help="the run's folder; created if missing  [default: RECIPE, if a run's]"),
        click.option("--scale", type=float, default=1.0, help="share of all steps and samples, such as 0.05"),
        click.option("--strict", is_flag=True, help="stop at a broken image instead of skipping it"),
        click.option("--max-hours", type=click.FloatRange(min=0, min_open=True), help=MAX_HOURS_HELP),
        click.option("--dry-run", is_flag=True, help="print the resolved recipe, sizes and estimates, and exit"),
        device_option,
    )
    for decorator in reversed(decorators):
        function = decorator(function)
    return function


def _stage(
    work: Callable[[Pipeline], object],
    recipe: Path,
    overrides: tuple[str, ...],
    out: Path | None,
    scale: float,
    strict: bool,
    max_hours: float | None,
    dry_run: bool,
    device: str,
) -> None:
    """Validate the recipe, lock the run's folder and make stages."""
    from sfd.run.pipeline import Pipeline
    from sfd.run.recipe import load_recipe
    from sfd.run.scale import scaled
    from sfd.run.validate import check, check_out
    from sfd.utils import files, signals
    from sfd.utils.device import choose_device
    from sfd.utils.errors import SFDError

    root = out or recipe
    if out is None and (root / "recipe.yaml").is_file():
        recipe = root / "recipe.yaml"
    elif out is None and not dry_run:
        raise SFDError(f"{recipe} is not a run's folder, so --out must name one; add --out DIR")

    def read() -> Recipe:
        resolved = load_recipe(recipe, (*overrides, "data.strict=true") if strict else overrides)
        if scale != 1:
            resolved = scaled(resolved, scale)
        if not dry_run:
            check_out(resolved, root)
            check(resolved)
        return resolved

    if dry_run:
        from sfd.run.estimate import describe

        if distributed.is_main_process():
            click.echo(describe(read(), choose_device(device)))
        return
    name = distributed.init(device)
    resolved = distributed.decide(read)
    with ExitStack() as held:
        held.enter_context(signals.limit(max_hours))
        if distributed.is_main_process():
            held.enter_context(files.exclusive(root))
        distributed.broadcast(None)  # the folder is this run's
        pipeline = Pipeline(resolved, root, choose_device(name))
        distributed.decide(pipeline.check_recipe)
        work(pipeline)
        if distributed.is_main_process():
            pipeline.run.save_recipe()
    distributed.shutdown()


@click.command()
@recipe_command
def run(**arguments: Any) -> None:
    """Do all stages of RECIPE: encoders, latents, transformer, samples, metrics, report.

    The same command resumes an interrupted run, and so does `sfd run DIR`, by the recipe that is in its folder.
    FIELD=VALUE overrides a field of the recipe (train.steps=500).
    """

    def work(pipeline: Pipeline) -> None:
        pipeline.make_model()
        _report(pipeline)

    _stage(work, **arguments)


@click.command("train-texture")
@recipe_command
def train_texture(**arguments: Any) -> None:
    """Train the texture autoencoder."""
    _stage(lambda pipeline: pipeline.texture.make(), **arguments)


@click.command("train-semantic")
@recipe_command
def train_semantic(**arguments: Any) -> None:
    """Train the semantic encoder."""
    _stage(lambda pipeline: pipeline.semantic.make(), **arguments)


@click.command("train-semvae")
@recipe_command
def train_semvae(**arguments: Any) -> None:
    """Train the compressor of the semantic features: a SemVAE, or PCA if the recipe says so."""
    _stage(lambda pipeline: pipeline.compressor.make(), **arguments)


@click.command("prepare")
@recipe_command
def prepare(**arguments: Any) -> None:
    """Encode the training images into latent shards, in both orientations; or check published ones.

    Ranks share the work: those of torchrun, or of an array job that sets RANK and WORLD_SIZE.
    """
    _stage(lambda pipeline: pipeline.latents.make(), **arguments)


@click.command("train")
@recipe_command
def train(**arguments: Any) -> None:
    """Train the transformer on prepared latents."""
    _stage(lambda pipeline: pipeline.transformer.make(), **arguments)


@click.command("learn-schedule")
@recipe_command
@click.option("--method", type=click.Choice(["path", "joint"]), default="path", show_default=True)
@click.option("--share", type=float, default=0.05, show_default=True, help="of train.steps that the probe takes")
@click.option("--grid", type=int, default=16, show_default=True, help="intervals of time")
@click.option("--images", type=int, default=256, show_default=True, help="on which errors are measured")
@click.option("--kinetic", type=float, default=0.05, show_default=True, help="joint: weight of the kinetic energy")
@click.option("--length", type=click.FloatRange(min=0), default=0.1, show_default=True, help="price of a longer path")
@click.option("--bend", type=click.FloatRange(min=0), default=0.01, show_default=True, help="price of each bend")
def learn_schedule(length: float, bend: float, **arguments: Any) -> None:
    """Learn the schedule of RECIPE's two streams, before its transformer is trained.

    \b
    path   a probe, trained at independent times, is measured at all pairs of times; the best path through them
    joint  schedule and probe are trained together

    The schedule is written to OUT/schedule/learned.yaml, a recipe for `sfd run`. Another --length or --bend needs no
    new probe.
    """
    probe = {name: arguments.pop(name) for name in ("method", "share", "grid", "images", "kinetic")}

    def work(pipeline: Pipeline) -> None:
        from sfd.run.learn_schedule import ProbeSettings
        from sfd.utils.config import parse

        path = pipeline.learn_schedule(parse(ProbeSettings, probe, "sfd learn-schedule"), length, bend)
        if path is not None:
            click.echo(f"recipe: {path}")

    _stage(work, **arguments)


@click.command("train-evaluator")
@recipe_command
def train_evaluator(**arguments: Any) -> None:
    """Train the evaluation classifier on held-out images."""
    _stage(lambda pipeline: pipeline.evaluator.make(), **arguments)


@click.command("report")
@recipe_command
def report(**arguments: Any) -> None:
    """Sample from a trained run, evaluate the samples and write report.html."""
    _stage(_report, **arguments)


def _report(pipeline: Pipeline) -> None:
    pipeline.report()
    if distributed.is_main_process():
        click.echo(f"report: {pipeline.folder.report}")


COMMANDS = (run, train_texture, train_semantic, train_semvae, prepare, learn_schedule, train, train_evaluator, report)
