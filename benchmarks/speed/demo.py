"""The demo's latents, made once: tokenizers are trained for two steps, as speed does not depend on their weights."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from benchmarks.speed.measuring import ROOT

RECIPE = ROOT / "recipes" / "shapes-demo.yaml"
FEW = [f"{part}.train.steps=2" for part in ("texture", "semantic", "compressor")]
DATA = ["data.count=2000"]


def stage(command: str, folder: Path, *overrides: str) -> None:
    """Run one stage of the demo's recipe in a folder; one that is done is not done again."""
    arguments = [command, str(RECIPE), *FEW, *DATA, *overrides, "--out", str(folder), "--device", "cpu"]
    subprocess.run([sys.executable, "-m", "sfd", *arguments], check=True, capture_output=True)


def prepared(folder: Path) -> Path:
    """Make everything that the demo's transformer is trained on; give the run's folder."""
    for command in ("train-texture", "train-semantic", "train-semvae", "prepare"):
        stage(command, folder)
    return folder
