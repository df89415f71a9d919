"""Recipes, models, images and checkpoints made to do harm: refused in a sentence, quickly, in little memory."""

from __future__ import annotations

import json
import os
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image

from faults.commands import Failure
from faults.runs import Place
from faults.scenarios import Scenario

MEMORY, SECONDS = 1.5e9, 10.0
MANY = 2**50


def refused(make: Callable[[Place], list[object]]) -> Callable[[Place], str]:
    """Give a command something hostile; nothing may come of it but a sentence."""

    def attempt(place: Place) -> str:
        canary = place.folder / "canary"
        canary.write_text("alive")
        arguments = make(place)
        around = set(place.folder.iterdir())
        ended = place.do(arguments).refused()
        new = {path.name for path in place.folder.iterdir()} - {path.name for path in around}
        if canary.read_text() != "alive" or any(not n.startswith(("output", "out", "samples")) for n in new):
            raise Failure(f"something was written where nothing should be: {sorted(new)}")
        if ended.peak_bytes > MEMORY or ended.seconds > SECONDS:
            raise Failure(f"took {ended.peak_bytes / 1e9:.1f} GB and {ended.seconds:.0f} s")
        return ended.message

    return attempt


def recipe(text: str | Callable[[Place], str]) -> Callable[[Place], list[object]]:
    """Train by a recipe of this text."""

    def make(place: Place) -> list[object]:
        path = place.folder / "hostile.yaml"
        path.write_text(text if isinstance(text, str) else text(place))
        return ["run", path, "--out", place.out, "--device", "cpu"]

    return make


def laughs(place: Place) -> str:
    """Nine aliases of nine aliases of …: a few lines that stand for 10⁹ values."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)]
    return "\n".join(lines)


def model(change: Callable[[Path], None]) -> Callable[[Place], list[object]]:
    """Sample from a model directory that was changed."""

    def make(place: Place) -> list[object]:
        folder = place.folder / "model"
        shutil.copytree(place.reference / "model", folder)
        change(folder)
        return ["sample", folder, "--out", place.folder / "samples", "--steps", 3, "--device", "cpu"]

    return make


def record(**transformer: int) -> Callable[[Path], None]:
    """Let model.json ask for a network of other numbers."""

    def change(folder: Path) -> None:
        values = json.loads((folder / "model.json").read_text())
        values.pop("checksum", None)
        values["transformer"] |= transformer
        (folder / "model.json").write_text(json.dumps(values))

    return change


def encoder(folder: Path) -> None:
    """Let the texture encoder's configuration ask for 2⁴⁰ channels."""
    values = json.loads((folder / "texture" / "config.json").read_text())
    values.pop("checksum", None)
    values["config"]["widths"] = [2**40, 2**40]
    (folder / "texture" / "config.json").write_text(json.dumps(values))


def header(folder: Path) -> None:
    """Declare a tensor of 2⁵⁰ numbers."""
    text = json.dumps({"x": {"dtype": "F32", "shape": [MANY], "data_offsets": [0, 4 * MANY]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(64))


def long_header(folder: Path) -> None:
    """Declare a header of 2⁶⁰ bytes."""
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 2**60) + b"{}")


def nested(folder: Path) -> None:
    """Nest model.json a hundred thousand deep."""
    (folder / "model.json").write_text('{"a":' * 100_000 + "1" + "}" * 100_000)


def schedule(folder: Path) -> None:
    """Name a schedule that is a path."""
    values = json.loads((folder / "model.json").read_text())
    values.pop("checksum", None)
    values["schedule"] = {"name": "../../os"}
    (folder / "model.json").write_text(json.dumps(values))


class Code:
    """Pickled, it runs a command where it is read."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"echo dead > {self.canary}",)


def pickled(place: Place) -> list[object]:
    """Convert a checkpoint that carries code."""
    path = place.folder / "checkpoint.pt"
    torch.save({"model": Code(place.folder / "canary")}, path)
    return ["convert", path, place.out]


def shard_elsewhere(place: Place) -> list[object]:
    """Name a shard outside of the folder in the manifest."""
    out = place.before("train")
    path = out / "latents" / "manifest.json"
    values = json.loads(path.read_text())
    values.pop("checksum", None)
    values["shards"][0]["file"] = "../../canary.safetensors"
    path.write_text(json.dumps(values))
    return place.run("train")


def linked_model(place: Place) -> list[object]:
    """Let a run's `model` be a link to somebody's folder, which training would replace."""
    out = place.before("train")
    (out / "model").symlink_to(place.folder / "precious")
    (place.folder / "precious").mkdir()
    (place.folder / "precious" / "file").write_text("alive")
    return place.run("train")


def images(make: Callable[[Path], None]) -> Callable[[Place], list[object]]:
    """Train on images that were changed; a broken one is an error under `--strict`."""

    def prepared(place: Place) -> list[object]:
        folder = place.folder / "images"
        folder.mkdir()
        for i in range(3):
            Image.new("RGB", (8, 8)).save(folder / f"{i}.png")
        make(folder)
        source = next(folder.glob("*.zip"), folder)
        return place.run("train-texture", f"data.source={source}", "--strict")

    return prepared


def link_to(target: str) -> Callable[[Path], None]:
    """Link an image to something."""
    return lambda folder: (folder / "3.png").symlink_to(target)


def link_to_pipe(folder: Path) -> None:
    """Link an image to a pipe."""
    os.mkfifo(folder.parent / "pipe")
    (folder / "3.png").symlink_to(folder.parent / "pipe")


def loops(folder: Path) -> None:
    """Link twelve folders to one another: 12! ways to walk through them, and no image."""
    for path in folder.iterdir():
        path.unlink()
    for i in range(12):
        (folder / f"{i}").mkdir()
    for i in range(12):
        for j in range(12):
            (folder / f"{i}" / f"to-{j}").symlink_to(folder / f"{j}")


def huge_image(folder: Path) -> None:
    """Declare 100 000 × 100 000 pixels."""
    data = bytearray((folder / "0.png").read_bytes())
    data[16:24] = struct.pack(">II", 100_000, 100_000)
    (folder / "3.png").write_bytes(data)


def bomb(folder: Path) -> None:
    """Pack 900 MB of zeros into 4 MB, twice."""
    with zipfile.ZipFile(folder / "bomb.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for i in range(2):
            with archive.open(f"{i}.png", "w", force_zip64=True) as member:
                for _ in range(900):
                    member.write(bytes(1 << 20))


def climbing(folder: Path) -> None:
    """Name members `../…`."""
    with zipfile.ZipFile(folder / "climbing.zip", "w") as archive:
        archive.writestr("../../canary", "dead")


MAKERS: dict[str, tuple[Callable[[Place], list[object]], bool]] = {
    "a recipe that extends `/etc/passwd`": (recipe("extends: /etc/passwd"), False),
    "a recipe that extends itself": (recipe("extends: hostile.yaml"), False),
    "a recipe nested 100 000 deep": (recipe("a: " + "[" * 100_000), True),
    "a recipe of aliases of aliases (“billion laughs”)": (recipe(laughs), True),
    "a recipe that contains itself": (recipe("a: &a [*a]"), False),
    "a recipe that calls Python": (recipe("a: !!python/object/apply:os.system [ls]"), False),
    "a recipe with a number of 5 000 digits": (recipe(f"seed: {'9' * 5000}"), False),
    "an encoder whose name is a path": (recipe("texture: {name: ../../os}"), False),
    "a model of 2⁵⁰ width": (model(record(width=MANY)), True),
    "a model of 2⁴⁰ blocks": (model(record(depth=2**40)), True),
    "a model of 2⁴⁰ classes": (model(record(num_classes=2**40)), False),
    "a texture encoder of 2⁴⁰ channels": (model(encoder), False),
    "weights that declare 2⁵⁰ numbers": (model(header), True),
    "weights that declare a header of 2⁶⁰ bytes": (model(long_header), False),
    "a model record nested 100 000 deep": (model(nested), True),
    "a schedule whose name is a path": (model(schedule), False),
    "a checkpoint that is a pickle with code": (pickled, True),
    "a manifest that names a shard outside": (shard_elsewhere, False),
    "a run whose `model` is a link to another folder": (linked_model, False),
    "an image that is a link to `/dev/zero`": (images(link_to("/dev/zero")), True),
    "an image that is a link to a pipe": (images(link_to_pipe), False),
    "an image that is a link to itself": (images(link_to("3.png")), False),
    "twelve folders linked to one another": (images(loops), True),
    "an image of 100 000 × 100 000 pixels": (images(huge_image), False),
    "a zip bomb of images": (images(bomb), False),
    "a zip with `..` in its names": (images(climbing), True),
}

SCENARIOS = [Scenario(fault, refused(make), quick=quick) for fault, (make, quick) in MAKERS.items()]
