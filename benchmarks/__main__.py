"""Speed, memory, solvers, quality and arithmetic of scaling: every table of numbers in docs/.

    python -m benchmarks [SECTION]... [FIELD=VALUE]... [--quick] [--publish] [--device auto] [--sizes S:8,B:8]

Ways that are compared run in turn (A B A B …) in one process on the same inputs, and the best of several turns counts.
Prints Markdown tables. --publish keeps them in docs/results/benchmarks.json and writes them, and their figures, into
docs/. Networks have random weights, as times do not depend on them; errors are those of models/shapes, which is
trained. A name stands for all sections that begin with it; FIELD=VALUE changes a section's recipe or assumptions
(`scaling mfu=0.3`). A section that fails is reported and the others run; the command
then exits with code 1.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import (
    commands,
    editing,
    few_steps,
    finetune,
    graphs,
    guided,
    loader,
    memory,
    quality,
    report,
    sampling,
    scaling,
    solvers,
    training,
)
from benchmarks.measure import ROOT, Row, Setting, machine
from sfd.models.dit_config import SIZES
from sfd.utils.device import choose_device
from sfd.utils.errors import SFDError, unknown
from sfd.utils.files import write_text


class Section(NamedTuple):
    """What measures one table."""

    rows: Callable[[Setting], Iterable[Row]]
    quick: bool = True  # runs with --quick
    cuda: bool = False  # on a CPU runs only if named
    named: bool = False  # runs only if named
    figure: str | None = None  # of docs/figures/make.py, drawn from the rows


SECTIONS = {
    "sampling": Section(sampling.sampling, figure="speed"),
    "errors": Section(sampling.errors),
    "guided": Section(guided.guided, named=True),
    "graphs": Section(graphs.graphs, cuda=True),
    "compiling_guided": Section(guided.compiling, cuda=True, named=True),
    "compiling_training": Section(training.compiling, cuda=True, named=True),
    "training": Section(training.training, figure="speed"),
    "memory": Section(memory.memory, quick=False),
    "checkpointing": Section(memory.checkpointing, quick=False),
    "loader": Section(loader.loader),
    "checkpoints": Section(commands.checkpoints),
    "start_up": Section(commands.start_up),
    "loop": Section(commands.loop),
    "solvers_exact": Section(solvers.exact, quick=False, figure="solvers"),
    "solvers_stochastic": Section(solvers.stochastic, quick=False),
    "solvers_shapes": Section(solvers.shapes, quick=False),
    "solvers_interval": Section(solvers.interval, quick=False),
    "solvers_quality": Section(quality.solvers, quick=False, figure="solvers_trained"),
    "curves": Section(quality.curves, quick=False, figure="training_curves"),
    "precision": Section(quality.precision, quick=False),
    "editing": Section(editing.editing, quick=False),
    "finetune": Section(finetune.finetune, quick=False),
    "few_steps": Section(few_steps.few_steps, named=True),
    "guidance_inside": Section(few_steps.inside, named=True),
    **{f"scaling_{name}": Section(partial(scaling.rows, name)) for name in scaling.TABLES},
}


def chosen(names: list[str], setting: Setting) -> list[str]:
    """The sections that begin with the given names, or all that this setting runs."""
    on_gpu = setting.device.type == "cuda"
    able = {name: section for name, section in SECTIONS.items() if names or on_gpu or not section.cuda}
    for name in names:
        if not any(section.startswith(name) for section in able):
            raise unknown(f"section on {setting.device.type}", name, able)
    if names:
        return [section for section in able if any(section.startswith(name) for name in names)]
    return [name for name, section in able.items() if not section.named and (section.quick or not setting.quick)]


def measure(names: list[str], setting: Setting, publish: bool) -> list[str]:
    """Measure sections, print each at once and publish it if wanted; give those that failed."""
    failed, results = [], setting.out / "results.json"
    kept: report.Results = json.loads(results.read_text()) if results.exists() else {}
    for name in names:
        start = time.monotonic()
        where = None if name.startswith("scaling_") else machine(setting.device)
        try:
            rows: list[Row] = []
            section = {"machine": where, "rows": rows, "quick": setting.quick}
            for row in SECTIONS[name].rows(setting):
                rows.append(row)
                kept.setdefault(setting.device.type, {})[name] = section
                print(row, flush=True)
                write_text(results, json.dumps(kept, indent=1))  # stays if a later row takes too long
            print(f"\n## {name} ({time.monotonic() - start:.0f} s)\n\n{report.table(rows)}", flush=True)
            if publish:
                report.publish({setting.device.type: {name: section}})
                if SECTIONS[name].figure and setting.device.type == "cpu":
                    subprocess.run([sys.executable, ROOT / "docs/figures/make.py", SECTIONS[name].figure], check=True)
        except Exception as error:  # the other sections do not depend on it
            failed.append(name)
            said = error.stderr if isinstance(error, subprocess.CalledProcessError) else None
            print(f"\n## {name} failed\n\n{traceback.format_exc()}\n{said or ''}", file=sys.stderr, flush=True)
        finally:
            torch._dynamo.reset()
            gc.collect()
    return failed


def sizes(text: str) -> tuple[tuple[str, int], ...]:
    """Read sizes and batches: `S:8,B:8`."""
    found = [re.fullmatch(r"([^:]+):([1-9][0-9]*)", each) for each in text.split(",") if each]
    if not all(match and match[1] in SIZES for match in found):
        raise SFDError(f"--sizes takes sizes of {', '.join(SIZES)} with a batch each, such as S:8,B:8, not {text!r}")
    return tuple((match[1], int(match[2])) for match in found if match)


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="SECTION | FIELD=VALUE", help=", ".join(SECTIONS))
    parser.add_argument("--quick", action="store_true", help="small sizes, few repeats, no long sections: some minutes")
    parser.add_argument("--sizes", default="", help="of networks, with a batch each: S:8,B:8  [default: by device]")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"), help="folder for what sections write")
    parser.add_argument("--publish", action="store_true", help="keep the results for docs/")
    parser.add_argument("--take", type=Path, metavar="FILE", help="publish these results of another machine instead")
    given = parser.parse_intermixed_args()
    if given.take:
        try:
            report.publish(json.loads(given.take.read_text(encoding="utf-8")))
        except SFDError as error:
            parser.error(f"--take {given.take}: {error}")
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            parser.error(f"--take {given.take}: this is no results.json that this command wrote ({error!r})")
        return
    if given.quick and given.publish:
        parser.error("published figures are those of the full run; leave out --quick or --publish")
    try:
        setting = Setting(
            device=choose_device(given.device),
            out=given.out,
            quick=given.quick,
            repeats=2 if given.quick else 6,
            given=sizes(given.sizes),
            overrides=tuple(name for name in given.names if "=" in name),
        )
        names = chosen([name for name in given.names if "=" not in name], setting)
    except SFDError as error:
        parser.error(str(error))
    setting.out.mkdir(parents=True, exist_ok=True)
    failed = measure(names, setting, given.publish)
    if failed:
        sys.exit(f"these sections failed: {', '.join(failed)}; see above")


if __name__ == "__main__":
    main()
