"""`sfd distill`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import click

from sfd.generation.directory import model_folder
from sfd.generation.model import load_model
from sfd.run.distill import SETTINGS, distill, read_settings
from sfd.training.trainer import check_settings
from sfd.utils import distributed, files, signals
from sfd.utils.device import choose_device
from sfd.utils.errors import SFDError


def distill_model(
    model: Path, overrides: Sequence[str], out: Path, guiding_model: Path | None, max_hours: float | None, device: str
) -> None:
    """Distil MODEL into the run's folder `out`; see `sfd distill --help`."""
    where = choose_device(distributed.init(device))
    teacher = load_model(model_folder(model), where)
    guiding = load_model(model_folder(guiding_model), where) if guiding_model else None
    settings = read_settings(teacher, overrides, **({"guidance_from": "guiding_model"} if guiding else {}))
    check_settings(settings.train, where)
    others = out.is_dir() and any(not item.name.startswith(".") for item in out.iterdir())
    if others and not (out / SETTINGS).exists():
        raise SFDError(f"{out} holds other files than those of sfd distill; give another --out folder")
    with ExitStack() as held:
        held.enter_context(signals.limit(max_hours))
        if distributed.is_main_process():
            held.enter_context(files.exclusive(out))
        distributed.broadcast(None)  # the folder is this run's
        distill(teacher, settings, out, guiding)
    distributed.shutdown()
    if distributed.is_main_process():
        click.echo(f"{out / 'model'}")
