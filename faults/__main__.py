"""Do every fault to a run, print the table, and write it into docs/reliability.md if asked to.

python -m faults [--only WORDS] [--quick] [--write]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
import time
import traceback
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from random import Random

import torch

from faults import clocks, damage, disks, gradients, hostile, kills, workers
from faults.runs import Lost, Place, make_reference
from faults.scenarios import Scenario

PAGE = Path(__file__).parent.parent / "docs" / "reliability.md"
BEGIN, END = "<!-- table -->\n", "<!-- end of table -->\n"
MODULES = (kills, damage, disks, gradients, workers, clocks, hostile)
AT_ONCE = 2


@dataclass(frozen=True)
class Try:
    """How one try of a scenario went."""

    fault: str
    survived: bool
    lost: bool
    message: str
    seconds: float


def main() -> int:
    """Run what is asked for; 1 if anything did not survive."""
    parser = argparse.ArgumentParser(prog="python -m faults", description=__doc__)
    parser.add_argument("--only", default="", help="faults whose description has these words")
    parser.add_argument("--tries", type=int, help="of each fault, in place of its own number")
    parser.add_argument("--quick", action="store_true", help="one try of each fault that belongs to the tests")
    parser.add_argument("--write", action="store_true", help=f"write the table into {PAGE.name}")
    options = parser.parse_args()
    chosen = [s for module in MODULES for s in module.SCENARIOS if options.only in s.fault]
    chosen = [s for s in chosen if (s.quick or not options.quick) and (not s.root or os.geteuid() == 0)]
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    folder.chmod(0o755)
    start = time.monotonic()
    try:
        reference = make_reference(folder / "reference")
        jobs = [(s, n) for s in chosen for n in range(1 if options.quick else options.tries or s.tries)]
        tries = _run(jobs, folder, reference)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    table = _table(chosen, tries)
    about = _about(time.monotonic() - start, len(tries))
    print(f"{table}\n{about}")
    if options.write:
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}{table}\n{about}\n{END}{rest.partition(END)[2]}", encoding="utf-8")
    return 0 if all(t.survived for t in tries) else 1


def _run(jobs: list[tuple[Scenario, int]], folder: Path, reference: Path) -> list[Try]:
    """Do the tries in processes of their own, a few at a time."""
    waiting, running, tries = list(enumerate(jobs)), {}, []
    while waiting or running:
        while waiting and len(running) < AT_ONCE:
            number, (scenario, seed) = waiting.pop(0)
            place = folder / f"try-{number}"
            place.mkdir()
            sys.stdout.flush()
            pid = os.fork()
            if pid == 0:
                _attempt(scenario, Place(place, reference, Random(f"{scenario.fault} {seed}"), seed))
                os._exit(0)
            running[pid] = place, scenario
        pid, _ = os.wait()
        place, scenario = running.pop(pid)
        result = place / "try.json"
        fields = json.loads(result.read_text()) if result.exists() else _unexplained(scenario)
        tries.append(Try(**fields))
        state = "survived" if tries[-1].survived else "LOST" if tries[-1].lost else "FAILED"
        print(f"{state}: {tries[-1].fault} ({tries[-1].seconds:.1f} s) {tries[-1].message}", flush=True)
        shutil.rmtree(place, ignore_errors=True)
    return tries


def _attempt(scenario: Scenario, place: Place) -> None:
    start, survived, lost = time.monotonic(), True, False
    try:
        message = place.say(scenario.attempt(place))
    except Exception as error:
        survived, lost = False, isinstance(error, Lost)
        message = str(error) if isinstance(error, AssertionError) and str(error) else traceback.format_exc()
    done = Try(scenario.fault, survived, lost, message.strip(), time.monotonic() - start)
    (place.folder / "try.json").write_text(json.dumps(asdict(done)))


def _unexplained(scenario: Scenario) -> dict[str, object]:
    return asdict(Try(scenario.fault, False, True, "the process that tried it ended", 0.0))


def _table(scenarios: list[Scenario], tries: list[Try]) -> str:
    lines = ["| fault | tries | survived | lost | what a user sees |", "|---|---|---|---|---|"]
    for scenario in scenarios:
        own = [t for t in tries if t.fault == scenario.fault]
        message = max((t.message for t in own), key=len, default="").replace("|", "\\|").replace("\n", " ")
        counts = f"{len(own)} | {sum(t.survived for t in own)} | {sum(t.lost for t in own)}"
        lines.append(f"| {scenario.fault} | {counts} | {message[:400]} |")
    return "\n".join(lines) + "\n"


def _about(seconds: float, count: int) -> str:
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    return f"{count} tries in {seconds / 60:.0f} minutes, {date.today()}, {machine}, PyTorch {torch.__version__}."


if __name__ == "__main__":
    sys.exit(main())
