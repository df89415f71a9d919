"""What speed costs in quality: whole loss curves, trained models and samples, each way beside plain float32.

Beside each difference stands the size of noise: what another seed changes. Folders are kept: the same command goes on
where it was stopped. Their names tell devices, recipes and versions of PyTorch apart, but not versions of this program:
a changed one needs another --out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from sfd.generation.generate import SamplingConfig

from benchmarks.offset_sweep import judged, trained
from benchmarks.solvers_trained import MODEL, judge, sample, texture_errors
from benchmarks.speed.demo import RECIPE
from benchmarks.speed.measuring import Row, Setting, machine
from benchmarks.speed.report import draw_figure, keep_file
from sfd.data.encode import LatentSettings, LatentWriter
from sfd.data.shards import LatentSet
from sfd.evaluation.evaluate import evaluate
from sfd.evaluation.reference import Reference
from sfd.generation.model import Model, load_model
from sfd.models.inference import cannot_compile
from sfd.run.assessment import reference
from sfd.run.pipeline import Pipeline
from sfd.run.recipe import Recipe, dump_recipe, load_recipe
from sfd.training.tasks.diffusion import DiffusionTask, LossSettings
from sfd.utils.files import write_json

EVERY, SMOOTHED = 10, 50  # steps of a line of the log, and of the mean that is compared
CURVES = "training-curves.json"
TRAINED = ["train.steps=300", "train.batch_size=128", "train.decay_from=200", "train.preview_every=0"]
LOGGED = [f"train.log_every={EVERY}"]
JUDGED = ["evaluation.samples_per_class=50", "sample.solver=multistep", "sample.steps=24"]
HELD_OUT = LossSettings(cosine=0, repa=0, label_dropout=0, flip=False)
HELD_OUT_IMAGES = 4096
WAYS: dict[str, tuple[int, list[str]]] = {  # seed, and what differs from the demo's recipe
    "float32": (0, ["train.precision=float32"]),
    "bf16": (0, ["train.precision=bf16"]),
    "bf16 compiled": (0, ["train.precision=bf16", "train.compile=true"]),
    "float32, another seed": (1, ["train.precision=float32"]),
}
GUIDED = SamplingConfig(steps=24, guidance=2.0, compile="off")


def curves(setting: Setting) -> list[Row]:
    """Train the demo's transformer each way on the same latents, batches and first weights; judge what comes out."""
    out, device = curves_folder(setting), setting.device
    able = cannot_compile(device) is None
    judgements = {way: judgement(way, out, device) for way in WAYS if able or "compiled" not in way}
    logs = {way: (folder(out, way, device) / "log.jsonl").read_text().splitlines() for way in judgements}
    losses = {way: [json.loads(line)["loss"] for line in lines] for way, lines in logs.items()}
    steps = [json.loads(line)["step"] for line in logs["float32"]]
    write_json(out / CURVES, {"steps": steps, "smoothed": SMOOTHED, "loss": losses})
    return [{"way": way} | compared(losses[way], losses["float32"]) | row for way, row in judgements.items()]


def curves_folder(setting: Setting) -> Path:
    """Where what is trained on a type of device lies."""
    return setting.out / f"curves-{setting.device.type}"


def keep(setting: Setting) -> None:
    """Keep the curves that were measured; the CPU's are drawn."""
    keep_file(curves_folder(setting) / CURVES, CURVES, setting.device.type)
    if setting.device.type == "cpu":
        draw_figure("training_curves")


def judgement(way: str, out: Path, device: torch.device) -> Row:
    """Train one way and judge the model, unless that is done."""
    path = folder(out, way, device) / "judgement.json"
    if not path.exists():
        seed = WAYS[way][0]
        pipeline = demo(out / "parts", device, recipe_of(way))
        model = trained(pipeline, float(pipeline.recipe.schedule["delta"]), seed, path.parent)
        torch._dynamo.reset()
        seen = judged(pipeline, model, reference(pipeline), way)
        row = {"held_out_velocity_loss": loss(model, held_out(pipeline, out / "held-out"))}
        write_json(path, row | {"frechet_distance": seen.frechet_distance, "class_accuracy": seen.class_accuracy})
    return json.loads(path.read_text(encoding="utf-8"))


def folder(out: Path, way: str, device: torch.device) -> Path:
    """Where a way's training lies: another device, recipe, seed or PyTorch trains elsewhere."""
    where = machine(device)
    decides = [WAYS[way][0], dump_recipe(recipe_of(way)), where["device"], where["torch"]]
    digest = hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:8]
    return out / f"{way.replace(',', '').replace(' ', '-')}-{device.type}-{digest}"


def recipe_of(way: str) -> Recipe:
    """The demo's recipe for a way."""
    return load_recipe(RECIPE, [*TRAINED, *LOGGED, *JUDGED, *WAYS[way][1]])


def demo(root: Path, device: torch.device, recipe: Recipe) -> Pipeline:
    """The demo's run, all of its parts made but the transformer."""
    pipeline = Pipeline(recipe, root, device)
    for stage in ("train_texture", "train_semantic", "train_compressor", "prepare", "train_evaluator"):
        getattr(pipeline, stage)()
    return pipeline


def held_out(pipeline: Pipeline, root: Path) -> LatentSet:
    """Latents of the images that no transformer is trained on."""
    encoders = pipeline.texture, pipeline.semantic, pipeline.compressor
    LatentWriter(pipeline.images[1], *encoders, root, LatentSettings(features=False), pipeline.device).write()
    return LatentSet(root)


@torch.no_grad()
def loss(model: Model, latents: LatentSet, batch_size: int = 256) -> float:
    """Mean velocity loss over some held-out latents, once each: the same noise and times for every model."""
    network = model.transformer.eval()
    task = DiffusionTask(network, latents, model.schedule, HELD_OUT, seed=0, batch_size=batch_size)
    losses = []
    for step in range(min(HELD_OUT_IMAGES, len(latents)) // batch_size):
        batch = {name: part.to(model.device) for name, part in task.batch(step, range(batch_size)).items()}
        losses.append(task.loss(network, batch)["loss"].item())
    return float(np.mean(losses))


def compared(losses: list[float], plain: list[float]) -> Row:
    """The last quarter's mean loss, how much it differs, and how much smoothed curves differ at most; relative."""
    quarter = len(plain) // 4
    last, before = np.mean(losses[-quarter:]), np.mean(plain[-quarter:])
    ours, theirs = (smoothed(np.array(each)) for each in (losses, plain))
    return {
        "loss_in_the_last_quarter": float(last),
        "its_relative_difference": float(last / before - 1),
        "largest_relative_difference": float(np.abs(ours / theirs - 1).max()),
    }


def smoothed(losses: np.ndarray) -> np.ndarray:
    """Means over `SMOOTHED` steps of a curve with a value every `EVERY` steps."""
    width = SMOOTHED // EVERY
    return np.convolve(losses, np.full(width, 1 / width), mode="valid")


def evaluator(setting: Setting) -> Reference:
    """The classifier that judges samples of models/shapes, trained once on a type of device, and its real images."""
    return judge(setting.out / f"evaluator-{setting.device.type}", setting.device)


def sample_metrics(setting: Setting, count: int = 1000) -> list[Row]:
    """Sample models/shapes each way from the same seeds and classes, and judge by one classifier."""
    model, against = load_model(MODEL, setting.device), evaluator(setting)
    labels = [k % len(model.classes) for k in range(count)]
    rows: list[Row] = []
    for way, first, chosen in ways_to_sample(setting.device, count):
        images, latents, _, _ = sample(model, count, chosen, first)
        torch._dynamo.reset()
        if not rows:
            plain, exact = images.astype(np.int16), latents
        seen, difference = evaluate(images, labels, against, name=way), np.abs(images - plain)
        row: Row = {"way": way, "frechet_distance": seen.frechet_distance, "class_accuracy": seen.class_accuracy}
        row |= {"median_latent_error": texture_errors(model, latents, exact).median().item()}
        row |= {"mean_pixel_difference": float(difference.mean()), "largest_pixel_difference": int(difference.max())}
        rows.append(row)
        print(row, flush=True)
    return rows


def ways_to_sample(device: torch.device, count: int) -> Iterator[tuple[str, int, SamplingConfig]]:
    """Name each way, with the seed of its first image."""
    yield "float32", 0, GUIDED
    yield "bf16", 0, GUIDED.model_copy(update={"precision": "bf16"})
    if cannot_compile(device) is None:
        yield "float32 compiled", 0, GUIDED.model_copy(update={"compile": "on"})
        yield "bf16 compiled", 0, GUIDED.model_copy(update={"precision": "bf16", "compile": "on"})
    yield "float32, other seeds", count, GUIDED
