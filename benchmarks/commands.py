"""Whole commands: start-up, the demo's training loop, and what checkpoints cost."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

from benchmarks.demo import command, prepared, stage
from benchmarks.measure import MODEL, Row, Setting, network
from sfd.training.checkpoint import CheckpointWriter
from sfd.training.config import TrainSettings
from sfd.utils.errors import SFDError

PARTS = ("model", "average", "exp_avg", "exp_avg_sq")
BATCH = 8
CONSTANT = ("train.decay=constant", "train.decay_from=0")  # a few steps have no decay


def start_up(setting: Setting) -> list[Row]:
    """Seconds of commands, from a cold start of Python."""
    image = ["sample", str(MODEL), "--classes", "ring", "--seeds", "0", "--device", str(setting.device), "--out"]
    rows = []
    for what, arguments in (("sfd --help", ["--help"]), ("sfd sample, one image", image)):
        times = []
        for turn in range(3):
            extra = [str(setting.out / f"image-{time.time_ns()}-{turn}")] if arguments is image else []
            start = time.perf_counter()
            subprocess.run(
                [sys.executable, "-m", "sfd", *arguments, *extra], check=True, capture_output=True, text=True
            )
            times.append(time.perf_counter() - start)
        rows.append({"what": what, "seconds": min(times)})
    return rows


def loop(setting: Setting) -> list[Row]:
    """The demo's training through `sfd train`: its speed, and the share of the time that it waited for batches."""
    steps = 40 if setting.quick else 200
    folder = _untrained(setting)
    settings = (f"train.steps={steps}", f"train.log_every={steps // 4}", "train.preview_every=0", *CONSTANT)
    stage("train", folder, *settings, device=str(setting.device))
    lines = _log(folder)[1:]
    return [{name: median(line[name] for line in lines) for name in ("images_per_second", "waiting")}]


def checkpoints(setting: Setting) -> list[Row]:
    """Bytes, pause and time to write of a checkpoint; seconds from a command's start to its first resumed step."""
    sizes = dict.fromkeys(size for size, _ in setting.given) or (("tiny",) if setting.quick else ("tiny", "S", "B"))
    return [{"size": size} | _saved(size, setting) | {"resumed_seconds": _resumed(size, setting)} for size in sizes]


def _saved(size: str, setting: Setting) -> Row:
    """Save what a run of this size is: weights, EMA, and two moments per weight."""
    net, folder = network(size).to(setting.device), setting.out / f"checkpoints-{size}"
    shutil.rmtree(folder, ignore_errors=True)
    state = {f"{part}.{name}": value.detach().clone() for part in PARTS for name, value in net.named_parameters()}
    settings = TrainSettings(steps=1, batch_size=1, learning_rate=1.0, keep_checkpoints=1)
    writer = CheckpointWriter(folder, settings)
    times = []
    for step in range(4):  # the first one also allocates the copy
        pause = writer.save(step, state, {})
        start = time.perf_counter()
        writer.wait()
        times.append((pause, time.perf_counter() - start))
    size_in_bytes = max(folder.glob("step-*")).stat().st_size
    shutil.rmtree(folder)
    pause, writing = (min(column) for column in zip(*times[1:], strict=True))
    return {"checkpoint_bytes": size_in_bytes, "pause_milliseconds": 1e3 * pause, "writing_seconds": writing}


def _resumed(size: str, setting: Setting) -> float:
    """Train the demo's latents for two steps; seconds from the start of the next command to its first step."""
    folder, device = _untrained(setting), str(setting.device)
    settings = (f"transformer.size={size}", f"train.batch_size={BATCH}", "train.log_every=1", "train.preview_every=0")
    settings += CONSTANT
    stage("train", folder, "train.steps=2", *settings, device=device)
    start = time.monotonic()
    again = command("train", folder, "train.steps=3", *settings, device=device)
    process = subprocess.Popen(again, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while _log(folder)[-1]["step"] < 3:
        if process.poll() is not None and _log(folder)[-1]["step"] < 3:
            raise SFDError(f"`{' '.join(again)}` ended with code {process.returncode} and took no step")
        time.sleep(0.01)
    seconds = time.monotonic() - start
    process.wait()
    return seconds


def _untrained(setting: Setting) -> Path:
    """The demo's run with its latents and no transformer."""
    folder = prepared(setting.out / "demo")
    for name in ("training", "model"):
        shutil.rmtree(folder / name, ignore_errors=True)
    return folder


def _log(folder: Path) -> list[Row]:
    lines = (folder / "training" / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line.endswith("}")]
