"""Whole commands: how long they take to start, and how fast the demo trains."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from statistics import median

from benchmarks.speed.demo import prepared, stage
from benchmarks.speed.measuring import ROOT, Row, Setting


def start_up(setting: Setting) -> list[Row]:
    """Seconds of commands, from a cold start of Python."""
    image = ["sample", str(ROOT / "models" / "shapes"), "--classes", "ring", "--seeds", "0"]
    image += ["--device", str(setting.device), "--out"]
    rows = []
    for what, command in (("sfd --help", ["--help"]), ("sfd sample, one image", image)):
        times = []
        for turn in range(3):
            extra = [str(setting.out / f"image-{time.time_ns()}-{turn}")] if command is image else []
            start = time.perf_counter()
            subprocess.run([sys.executable, "-m", "sfd", *command, *extra], check=True, capture_output=True, text=True)
            times.append(time.perf_counter() - start)
        rows.append({"what": what, "seconds": min(times)})
    return rows


def loop(setting: Setting) -> list[Row]:
    """The demo's training through `sfd train`: its speed, and the share of the time that it waited for batches."""
    steps = 40 if setting.quick else 200
    folder = prepared(setting.out / "demo")
    for made in ("training", "model"):
        shutil.rmtree(folder / made, ignore_errors=True)
    settings = (f"train.steps={steps}", f"train.log_every={steps // 4}", "train.preview_every=0")
    stage("train", folder, *settings, device=str(setting.device))
    lines = [json.loads(line) for line in (folder / "training" / "log.jsonl").read_text().splitlines()]
    return [{name: median(line[name] for line in lines[1:]) for name in ("images_per_second", "waiting")}]
