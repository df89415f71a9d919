"""What a checkpoint costs training, and how long a resumed run takes to its first step."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from pathlib import Path

from benchmarks.speed.demo import command, prepared, stage
from benchmarks.speed.measuring import Row, Setting, network
from sfd.training.checkpoint import Writer
from sfd.training.config import TrainSettings
from sfd.utils.errors import SFDError

PARTS = ("model", "average", "exp_avg", "exp_avg_sq")
BATCH = 8


def checkpoints(setting: Setting) -> list[Row]:
    """Bytes, pause and time to write of a checkpoint; time from the start of a command to its first resumed step."""
    folder = prepared(setting.out / "demo")
    sizes = dict.fromkeys(size for size, _ in setting.asked) or (("tiny",) if setting.quick else ("tiny", "S", "B"))
    return [
        {"size": size} | saved(size, setting) | {"resumed_seconds": resumed(size, folder, str(setting.device))}
        for size in sizes
    ]


def saved(size: str, setting: Setting) -> Row:
    """Save what a run of this size is: weights, average, and two moments of each weight."""
    made, folder = network(size).to(setting.device), setting.out / f"checkpoints-{size}"
    shutil.rmtree(folder, ignore_errors=True)
    state = {f"{part}.{name}": value.detach().clone() for part in PARTS for name, value in made.named_parameters()}
    settings = TrainSettings(steps=1, batch_size=1, learning_rate=1.0, keep_checkpoints=1)
    writer = Writer(folder, settings, sharded=False)
    times = []
    for step in range(4):  # the first one also makes room for the copy
        pause = writer.save(step, state, {"good": True})
        start = time.perf_counter()
        writer.wait()
        times.append((pause, time.perf_counter() - start))
    newest = max(folder.glob("step-*"))
    size_in_bytes = sum(path.stat().st_size for path in newest.iterdir())
    shutil.rmtree(folder)
    pause, writing = (min(column) for column in zip(*times[1:], strict=True))
    return {"checkpoint_bytes": size_in_bytes, "pause_milliseconds": 1e3 * pause, "writing_seconds": writing}


def resumed(size: str, folder: Path, device: str) -> float:
    """Train the demo's latents for two steps; give the seconds from the start of the next command to its first step."""
    for name in ("training", "model"):
        shutil.rmtree(folder / name, ignore_errors=True)
    settings = (f"transformer.size={size}", f"train.batch_size={BATCH}", "train.log_every=1", "train.preview_every=0")
    settings += ("train.decay=constant", "train.decay_from=0")
    stage("train", folder, "train.steps=2", *settings, device=device)
    start = time.monotonic()
    again = command("train", folder, "train.steps=3", *settings, device=device)
    process = subprocess.Popen(again, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while _last_step(folder) < 3:
        if process.poll() not in (None, 0):
            raise SFDError(f"`{' '.join(again)}` ended with code {process.returncode}; run it to see why")
        time.sleep(0.01)
    seconds = time.monotonic() - start
    process.wait()
    return seconds


def _last_step(folder: Path) -> int:
    lines = (folder / "training" / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return max(json.loads(line)["step"] for line in lines if line.endswith("}"))
