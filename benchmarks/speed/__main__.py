"""How fast sampling, training, loading and starting are, each beside a plain float32 path of the same network.

    python -m benchmarks.speed [--quick] [--only sampling,training] [--device auto] [--out runs/benchmarks/speed]

Ways that are compared run in turn (A B A B …) in one process on the same inputs; the best of several times counts, so
that a busy machine does not favour one. Prints Markdown tables and writes speed.json and speed.png. Networks have
random weights, as times do not depend on them; velocity errors are those of the demo model, which is trained.
On a GPU the larger sizes run, and guided sampling beside the published settings. docs/performance.md explains; with
--publish the tables of the sections that ran are written anew.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.speed import (
    attention,
    checkpoints,
    commands,
    error_sources,
    loader,
    memory,
    optimizer,
    overhead,
    pairs,
    pixels,
    quality,
    sampling,
    training,
)
from benchmarks.speed.measuring import Row, Setting, machine
from benchmarks.speed.report import draw, publish, table
from sfd.errors import SFDError
from sfd.models.transformer import SIZES
from sfd.resources import choose_device


class Section(NamedTuple):
    """What measures one table, and when it is left out."""

    rows: Callable[[Setting], list[Row]]
    long: bool = False  # not with --quick
    cuda: bool = False  # only on a GPU


SECTIONS = {
    "sampling": Section(sampling.sampling),
    "errors": Section(sampling.errors),
    "error_sources": Section(error_sources.error_sources),
    "training": Section(training.training),
    "optimizer": Section(optimizer.optimizer),
    "overhead": Section(overhead.overhead),
    "memory": Section(memory.memory, long=True),
    "checkpointing": Section(memory.checkpointing, long=True),
    "accumulation": Section(memory.accumulation, long=True),
    "paired": Section(pairs.paired),
    "decoding": Section(pixels.decoding),
    "attention": Section(attention.attention),
    "layouts": Section(pixels.layouts),
    "loader": Section(loader.loader),
    "checkpoints": Section(checkpoints.checkpoints),
    "start_up": Section(commands.start_up),
    "loop": Section(commands.loop),
    "solvers": Section(commands.solvers, long=True),
    "curves": Section(quality.curves, long=True),
    "sample_metrics": Section(quality.sample_metrics, long=True),
    "guided": Section(sampling.guided, cuda=True),
}


def chosen(only: str, setting: Setting) -> list[str]:
    """Give the sections that were asked for by name, or those that this setting runs.

    Raises:
        SFDError: there is no section of that name, or not on this device.
    """
    cuda = setting.device.type == "cuda"
    able = [name for name, section in SECTIONS.items() if cuda or not section.cuda]
    wanted = [name for name in only.split(",") if name]
    unable = [name for name in wanted if name not in able]
    if unable:
        raise SFDError(f"there is no section {', '.join(unable)} on {setting.device}; choose of {', '.join(able)}")
    return wanted or [name for name in able if not (setting.quick and SECTIONS[name].long)]


def measure(names: list[str], setting: Setting) -> dict[str, Any]:
    """Measure sections, one after the other, and print each table; `machine` says where, for each.

    What is measured is written at once, to `speed.json`. A section that does not fit into a GPU's memory is left out.
    """
    results: dict[str, Any] = {"machine": []}
    for name in names:
        start = time.monotonic()
        try:
            results[name] = SECTIONS[name].rows(setting)
        except torch.cuda.OutOfMemoryError as error:
            print(f"\n## {name}\n\nleft out: {error}", file=sys.stderr, flush=True)
            continue
        finally:
            torch._dynamo.reset()
            gc.collect()
        results["machine"].append({"section": name} | machine(setting.device))
        (setting.out / "speed.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        print(f"\n## {name} ({time.monotonic() - start:.0f} s)\n\n{table(results[name])}", flush=True)
    return results


def sizes(text: str) -> tuple[tuple[str, int], ...]:
    """Read sizes and batches, as `S:8,B:8`.

    Raises:
        SFDError: it is written otherwise, there is no such size, or a batch is less than 1.
    """
    found = [re.fullmatch(r"([^:]+):([1-9][0-9]*)", each) for each in text.split(",") if each]
    if not all(match and match[1] in SIZES for match in found):
        raise SFDError(f"--sizes takes sizes of {', '.join(SIZES)} with a batch each, such as S:8,B:8, not {text!r}")
    return tuple((match[1], int(match[2])) for match in found if match)


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.speed", description="Speed of sampling, training, loading and starting."
    )
    parser.add_argument("--quick", action="store_true", help="small sizes, few repeats, no long sections: some minutes")
    parser.add_argument("--only", default="", help=f"sections, comma-separated, of {', '.join(SECTIONS)}")
    parser.add_argument("--sizes", default="", help="of networks, and batch: S:8,B:8  [default: by device]")
    parser.add_argument("--repeats", type=int, help="turns of which the best counts  [default: 6, quick: 2]")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/speed"), help="folder to write to")
    parser.add_argument("--publish", action="store_true", help="keep the results for docs/performance.md")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    try:
        setting = Setting(
            device=choose_device(arguments.device),
            quick=arguments.quick,
            repeats=arguments.repeats or (2 if arguments.quick else 6),
            out=arguments.out,
            asked=sizes(arguments.sizes),
        )
        results = measure(chosen(arguments.only, setting), setting)
    except SFDError as error:
        parser.error(str(error))
    draw(results, arguments.out / "speed.png")
    if arguments.publish:
        publish(results, setting.device.type)
        if "curves" in results:
            quality.keep(setting.out)


if __name__ == "__main__":
    main()
