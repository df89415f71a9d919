"""What a checkpoint costs training, and how long a resumed run takes to its first step.

    python benchmarks/checkpoints.py FOLDER [--sizes tiny S B]

Makes a small run of the shapes in FOLDER, then trains a transformer of each size for a few steps,
with a checkpoint every fifth, and goes on for one more. The pause is the median of the log's `checkpoint_pause`;
the time to resume is that from the start of the process to the line of its first step.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

RECIPE = Path(__file__).parent.parent / "recipes" / "shapes-demo.yaml"
FEW = [f"{part}.train.steps=5" for part in ("texture", "semantic", "compressor")]
STEPS, EVERY = 30, 5


def command(stage: str, out: Path, *overrides: str) -> list[str]:
    data = ("data.count=600", "evaluation.classifier=null", *FEW)
    return [sys.executable, "-m", "sfd", stage, str(RECIPE), "--out", str(out), *data, *overrides]


def lines(out: Path) -> list[dict[str, float]]:
    path = out / "training" / "log.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []


def measure(out: Path, size: str) -> str:
    for name in ("training", "model"):
        shutil.rmtree(out / name, ignore_errors=True)
    settings = (f"transformer.size={size}", "train.batch_size=8", "train.log_every=1", "train.preview_every=0")
    settings += (f"train.checkpoint_every={EVERY}", "train.decay=constant")
    subprocess.run(command("train", out, f"train.steps={STEPS}", *settings), check=True, stderr=subprocess.DEVNULL)
    seen = lines(out)
    pause = statistics.median(line["checkpoint_pause"] for line in seen if "checkpoint_pause" in line)
    step = statistics.median(8 / line["images_per_second"] for line in seen if "checkpoint_pause" not in line)
    newest = max((out / "training" / "checkpoints").glob("step-*"))
    megabytes = sum(path.stat().st_size for path in newest.iterdir()) / 1e6
    start = time.monotonic()
    again = command("train", out, f"train.steps={STEPS + 1}", *settings)
    process = subprocess.Popen(again, stderr=subprocess.DEVNULL)
    while lines(out)[-1]["step"] <= STEPS and process.poll() is None:
        time.sleep(0.01)
    resumed = time.monotonic() - start
    process.wait()
    return f"| {size} | {megabytes:.0f} | {1e3 * step:.0f} | {1e3 * pause:.1f} | {resumed:.1f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sizes", nargs="+", default=["tiny", "S", "B"])
    options = parser.parse_args()
    for stage in ("train-texture", "train-semantic", "train-semvae", "prepare"):
        subprocess.run(command(stage, options.folder), check=True, stderr=subprocess.DEVNULL)
    print("| size | checkpoint, MB | step of 8 images, ms | pause, ms | start to first resumed step, s |")
    print("|---|---|---|---|---|")
    for size in options.sizes:
        print(measure(options.folder, size), flush=True)


if __name__ == "__main__":
    main()
