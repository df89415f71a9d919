"""Numbers that are not finite: in the data, in the weights, in the gradient."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch

from faults.commands import Failure
from faults.runs import Place, Scenario
from sfd.data.shards import read_header
from sfd.utils import files


def poison(latents: Path, images: int) -> None:
    """Turn the first images of each shard into NaN."""
    for path in sorted(latents.glob("shard-*")):
        tensors = files.read_tensors(path)
        for name in ("texture", "texture_flip"):
            tensors[name][:images] = torch.nan
        files.write_tensors(path, tensors, read_header(path).metadata)


def some_images(place: Place) -> str:
    """Train on latents of which one in twenty-five is NaN: those steps change nothing and are counted."""
    out = place.before("train")
    poison(out / "latents", 1)
    for whole in sorted((place.reference / "latents").glob("shard-*"))[1::2]:  # every second shard is left whole
        (out / "latents" / whole.name).write_bytes(whole.read_bytes())
    place.do(place.run("train")).succeeded()
    last = json.loads((out / "training" / "log.jsonl").read_text().splitlines()[-1])
    tensors = files.read_tensors(out / "model" / "model.safetensors")
    if not last["skipped"] or not all(bool(t.isfinite().all()) for t in tensors.values()):
        raise Failure(f"{last['skipped']} steps were skipped; the weights should be finite")
    return f"`skipped`: {last['skipped']} in the log, of 20 steps; the weights are finite"


def every_step(*overrides: str, all_images: bool = False) -> Callable[[Place], str]:
    """Make every step fail: training stops with a sentence, each time, and writes no model."""

    def attempt(place: Place) -> str:
        out = place.before("train")
        if all_images:
            poison(out / "latents", 10)
        work = place.run("train", "train.steps=200", "train.max_skipped=10", *overrides)
        again = [place.do(work).refused("the gradient was not finite") for _ in range(2)][-1]
        if (out / "model").exists():
            raise Failure("no model should be written")
        return again.message

    return attempt


SCENARIOS = [
    Scenario("NaN in some of the batches", some_images, 2),
    Scenario("NaN in every batch", every_step(all_images=True), 1),
    Scenario("weights that become infinite", every_step("train.learning_rate=1.0e+38"), 1),
    Scenario("gradients that overflow", every_step("streams.texture.weight=1.0e+38"), 1),
]
