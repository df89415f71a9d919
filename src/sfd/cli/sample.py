"""`sfd sample`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from sfd.data.classes import parse_classes
from sfd.generation.config import SamplingConfig
from sfd.generation.directory import model_folder
from sfd.generation.folder import write_grid, write_samples
from sfd.generation.model import Model, load_model
from sfd.run.values import apply_override
from sfd.utils import distributed
from sfd.utils.config import parse
from sfd.utils.device import choose_device
from sfd.utils.distributed import local_device
from sfd.utils.errors import SFDError


def sample_images(
    model: Path,
    out: Path,
    classes: str,
    seeds: str,
    in_turn: bool,
    guiding_model: Path | None,
    device: str,
    overrides: Sequence[str],
    **options: Any,
) -> None:
    """Sample each class with each seed, or the classes in turn, into a folder; see `sfd sample --help`."""
    chosen_seeds = parse_seeds(seeds)
    where = choose_device(local_device(device))
    loaded = load_model(model_folder(model), where)
    guiding = load_model(model_folder(guiding_model), where) if guiding_model else None
    source = "guiding_model" if guiding_model else None
    settings = sample_settings(loaded, overrides, guidance_from=source, **options)
    labels = asked_labels(loaded, classes)
    if in_turn:
        pairs = [(labels[i % len(labels)], seed) for i, seed in enumerate(chosen_seeds)]
    else:
        pairs = [(label, seed) for label in labels for seed in chosen_seeds]
    labels_of, seeds_of = [label for label, _ in pairs], [seed for _, seed in pairs]
    missing = write_samples(out, loaded, labels_of, seeds_of, settings, guiding=guiding)
    if missing:
        click.echo(f"rank {distributed.rank()} is done; {missing} of {len(pairs)} images in {out} are not made yet")
        return
    shown = write_grid(out, labels_of, loaded.classes)
    part = f"; grid.png shows {shown} of them" if shown < len(pairs) else ""
    click.echo(f"{len(pairs)} images in {out}{part}")


def asked_labels(model: Model, classes: str) -> list[int]:
    """Look up classes by name or number, comma-separated, or "all"."""
    if classes == "all":
        return model.labels
    return parse_classes(classes, model.classes) if model.classes else model.class_indices(classes)


def sample_settings(model: Model, overrides: Sequence[str], **options: Any) -> SamplingConfig:
    """The model's own settings, changed by options and by FIELD=VALUE."""
    values = model.sampling.model_dump(mode="json")
    given = {name: value for name, value in options.items() if value is not None}
    if given.get("solver", values["solver"]) != values["solver"]:
        values["options"] = {}  # those of another solver
    values |= given
    for override in overrides:
        apply_override(values, override, SamplingConfig)
    return parse(SamplingConfig, values, "sfd sample")


def parse_seeds(text: str) -> list[int]:
    """Read "0-63", "1,5,9" or a mixture."""
    seeds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if not match or (match[2] and int(match[2]) < int(match[1])):
            raise SFDError(f"--seeds {text!r}: {part!r} is not a seed; give numbers ≥ 0, such as 0-63 or 1,5,9")
        seeds.extend(range(int(match[1]), int(match[2] or match[1]) + 1))
    return seeds
