"""`sfd explore`: serve the explorer's page, or write it as one file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from sfd.cli.sample import asked_labels, parse_seeds, sample_settings
from sfd.explorer import serve, static_page
from sfd.explorer.page import is_page
from sfd.generation.directory import model_folder
from sfd.generation.model import load_model
from sfd.utils import files
from sfd.utils.device import choose_device
from sfd.utils.errors import SFDError


def explore_model(
    model: Path,
    overrides: Sequence[str],
    port: int,
    static: Path | None,
    classes: str | None,
    seeds: str | None,
    device: str,
    **options: Any,
) -> None:
    """Serve the page, or write it to a file; see `sfd explore --help`."""
    if static is None and (classes is not None or seeds is not None):
        raise SFDError("--classes and --seeds choose the samples of --static; the served page has controls for them")
    if static is not None:
        if static.suffix not in (".html", ".htm"):
            raise SFDError(f"--static {static} must end in .html, or a browser shows its text")
        files.check_replaceable(static, is_page, "a page of the explorer")
    loaded = load_model(model_folder(model), choose_device(device))
    settings = sample_settings(loaded, overrides, **options).model_dump(mode="json")
    name = model.resolve().name
    if static is None:
        serve(loaded, name, port, lambda address: click.echo(f"{address}  (Ctrl-C ends it)"), **settings)
        return
    labels, chosen = asked_labels(loaded, classes or "all"), parse_seeds(seeds or "0")
    samples = [(label, seed) for label in labels for seed in chosen]
    files.write_text(static, static_page(loaded, samples, name, **settings))
    click.echo(f"{static}")
