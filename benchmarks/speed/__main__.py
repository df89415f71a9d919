"""How fast sampling, training, loading and starting are, each beside a plain float32 path of the same network.

    python -m benchmarks.speed [--quick] [--only sampling,training] [--device auto] [--out runs/benchmarks/speed]

Ways that are compared run in turn (A B A B …) in one process on the same inputs; the best of several times counts, so
that a busy machine does not favour one. Prints Markdown tables and writes speed.json and speed.png. Networks have
random weights, as times do not depend on them; velocity errors are those of the demo model, which is trained.
On a GPU the larger sizes run, and guided sampling beside the published settings. docs/performance.md explains.

Each section is written as soon as it is measured, in place of what speed.json had of it; with --publish the tables and
figures of docs/ as well. A section that fails is reported, and the others go on; the command then ends with code 1.
"""

from __future__ import annotations

import argparse
import gc
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

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
    solving,
    training,
)
from benchmarks.speed.measuring import Row, Setting, machine
from benchmarks.speed.report import check_place, draw, keep, publish, table
from sfd.models.dit import SIZES
from sfd.utils.device import choose_device
from sfd.utils.errors import SFDError


class Section(NamedTuple):
    """What measures one table, and when it is left out."""

    rows: Callable[[Setting], list[Row]]
    long: bool = False  # not with --quick
    cuda: bool = False  # only on a GPU
    keep: Callable[[Setting], None] = lambda setting: None  # what --publish keeps beside the table


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
    "solvers": Section(solving.solvers, long=True, keep=solving.keep_solvers),
    "stochastic": Section(solving.stochastic, long=True),
    "trained": Section(solving.trained, long=True, keep=solving.keep_trained),
    "curves": Section(quality.curves, long=True, keep=quality.keep),
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


def measure(names: list[str], setting: Setting, published: bool = False) -> list[str]:
    """Measure sections, one after the other, keep and print each at once; give those that failed.

    `machine` says where each was measured.
    """
    failed, device = [], setting.device.type
    for name in names:
        start = time.monotonic()
        try:
            rows = SECTIONS[name].rows(setting)
            results = {"machine": [{"section": name} | machine(setting.device)], name: rows}
            kept = keep(setting.out / "speed.json", results, device)
            draw(kept if device == "cpu" else kept[device], setting.out / "speed.png")
            print(f"\n## {name} ({time.monotonic() - start:.0f} s)\n\n{table(rows)}", flush=True)
            if published:
                publish(results, device)
                SECTIONS[name].keep(setting)
        except Exception as error:  # whatever it is, the other sections do not depend on it
            failed.append(name)
            said = error.stderr if isinstance(error, subprocess.CalledProcessError) else None
            print(f"\n## {name} failed\n\n{traceback.format_exc()}\n{said or ''}", file=sys.stderr, flush=True)
        finally:
            torch._dynamo.reset()
            gc.collect()
    return failed


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
    if arguments.quick and arguments.publish:
        parser.error("the figures that are kept are those of the full run; leave out --quick or --publish")
    if arguments.repeats is not None and arguments.repeats < 1:
        parser.error(f"--repeats must be at least 1, not {arguments.repeats}")
    try:
        setting = Setting(
            device=choose_device(arguments.device),
            quick=arguments.quick,
            repeats=arguments.repeats or (2 if arguments.quick else 6),
            out=arguments.out,
            asked=sizes(arguments.sizes),
        )
        names = chosen(arguments.only, setting)
        if arguments.publish:
            check_place(setting.device.type)
    except SFDError as error:
        parser.error(str(error))
    setting.out.mkdir(parents=True, exist_ok=True)
    failed = measure(names, setting, arguments.publish)
    if failed:
        sys.exit(f"these sections failed: {', '.join(failed)}; what they said stands above")


if __name__ == "__main__":
    main()
