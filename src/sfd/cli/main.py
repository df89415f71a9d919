"""The command `sfd`. Heavy imports are deferred to the commands, so that `--help` is fast."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import click

from sfd import __version__
from sfd.cli import stages
from sfd.cli.errors import Group
from sfd.cli.options import BY_STREAM, FOLDER, MAX_HOURS_HELP, device_option, guidance_option
from sfd.utils.errors import SFDError


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="sfd")
def main() -> None:
    """Semantic-first diffusion: train an image generator on a folder of images, and sample from it.

    `sfd run RECIPE --out DIR` does everything; the other commands are its single stages, and tools for their results.
    """
    warnings.filterwarnings("ignore", module="PIL")  # of damaged metadata, which cost no image


for command in stages.COMMANDS:
    main.add_command(command)


@main.command()
@click.argument("model", type=FOLDER)
@click.argument("overrides", nargs=-1, metavar="[FIELD=VALUE]...")
@click.option("--out", type=FOLDER, default=Path("samples"), show_default=True, help="folder for PNGs and grid.png")
@click.option("--classes", default="all", show_default=True, help="names or numbers, comma-separated; 'all'")
@click.option("--seeds", default="0-7", show_default=True, help="such as 0-63 or 1,5,9; each class gets each seed")
@click.option("--in-turn", is_flag=True, help="seed i gets class i mod the number of classes, so that no noise repeats")
@click.option("--steps", type=int, help="solver steps; an adaptive solver chooses its own")
@click.option("--solver", help="euler, heun, multistep, sde, dopri5")
@guidance_option
@click.option(
    "--guiding-model", type=FOLDER, help="a less trained model, for AutoGuidance; sets guidance_from=guiding_model"
)
@device_option
def sample(**arguments: Any) -> None:
    """Sample images from a MODEL directory, a run's folder or a shipped model.

    Each class gets each seed. An image is a function of its class and its seed, whatever the batch or the number of
    devices, up to rounding (dopri5: up to its tolerance).

    Settings are those of the recipe's `sample:` that the model was trained by; FIELD=VALUE changes one, such as
    interval='[0.2, 0.8]', options.rtol=1e-4, shift=0.5, batch_size=128, precision=bf16.

    The same command resumes an interrupted one. Processes that a launcher or an array job starts (RANK and WORLD_SIZE
    in the environment) split the images; the last one to finish draws the grid.
    """
    from sfd.cli.sample import sample_images

    sample_images(**arguments)


@main.command()
@click.argument("model", type=FOLDER)
@click.argument("overrides", nargs=-1, metavar="[FIELD=VALUE]...")
@click.option("--out", required=True, type=FOLDER, help="the run's folder; its model/ is the result")
@click.option("--guiding-model", type=FOLDER, help="of a teacher with AutoGuidance")
@click.option("--max-hours", type=click.FloatRange(min=0, min_open=True), help=MAX_HOURS_HELP)
@device_option
def distill(**arguments: Any) -> None:
    """Distil a MODEL into one that samples in 8, 4, 2 or 1 steps without guidance.

    The teacher's sampling settings are the model's own: teacher.guidance=2, teacher.steps=24, … change them, as
    train.steps=3000 or trajectories=50000 change the student's training. The same command resumes an interrupted one.
    """
    from sfd.cli.distill import distill_model

    distill_model(**arguments)


@main.command()
@click.argument("model", type=FOLDER)
@click.argument("out", type=FOLDER)
@click.option("--format", "form", type=click.Choice(["sfd", "diffusers"]), default="sfd", show_default=True)
@click.option("--dtype", type=click.Choice(["float16", "float32"]), default="float16", show_default=True)
@click.option("--licence", "--license", help="of the weights, for the card: mit, apache-2.0 …  [default: not stated]")
@click.option("--step", type=int, help="of a run: the model of a kept checkpoint, to sample or guide with")
def export(model: Path, out: Path, form: str, dtype: str, licence: str | None, step: int | None) -> None:
    """Write a MODEL directory, a run's model or an exported pipeline to OUT, with a model card.

    By default with weights of half the size. A run's card has its metrics and a grid of its samples. The model of a
    --step cannot encode new images: it has no semantic encoder. The format diffusers is a folder for
    SFDPipeline.from_pretrained and DiffusionPipeline.from_pretrained.
    """
    from sfd.cli.export import export_model

    export_model(model, out, form, dtype, licence, step)


@main.command("export-latents")
@click.argument("latents", type=FOLDER)
@click.argument("out", type=FOLDER)
def export_latents(latents: Path, out: Path) -> None:
    """Write LATENTS (a run's folder, or its latents) to OUT in the published format, with their statistics."""
    from sfd.data.published import write_published
    from sfd.run.latents import find_latents

    found = find_latents(latents)
    write_published(found, out)
    click.echo(f"{len(found)} images in {out}")


@main.command()
@click.argument("model", type=FOLDER)
@click.argument("kind", type=click.Choice(["keep-plan", "change-plan", "swap-plans", "paint", "sdedit", "interpolate"]))
@click.argument("overrides", nargs=-1, metavar="[FIELD=VALUE]...")
@click.option("--out", type=FOLDER, default=Path("edits.png"), show_default=True, help="the PNG to write")
@click.option("--classes", default="all", show_default=True, help="of the sources, comma-separated")
@click.option("--seeds", default="0", show_default=True, help="of the sources; each class gets each seed")
@click.option("--images", type=FOLDER, help="a folder of images as sources; the first is taken with the first seed, …")
@click.option("--count", type=click.IntRange(min=2), default=6, show_default=True, help="results for each source")
@click.option("--to", help="class of the results  [default: none, the plan decides]")
@click.option(
    "--delta", type=click.FloatRange(min=0), help="another offset than the model's: a larger one keeps plans better"
)
@click.option(
    "--plan-guidance", type=click.FloatRange(min=0), help="by which a kept plan guides texture; 1: none  [default: 2.5]"
)
@click.option(
    "--start", type=BY_STREAM, default="0.4", show_default=True, help="sdedit: base time, or semantic=1,texture=0.4"
)
@click.option("--brush", default="0,0,0.5,1", show_default=True, help="paint: LEFT,TOP,RIGHT,BOTTOM, from 0 to 1")
@click.option("--steps", type=int, help="solver steps")
@click.option("--solver", help="euler, heun, multistep, dopri5")
@guidance_option
@device_option
def edit(**arguments: Any) -> None:
    """Redraw samples of a MODEL, or images, by streams: what is where (the plan) and how it looks (texture).

    \b
    keep-plan     new texture on the same plan
    change-plan   new plans for the same texture's noise
    swap-plans    two samples get each other's plan
    paint         redrawn where a brush went
    sdedit        noised up to a time, or each stream up to its own, and denoised
    interpolate   from one plan to another
    """
    from sfd.cli.edit import edit_images

    edit_images(**arguments)


@main.command()
@click.argument("model", type=FOLDER)
@click.argument("overrides", nargs=-1, metavar="[FIELD=VALUE]...")
@click.option("--port", type=click.IntRange(0, 65535), default=8765, show_default=True, help="0: any that is free")
@click.option("--static", type=FOLDER, help="write one self-contained HTML page of samples to this file instead")
@click.option("--classes", help="of --static: names or numbers, comma-separated  [default: all]")
@click.option("--seeds", help="of --static: such as 0-3; each class gets each seed  [default: 0]")
@click.option("--steps", type=int, help="solver steps")
@click.option("--solver", help="euler, heun, multistep, dopri5")
@guidance_option
@device_option
def explore(model: Path, **arguments: Any) -> None:
    """Watch a MODEL denoise its streams, and edit samples, on a page in the browser.

    The page is served to this machine alone. Steps, solver, guidance and FIELD=VALUE are its first values.
    """
    from sfd.cli.explore import explore_model

    explore_model(model, **arguments)


@main.command()
@click.argument("samples", type=FOLDER)
@click.option("--run", type=FOLDER, help="compare with the held-out images of this run, by its own classifier")
@click.option("--reference", type=FOLDER, help="or with real images: folder, zip, or .npz of images or statistics")
@click.option(
    "--extractor", help="with --reference: inception (FID, sFID, IS), dinov2 (FD-DINOv2) or efficientnet_lite (offline)"
)
@click.option("--weights", help="of the extractor: a local file or folder  [default: downloaded]")
@click.option("--image-size", type=click.IntRange(min=1), help="scale and crop SAMPLES to this, as for training")
@click.option("--out", type=FOLDER, help="write the metrics to this JSON file too")
@click.option("--features", type=FOLDER, help="cache of features  [default: features, next to --out or SAMPLES]")
@click.option("--batch-size", type=click.IntRange(min=1), default=64, show_default=True, help="of the extractor")
@device_option
def evaluate(**arguments: Any) -> None:
    """Evaluate SAMPLES (a folder, a zip or an .npz): FID, sFID, inception score, precision, recall, class accuracy.

    Each metric is printed with a 95 % interval and the evaluation protocol. Features are cached: the same command
    resumes where it was stopped, and ranks (RANK and WORLD_SIZE) share the work through a common folder.
    """
    from sfd.cli.evaluate import evaluate_samples

    evaluate_samples(**arguments)


@main.command()
@click.argument("samples", type=FOLDER)
@click.argument("out", type=FOLDER)
def pack(samples: Path, out: Path) -> None:
    """Write a folder of SAMPLES as one file OUT.npz, as ADM's evaluation reads them."""
    from sfd.cli.evaluate import pack_samples

    pack_samples(samples, out)


@main.command()
@click.argument("source", type=FOLDER)
@click.argument("out", type=FOLDER)
@click.option("--weights", type=click.Choice(["ema", "model"]), help="which of a checkpoint's  [default: ema]")
@click.option("--texture", help="of a published transformer: the texture encoder, a folder or a hub name")
@click.option("--statistics", multiple=True, help="latents_stats.pt, latents_sv_stats.pt, a folder of latents, or none")
@click.option("--classes", help="a file with one name per line, or their number  [default: numbers]")
@click.option("--delta", type=click.FloatRange(min=0), help="offset between the streams  [default: 0.3]")
@click.option("--semantic-channels", type=click.IntRange(min=0), help="[default: all that are not texture]")
@click.option("--repa-block", type=click.IntRange(min=1), help="block whose tokens REPA projects  [default: 2]")
@click.option("--heads", type=click.IntRange(min=1), help="attention heads of a SemVAE  [default: 6]")
def convert(**arguments: Any) -> None:
    """Convert published weights in SOURCE to this project's format; the kind of SOURCE is recognised.

    \b
    transformer (.pt, .ckpt, .safetensors)  ->  model directory
    SemVAE (.pt, .safetensors)              ->  compressor's folder
    autoencoder in the LDM format (.ckpt)   ->  folder in diffusers' format
    """
    from sfd.cli.convert import convert

    convert(**arguments)


@main.command()
@click.argument("folder", type=FOLDER, required=False)
@click.option("--tflops", type=click.FloatRange(min=0, min_open=True), default=400.0, show_default=True)
def recipes(folder: Path | None, tflops: float) -> None:
    """List the shipped recipes, or those in FOLDER: purpose, published numbers, parameters, hours (by TFLOP/s)."""
    from sfd.run.estimate import table
    from sfd.run.recipe import load_recipe
    from sfd.utils.shipped import RECIPE, shipped_folder

    folder = folder or shipped_folder(RECIPE)
    paths = sorted(folder.rglob("*.yaml"), key=lambda path: (len(path.parts), path))
    if not paths:
        raise SFDError(f"there is no recipe in {folder}; give a folder of YAML files, such as recipes")
    named = {path.relative_to(folder).as_posix(): load_recipe(path) for path in paths}
    click.echo(table(named, tflops), nl=False)


@main.command()
@click.argument("out", type=FOLDER)
@click.option("--count", type=click.IntRange(min=1), default=1000, show_default=True)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--image-size", type=click.IntRange(min=8), default=32, show_default=True)
def shapes(out: Path, count: int, seed: int, image_size: int) -> None:
    """Write the procedural data set as PNG files, one sub-folder per class."""
    from sfd.data.folder import write_folder
    from sfd.data.shapes import ShapesSource

    write_folder(ShapesSource(count, seed, image_size), out)
    click.echo(f"{count} images in {out}")
