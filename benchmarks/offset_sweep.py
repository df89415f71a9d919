"""How far ahead should semantics run? Trains one transformer an offset Δ on the same latents, and judges its samples.

    python benchmarks/offset_sweep.py OUT [--offsets 0,0.3,1] [--seeds 0,1] [RECIPE [field=value ...]]

Encoders, latents and evaluator are trained once, into OUT/parts. A seed sets the initial weights and every draw of the
transformer's training: the same for all Δ, so that they differ by nothing else. Samples are unguided. Each result is
written to OUT/results as it comes; the same command goes on where it was stopped, and prints the table at the end.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from sfd.generation.generate import generate, without_guidance
from sfd.schedules import build_schedule

from sfd.data.shards import LatentSet
from sfd.evaluation.evaluate import Metrics, evaluate, read_metrics
from sfd.evaluation.reference import Reference
from sfd.generation.model import Model
from sfd.models.dit import LightningDiT
from sfd.run.assessment import reference
from sfd.run.pipeline import Pipeline, transformer_config
from sfd.run.recipe import load_recipe
from sfd.training.tasks.diffusion import DiffusionTask
from sfd.training.trainer import fit
from sfd.utils import files
from sfd.utils.device import choose_device

OFFSETS = "0,0.1,0.3,0.5,0.7,1"
MEASURED = {"n_samples", "class_accuracy", "frechet_distance", "precision", "recall"}


def trained(pipeline: Pipeline, delta: float, seed: int, folder: Path) -> Model:
    """Train a transformer with this offset on the prepared latents."""
    recipe, latents = pipeline.recipe, LatentSet(pipeline.folder.latents)
    config = transformer_config(recipe, latents)
    schedule = build_schedule({"name": "offset", "delta": delta}, config.composite.names)
    network = LightningDiT(config, seed=seed)
    size = recipe.train.batch_size
    task = DiffusionTask(network, latents, schedule, recipe.loss, seed=seed, batch_size=size)
    network = fit(task, recipe.train, folder, device=pipeline.device)
    return Model(network, schedule, pipeline.texture, latents.manifest.classes)


def judged(pipeline: Pipeline, model: Model, against: Reference, name: str) -> Metrics:
    """Sample without guidance, the same seeds and classes for every model, and measure."""
    settings = without_guidance(pipeline.recipe.sample)
    labels = [c for c in range(len(model.classes)) for _ in range(pipeline.recipe.evaluation.samples_per_class)]
    images = (batch.images for batch in generate(model, labels, range(len(labels)), settings))
    return evaluate(images, labels, against, name=name, sampling=settings.model_dump(mode="json"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("recipe", type=Path, nargs="?", default=Path("recipes/shapes-demo.yaml"))
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--offsets", default=OFFSETS)
    parser.add_argument("--seeds", default="0")
    given = parser.parse_args()
    recipe = load_recipe(given.recipe, [*given.overrides, "train.preview_every=0"])
    pipeline = Pipeline(recipe, given.out / "parts", choose_device("auto"))
    for stage in ("train_texture", "train_semantic", "train_compressor", "prepare", "train_evaluator"):
        getattr(pipeline, stage)()
    against = reference(pipeline)
    rows = []
    for seed in map(int, given.seeds.split(",")):
        for delta in map(float, given.offsets.split(",")):
            name = f"delta-{delta:g}-seed-{seed}"
            path = given.out / "results" / f"{name}.json"
            if not path.exists():
                model = trained(pipeline, delta, seed, given.out / name)
                judged(pipeline, model, against, name).write(path)
            seen = read_metrics(path)
            rows.append({"delta": delta, "seed": seed, **seen.model_dump(include=MEASURED)})
            print(f"{name}: {seen.class_accuracy:.1%} recognised, Fréchet distance {seen.frechet_distance:.2f}")
            files.write_json(given.out / "table.json", {"overrides": given.overrides, "rows": rows})


if __name__ == "__main__":
    main()
