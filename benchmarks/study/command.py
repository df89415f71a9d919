"""What the study's commands have in common: their arguments, and how they end."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.study.arms import BASES, Arm, arms
from benchmarks.study.work import Study
from sfd.utils.device import choose_device
from sfd.utils.errors import Interrupted, SFDError, unknown


def run(
    program: str,
    description: str | None,
    work: Callable[[Study, list[Arm], int, str], None],
    arguments: list[str] | None,
) -> None:
    """Read the arguments and work on a study: arms, number of seeds, data set; errors end with a sentence."""
    parser = argparse.ArgumentParser(
        f"python -m {program}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", choices=BASES)
    parser.add_argument("changes", nargs="*", metavar="FIELD=VALUE")
    parser.add_argument("--arms", help="names, with commas between  [default: all]")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    given = parser.parse_intermixed_args(arguments)
    base = BASES[given.data]
    try:
        study = Study(base, given.changes, given.out / given.data, choose_device(given.device))
        by_name = {arm.name: arm for arm in arms(base)}
        names = given.arms.split(",") if given.arms else list(by_name)
        for name in names:
            if name not in by_name:
                raise unknown("arm", name, by_name)
        work(study, [by_name[name] for name in names], given.seeds, given.data)
    except Interrupted:
        sys.exit("stopped; the same command resumes")
    except SFDError as error:
        parser.exit(2, f"error: {error}\n")
