"""The demo's latents, made once: tokenizers are trained for two steps, as speed does not depend on their weights."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from benchmarks.speed.measuring import ROOT

RECIPE = ROOT / "recipes" / "shapes-demo.yaml"
FEW = [f"{part}.train.steps=2" for part in ("texture", "semantic", "compressor")]
DATA = ["data.count=2000"]


def command(name: str, folder: Path, *overrides: str, device: str = "cpu") -> list[str]:
    """Give the command line of one stage of the demo's recipe in a folder."""
    arguments = [name, str(RECIPE), *FEW, *DATA, *overrides, "--out", str(folder), "--device", device]
    return [sys.executable, "-m", "sfd", *arguments]


def stage(name: str, folder: Path, *overrides: str, device: str = "cpu") -> None:
    """Run one stage of the demo's recipe in a folder; one that is done is not done again."""
    subprocess.run(command(name, folder, *overrides, device=device), check=True, capture_output=True, text=True)


def prepared(folder: Path) -> Path:
    """Make everything that the demo's transformer is trained on; give the run's folder."""
    if (folder / "latents" / "manifest.json").exists():
        return folder
    for name in ("train-texture", "train-semantic", "train-semvae", "prepare"):
        stage(name, folder)
    return folder
