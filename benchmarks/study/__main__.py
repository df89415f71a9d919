"""The evidence: does it help that semantics lead? One command trains all arms, measures them and writes the page.

    python -m benchmarks.study shapes|photos [FIELD=VALUE]... [--arms NAME,...] [--seeds 3] [--out runs/study]

Every result is written as it comes, and training writes checkpoints: the same command resumes. The most telling arms
come first, each with all its seeds. FIELD=VALUE changes the recipe of all arms; give another --out then.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from benchmarks.study import page
from benchmarks.study.arms import BASES, Arm, arms
from benchmarks.study.work import Study
from sfd.utils.device import choose_device
from sfd.utils.errors import Interrupted, SFDError, unknown
from sfd.utils.progress import say


def chosen(listed: list[Arm], names: str | None) -> list[Arm]:
    """The arms that are named, or all."""
    by_name = {arm.name: arm for arm in listed}
    for name in names.split(",") if names else ():
        if name not in by_name:
            raise unknown("arm", name, by_name)
    return [by_name[name] for name in names.split(",")] if names else listed


def run(study: Study, listed: list[Arm], seeds: int, name: str) -> Path:
    """Measure all arms and seeds that are left; the page is written anew after each."""
    recipe = study.recipe(listed[0])
    images, steps = recipe.train.batch_size, recipe.train.steps
    study.measure_real()
    pairs = [(arm, seed) for arm in listed for seed in range(seeds)]
    for number, (arm, seed) in enumerate(pairs, start=1):
        start = time.monotonic()
        if study.measure(arm, seed):
            say(f"{number} of {len(pairs)}: {arm.name}, seed {seed}: {(time.monotonic() - start) / 60:.0f} minutes")
            page.write(study.folder, name, images, steps)
    return page.write(study.folder, name, images, steps)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", choices=BASES)
    parser.add_argument("changes", nargs="*", metavar="FIELD=VALUE")
    parser.add_argument("--arms", help="names, with commas between  [default: all]")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    given = parser.parse_args(arguments)
    base = BASES[given.data]
    try:
        study = Study(base, given.changes, given.out / given.data, choose_device(given.device))
        say(str(run(study, chosen(arms(base), given.arms), given.seeds, given.data)))
    except Interrupted:
        sys.exit("stopped; the same command resumes")
    except SFDError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
