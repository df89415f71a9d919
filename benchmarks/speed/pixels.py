"""Convolutions: where channels lie in memory, and how many images the texture decoder takes at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from sfd.generation.generate import decode
from torch import nn

from benchmarks.speed.measuring import ROOT, Row, Setting, best_times, working_memory
from sfd.data.shapes import ShapesSource
from sfd.encoders import autoencoder_kl, convnet, kl
from sfd.generation.model import load_model
from sfd.sampling import initial_noise
from sfd.training.tasks.semantic import SemanticObjective, SemanticTask
from sfd.training.tasks.texture import TextureObjective, TextureTask

IMAGES = 128
CHUNKS = (8, 16, 32, 64, 128)
LAYOUTS = {"first": torch.contiguous_format, "last": torch.channels_last}


def decoding(setting: Setting) -> list[Row]:
    """Images a second of the demo's decoder, and its working memory, by the number that it takes at a time."""
    model = load_model(ROOT / "models" / "shapes", setting.device)
    noise = initial_noise(range(IMAGES), model.composite).to(setting.device)
    rows = []
    for precision in ("float32", "bf16"):
        ways = {str(n): partial(decode, model, noise, precision, at_once=n) for n in CHUNKS}
        times = best_times(ways, setting.repeats, setting.device)
        for at_once, way in ways.items():
            row = {"precision": precision, "at_once": at_once, "images_per_second": IMAGES / times[at_once]}
            rows.append(row | {"working_bytes": working_memory(way, setting.device)})
    return rows


def layouts(setting: Setting) -> list[Row]:
    """Images a second with channels first and channels last in memory."""
    rows = []
    for what, batch, make in _convolutional(setting):
        for precision in ("float32", "bf16"):
            ways = {name: make(layout, precision == "bf16") for name, layout in LAYOUTS.items()}
            times = best_times(ways, setting.repeats, setting.device)
            row = {"what": what, "batch": batch, "precision": precision}
            row |= {f"channels_{name}": batch / seconds for name, seconds in times.items()}
            rows.append(row | {"ratio": times["first"] / times["last"]})
    return rows


def _convolutional(
    setting: Setting,
) -> Iterator[tuple[str, int, Callable[[torch.memory_format, bool], Callable[[], Any]]]]:
    """Name each case with its batch, and a function that makes a call of a memory format, in bf16 or not."""
    device = setting.device
    demo = load_model(ROOT / "models" / "shapes", device).texture
    published = kl.build(kl.Config()).to(device).eval().requires_grad_(False)
    for what, decoder, batch, grid in (("the demo's decoder", demo, 32, 4), ("decoder f16d32", published, 1, 16)):
        if decoder is published and setting.quick:
            continue  # ten seconds an image on a CPU
        latents = torch.randn(batch, decoder.channels, grid, grid, device=device)
        yield f"{what}", batch, partial(_decoded, decoder, latents, device)
    source = ShapesSource(2000, seed=0)
    encoder, objective = autoencoder_kl.build(autoencoder_kl.Config()), TextureObjective()
    texture = TextureTask(encoder, source, objective, seed=0, batch_size=64)
    learner = convnet.build(convnet.Config())
    semantic = SemanticTask(learner, source, SemanticObjective(), seed=0, batch_size=64)
    yield "training the texture encoder", 64, partial(_trained, texture, device)
    yield "training the semantic encoder", 64, partial(_trained, semantic, device)


def _decoded(
    decoder: Any, latents: torch.Tensor, device: torch.device, layout: torch.memory_format, bf16: bool
) -> Callable[[], Any]:
    decoder, latents = copy.deepcopy(decoder).to(memory_format=layout), latents.to(memory_format=layout)

    def call() -> None:
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, bf16):
            decoder.decode(latents)

    return call


def _trained(
    task: TextureTask | SemanticTask, device: torch.device, layout: torch.memory_format, bf16: bool
) -> Callable[[], Any]:
    network: nn.Module = copy.deepcopy(task.model).to(device).to(memory_format=layout)
    batch = {name: value.to(device) for name, value in task.batch(0, range(task.data.batch_size)).items()}
    batch["images"] = batch["images"].to(memory_format=layout)

    def call() -> None:
        with torch.autocast(device.type, torch.bfloat16, bf16):
            loss = task.loss(network, batch)["loss"]
        loss.backward()
        network.zero_grad(set_to_none=True)

    return call
