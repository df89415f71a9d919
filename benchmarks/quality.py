"""Quality: loss curves, trained models and samples of each precision and solver.

Another seed shows the size of noise. Trained parts are kept in `--out`: the same command resumes. Folder names depend
on device, recipe and version of PyTorch, but not on this program: if it changes, use another --out.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.demo import RECIPE
from benchmarks.measure import MODEL, Row, Setting, machine
from benchmarks.solvers import BASELINE, dopri5, fixed, solve, texture_errors
from sfd.data.encode import LatentSettings, LatentWriter
from sfd.data.shapes import ShapesSource
from sfd.data.shards import LatentSet
from sfd.evaluation.evaluate import Metrics, evaluate
from sfd.evaluation.extractors.classifier import ClassifierExtractor, load_classifier
from sfd.evaluation.reference import Reference, reference_of
from sfd.generation.config import SamplingConfig
from sfd.generation.model import Model, load_model
from sfd.models.dit import LightningDiT
from sfd.run.pipeline import Pipeline
from sfd.run.recipe import Recipe, dump_recipe, load_recipe
from sfd.run.transformer import transformer_config
from sfd.schedule import build_schedule
from sfd.training.tasks.classifier import ClassifierSettings, divide, train_classifier
from sfd.training.tasks.diffusion import DiffusionTask, LossSettings
from sfd.training.trainer import fit
from sfd.utils.files import write_json

EVERY, SMOOTHED = 10, 50  # steps per line of the log, and of the mean that is compared
TRAINED = ["train.steps=300", "train.batch_size=128", "train.decay_from=200", "train.preview_every=0"]
TRAINED += [f"train.log_every={EVERY}"]
EVALUATED = ["evaluation.samples_per_class=50", "sample.solver=multistep", "sample.steps=24"]
HELD_OUT = LossSettings(cosine=0, repa=0, label_dropout=0, flip=False)
HELD_OUT_IMAGES = 4096
WAYS: dict[str, tuple[int, list[str]]] = {  # seed, and what differs from the demo's recipe
    "float32": (0, ["train.precision=float32"]),
    "bf16": (0, ["train.precision=bf16"]),
    "bf16 compiled": (0, ["train.precision=bf16", "train.compile=true"]),
    "float32, another seed": (1, ["train.precision=float32"]),
}
REAL, REAL_SEED = 20_000, 1_000_003  # images that models/shapes never saw: its own are of seed 0
SAMPLES, AT_ONCE = 1000, 250


def curves(setting: Setting) -> list[Row]:
    """Train the demo's transformer each way on the same latents, batches and first weights, and evaluate it."""
    rows: list[Row] = []
    for way in WAYS:
        if setting.compiles or "compiled" not in way:
            folder = _folder(setting, way)
            row = _evaluation(setting, way, folder)
            lines = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
            kept = {"steps": [line["step"] for line in lines], "loss": [line["loss"] for line in lines]}
            plain = rows[0]["loss"] if rows else kept["loss"]
            rows.append({"way": way} | compared(kept["loss"], plain) | row | kept)
    return rows


def _folder(setting: Setting, way: str) -> Path:
    """Another device, recipe, seed or PyTorch trains in another folder."""
    where, (seed, _) = machine(setting.device), WAYS[way]
    decides = [seed, dump_recipe(_recipe(way)), where["device"], where["torch"]]
    digest = hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:8]
    return setting.out / "curves" / f"{way.replace(',', '').replace(' ', '-')}-{setting.device.type}-{digest}"


def _recipe(way: str) -> Recipe:
    return load_recipe(RECIPE, [*TRAINED, *EVALUATED, *WAYS[way][1]])


def _evaluation(setting: Setting, way: str, folder: Path) -> Row:
    """Train one way and evaluate the model, unless that is done."""
    path = folder / "evaluation.json"
    if not path.exists():
        pipeline, against = parts(_recipe(way), setting.out / "curves" / f"parts-{setting.device.type}", setting.device)
        model = trained(pipeline, float(pipeline.recipe.schedule["delta"]), WAYS[way][0], folder)
        torch._dynamo.reset()
        seen = evaluated(pipeline, model, against, way)
        loss = held_out_loss(model, held_out(pipeline, setting.out / "curves" / f"held-out-{setting.device.type}"))
        row = {"held_out_velocity_loss": loss, "frechet_distance": seen.frechet_distance}
        write_json(path, row | {"class_accuracy": seen.class_accuracy})
    return json.loads(path.read_text(encoding="utf-8"))


def held_out(pipeline: Pipeline, folder: Path) -> LatentSet:
    """Latents of the images that no transformer is trained on."""
    tokenizers = pipeline.texture.encoder, pipeline.semantic.encoder, pipeline.compressor.compressor
    settings = LatentSettings(features=False)
    LatentWriter(pipeline.images.held_out, *tokenizers, folder, settings, pipeline.device).write()
    return LatentSet(folder)


@torch.no_grad()
def held_out_loss(model: Model, latents: LatentSet, batch_size: int = 256) -> float:
    """Mean velocity loss over held-out latents, once each: the same noise and times for every model."""
    network = model.transformer.eval()
    task = DiffusionTask(network, latents, model.schedule, HELD_OUT, seed=0, batch_size=batch_size)
    losses = []
    for step in range(min(HELD_OUT_IMAGES, len(latents)) // batch_size):
        batch = {name: part.to(model.device) for name, part in task.batch(step, range(batch_size)).items()}
        losses.append(task.loss(network, batch)["loss"].item())
    return float(np.mean(losses))


def compared(losses: list[float], plain: list[float]) -> Row:
    """The last quarter's mean loss, its relative difference, and the largest one of the smoothed curves."""
    quarter, width = len(plain) // 4, SMOOTHED // EVERY
    last, before = np.mean(losses[-quarter:]), np.mean(plain[-quarter:])
    ours, theirs = (np.convolve(each, np.full(width, 1 / width), mode="valid") for each in (losses, plain))
    return {
        "loss_in_the_last_quarter": float(last),
        "its_relative_difference": float(last / before - 1),
        "largest_relative_difference": float(np.abs(ours / theirs - 1).max()),
    }


def reference(setting: Setting) -> Reference:
    """The classifier that evaluates samples of models/shapes, trained on first use, and the real images it sees."""
    folder = setting.out / f"evaluator-{setting.device.type}"
    images, how = ShapesSource(REAL, REAL_SEED), ClassifierSettings()
    if (folder / "extractor").exists():
        extractor = load_classifier(folder / "extractor", setting.device)
    else:
        network = train_classifier(images, how, folder, device=setting.device)
        network.save(folder / "extractor")
        extractor = ClassifierExtractor(network)
    return reference_of(divide(images, how)[1], extractor, "held-out real images")


def solvers(setting: Setting) -> list[Row]:
    """Error and quality of samples of models/shapes, by solver and NFE; the same seeds and classes, guidance 2.

    Samples of `sde` differ from the converged ones by intent: they have a quality and no error.
    """
    model, against = load_model(MODEL, setting.device), reference(setting)
    labels = [k % len(model.classes) for k in range(SAMPLES)]
    nfe = (12, 18, 24, 36)
    runs = [("converged", dopri5(1e-4)), (BASELINE, dopri5(1e-3)), ("dopri5", dopri5(1e-3))]
    runs += sorted(fixed(nfe), key=lambda run: run[0])
    runs += [("sde", {"solver": "sde", "steps": n // 2, "options": {"noise": 0.5}}) for n in nfe]
    rows: list[Row] = []
    converged: Tensor | None = None
    for name, how in runs:
        config = SamplingConfig(**how, guidance=2.0)
        found = solve(model, SAMPLES, config, at_once=AT_ONCE, knots=name != BASELINE)
        converged = found.latents if converged is None else converged
        error = None if name == "sde" else texture_errors(model.composite, found.latents, converged).median().item()
        seen = evaluate(model.decode(found.latents), labels, against, name=name)
        row = {"method": name, "nfe": found.nfe, "error": error, "frechet_distance": seen.frechet_distance}
        rows.append(row | {"class_accuracy": seen.class_accuracy})
        print(rows[-1], flush=True)
    return rows


def precision(setting: Setting) -> list[Row]:
    """Samples of models/shapes in each precision, from the same seeds and classes, and from other seeds."""
    model, against = load_model(MODEL, setting.device), reference(setting)
    labels = [k % len(model.classes) for k in range(SAMPLES)]
    ways = {"float32": {}, "bf16": {"precision": "bf16"}}
    if setting.compiles:
        ways |= {"float32 compiled": {"compile": True}, "bf16 compiled": {"precision": "bf16", "compile": True}}
    rows: list[Row] = []
    for way, changes in {**ways, "float32, other seeds": {}}.items():
        how = SamplingConfig(**{"steps": 24, "guidance": 2.0, "batch_size": AT_ONCE} | changes)
        first = SAMPLES if "seeds" in way else 0
        batches = list(model.sample_batches(labels, range(first, first + SAMPLES), how))
        torch._dynamo.reset()
        images, latents = np.concatenate([b.images for b in batches]), torch.cat([b.latents for b in batches])
        if not rows:
            plain, converged = images.astype(np.int16), latents
        seen, difference = evaluate(images, labels, against, name=way), np.abs(images - plain)
        row: Row = {"way": way, "frechet_distance": seen.frechet_distance, "class_accuracy": seen.class_accuracy}
        row["median_latent_error"] = texture_errors(model.composite, latents, converged).median().item()
        row |= {"mean_pixel_difference": float(difference.mean()), "largest_pixel_difference": int(difference.max())}
        rows.append(row)
    return rows


def parts(recipe: Recipe, folder: Path, device: torch.device) -> tuple[Pipeline, Reference]:
    """A run with all of its parts but the transformer, and what its samples are compared with."""
    pipeline = Pipeline(recipe, folder, device)
    for stage in (pipeline.texture, pipeline.semantic, pipeline.compressor, pipeline.latents, pipeline.evaluator):
        stage.make()
    return pipeline, pipeline.evaluator.reference()


def trained(pipeline: Pipeline, delta: float, seed: int, folder: Path) -> Model:
    """Train a transformer with this offset on the prepared latents."""
    recipe, latents = pipeline.recipe, LatentSet(pipeline.folder.latents)
    config = transformer_config(recipe, latents)
    schedule = build_schedule({"name": "offset", "delta": delta}, config.composite.names)
    network, size = LightningDiT(config, seed=seed), recipe.train.batch_size
    task = DiffusionTask(network, latents, schedule, recipe.loss, seed=seed, batch_size=size)
    network = fit(task, recipe.train, folder, device=pipeline.device)
    return Model(network, schedule, pipeline.texture.encoder, latents.manifest.classes)


def evaluated(pipeline: Pipeline, model: Model, against: Reference, name: str) -> Metrics:
    """Sample without guidance, the same seeds and classes for every model, and evaluate."""
    settings = pipeline.recipe.sample.unguided()
    labels = [c for c in range(len(model.classes)) for _ in range(pipeline.recipe.evaluation.samples_per_class)]
    images = np.concatenate([b.images for b in model.sample_batches(labels, range(len(labels)), settings)])
    return evaluate(images, labels, against, name=name, sampling=settings.model_dump(mode="json"))
