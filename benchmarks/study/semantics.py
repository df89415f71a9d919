"""What limits an arm of the study: how its semantics are generated, or how texture is drawn on them.

    python -m benchmarks.study.semantics shapes|photos [FIELD=VALUE]... [--arms NAME,...] [--seeds 3] [--out runs/study]

Texture is drawn, without guidance, on the semantics of real images; on the arm's own, also with AutoGuidance; on those
of its network early in training; and on its final semantics by the early network. A linear probe says which classes
generated semantics have. Results are kept in the study's folder, and its page shows them. Semantics that are finished
before texture begins (an offset of 1) can be exchanged exactly; those of other schedules are put on straight lines from
their noise, as in training.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.probe import Linear
from benchmarks.study import command
from benchmarks.study.arms import Arm
from benchmarks.study.work import FROM_WEAK, SHOWN, WEAK, Study
from sfd.data.shards import LatentSet
from sfd.editing.follow import Follow, follow
from sfd.evaluation.evaluate import evaluate
from sfd.generation.config import SamplingConfig
from sfd.generation.model import Model
from sfd.latents import SEMANTIC
from sfd.sampling import initial_noise, integrate
from sfd.utils import files
from sfd.utils.errors import SFDError
from sfd.utils.progress import say


def chosen(latents: LatentSet, labels: Sequence[int]) -> np.ndarray:
    """Numbers (B,) of different training images with these labels (B,), sorted."""
    known, wanted = latents.labels.numpy(), np.asarray(labels)
    found = [np.flatnonzero(known == label)[: (wanted == label).sum()] for label in np.unique(wanted)]
    if sum(map(len, found)) < len(labels):
        fewest = min(map(len, found))
        raise SFDError(f"a class has {fewest} training images, too few; lower evaluation.samples_per_class to that")
    return np.concatenate(found)


def semantic_latents(latents: LatentSet, indices: np.ndarray) -> Tensor:
    """Normalised semantic latents (B, C, g, g) of images."""
    raw = latents.read(SEMANTIC, indices, np.zeros(len(indices), bool))
    mean, deviation = latents.composite()[SEMANTIC].statistics(raw)
    return (raw - mean) / deviation


def on_semantics(
    model: Model, given: Tensor, labels: Sequence[int], seeds: Sequence[int], config: SamplingConfig
) -> Tensor:
    """Sample latents (B, N) while semantics go straight from their noise to given ones (B, C, g, g), as in training."""
    composite, size, found = model.composite, config.batch_size, []
    for first in range(0, len(labels), size):
        part = slice(first, first + size)
        noise = initial_noise(seeds[part], composite).to(model.device)
        velocity = model.velocity_field(torch.tensor(labels[part], device=model.device), config)
        velocity = follow(velocity, noise, composite, {SEMANTIC: Follow(given[part].to(model.device))})
        found.append(integrate(velocity, noise, model.schedule, composite, **config.integration).x)
    return torch.cat(found)


def class_accuracy(latents: LatentSet, generated: Tensor, labels: Sequence[int]) -> dict[str, float]:
    """Share of generated and of real semantics (B, C, g, g) with their class, by a linear probe of others."""
    numbers = chosen(latents, labels)
    others = np.setdiff1d(np.arange(len(latents)), numbers)
    known, labels_known = semantic_latents(latents, others), latents.labels[torch.from_numpy(others)]
    probe = Linear(known.flatten(1).numpy(), labels_known.numpy(), len(latents.manifest.classes))
    parts = {"own": generated, "of real images": semantic_latents(latents, numbers)}
    found = {name: probe(part.flatten(1).numpy()).argmax(axis=1) for name, part in parts.items()}
    return {name: float((classes == np.asarray(labels)).mean()) for name, classes in found.items()}


def measure(study: Study, arm: Arm, seed: int) -> list[dict[str, Any]]:
    """One row per kind of semantics of a trained arm; what was measured before is read."""
    path = study.folder / "semantics" / f"{arm.name}.seed-{seed}.json"
    if path.exists():
        return list(files.read_json(path, "measurement")["rows"])
    model, latents = study.train(arm, seed), LatentSet(study.parts(arm).folder.latents)
    early = study.early(model, arm, seed)
    labels, seeds, settings = study.sampling(model, seed, {})
    others = range(seeds[-1] + 1, seeds[-1] + 1 + len(labels))  # noise of texture, where semantics had theirs

    def generated(by: Model, guiding: Model | None = None) -> Tensor:
        how = settings if guiding is None else settings.model_copy(update={"guidance": WEAK[-1]} | FROM_WEAK)
        batches = by.sample_batches(labels, seeds, how, guiding=guiding)
        return by.composite.unpack(torch.cat([batch.latents for batch in batches]))[SEMANTIC]

    own = generated(model)
    ways = {
        "own": (model, own),
        "of real images": (model, semantic_latents(latents, chosen(latents, labels))),
        f"own, AutoGuidance at {WEAK[-1]:g}": (model, generated(model, early)),
        "of the early network": (model, generated(early)),
        "own, texture of the early network": (early, own),
    }
    right, found = class_accuracy(latents, own, labels), []
    for name, (texture, semantics) in ways.items():
        images = texture.decode(on_semantics(texture, semantics, labels, others, settings))
        seen = evaluate(images, labels, study.reference, name=name)
        low, high = seen.intervals[SHOWN[0]]
        row = {"arm": path.stem, "semantics": name} | {metric: getattr(seen, metric) for metric in SHOWN}
        row |= {"interval_of_the_distance": f"{low:.3g} to {high:.3g}", "share_of_classes_right": right.get(name)}
        found.append(row)
    files.write_json(path, {"rows": found})
    return found


def work(study: Study, listed: list[Arm], seeds: int, _: str) -> None:
    """Measure all seeds of the arms that have a semantic stream."""
    for arm in [arm for arm in listed if SEMANTIC in study.recipe(arm).streams]:
        for seed in range(seeds):
            say(f"{arm.name}, seed {seed}: {measure(study, arm, seed)}")


def main(arguments: list[str] | None = None) -> None:
    command.run("benchmarks.study.semantics", __doc__, work, arguments)


if __name__ == "__main__":
    main()
