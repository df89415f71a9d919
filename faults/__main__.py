"""Inject every fault into a run, print the table, and write it into docs/reliability.md if asked to.

python -m faults [--only WORDS] [--quick] [--write]
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import shutil
import sys
import tempfile
import time
import traceback
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from random import Random

import torch

from faults import damage, disks, gradients, kills, workers
from faults.runs import Lost, Place, Scenario, make_reference

PAGE = Path(__file__).parent.parent / "docs" / "reliability.md"
BEGIN, END = "<!-- table -->\n", "<!-- end of table -->\n"
ALL = [s for module in (kills, damage, disks, gradients, workers) for s in module.SCENARIOS]
AT_ONCE = 2


@dataclass(frozen=True)
class Attempt:
    """How one attempt at a scenario went."""

    fault: str
    survived: bool
    lost: bool
    message: str
    seconds: float


def main() -> int:
    """Run what is asked for; 1 if anything did not survive."""
    parser = argparse.ArgumentParser(prog="python -m faults", description=__doc__)
    parser.add_argument("--only", default="", help="faults whose description has these words")
    parser.add_argument("--tries", type=int, help="per fault, in place of its own number")
    parser.add_argument("--quick", action="store_true", help="one try of each fault that belongs to the tests")
    parser.add_argument("--write", action="store_true", help=f"write the table into {PAGE.name}")
    given = parser.parse_args()
    chosen = [s for s in ALL if given.only in s.fault and (s.quick or not given.quick)]
    chosen = [s for s in chosen if not s.root or os.geteuid() == 0]
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    folder.chmod(0o755)
    start = time.monotonic()
    try:
        reference = make_reference(folder / "reference")
        jobs = [(s.fault, n) for s in chosen for n in range(1 if given.quick else given.tries or s.tries)]
        attempts = []
        # Forked, so that PyTorch is imported once.
        with ProcessPoolExecutor(AT_ONCE, multiprocessing.get_context("fork")) as pool:
            for done in as_completed(pool.submit(_attempt, *job, folder, reference) for job in jobs):
                attempts.append(done.result())
                state = "survived" if attempts[-1].survived else "LOST" if attempts[-1].lost else "FAILED"
                last = attempts[-1]
                print(f"{state}: {last.fault} ({last.seconds:.1f} s) {last.message}", flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    table = _table(chosen, attempts) + _about(time.monotonic() - start, len(attempts))
    print(table)
    if given.write:
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n{table}\n{END}{rest.partition(END)[2]}", encoding="utf-8")
    return 0 if all(attempt.survived for attempt in attempts) else 1


def _attempt(fault: str, seed: int, folder: Path, reference: Path) -> Attempt:
    scenario = next(s for s in ALL if s.fault == fault)
    own = Path(tempfile.mkdtemp(dir=folder))
    own.chmod(0o755)
    place = Place(own, reference, Random(f"{fault} {seed}"), seed)
    start, survived, lost = time.monotonic(), True, False
    try:
        message = place.say(scenario.attempt(place))
    except Exception as error:
        survived, lost = False, isinstance(error, Lost)
        message = str(error) if isinstance(error, AssertionError) and str(error) else traceback.format_exc()
    shutil.rmtree(own, ignore_errors=True)
    return Attempt(fault, survived, lost, message.strip(), time.monotonic() - start)


def _table(scenarios: list[Scenario], attempts: list[Attempt]) -> str:
    lines = ["| fault | tries | survived | lost | what a user sees |", "|---|---|---|---|---|"]
    for scenario in scenarios:
        own = [a for a in attempts if a.fault == scenario.fault]
        message = max((a.message for a in own), key=len, default="").replace("|", "\\|").replace("\n", " ")
        counts = f"{len(own)} | {sum(a.survived for a in own)} | {sum(a.lost for a in own)}"
        lines.append(f"| {scenario.fault} | {counts} | {message[:400]} |")
    return "\n".join(lines) + "\n\n"


def _about(seconds: float, count: int) -> str:
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    return f"{count} tries in {seconds / 60:.0f} minutes, {date.today()}, {machine}, PyTorch {torch.__version__}.\n"


if __name__ == "__main__":
    sys.exit(main())
