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

Work = Callable[[Study, list[Arm], int, str], None]
"""What is done with a study, the chosen arms, the number of seeds and the data set's name."""


def run(name: str, description: str | None, work: Work, arguments: list[str] | None) -> None:
    """Read the arguments and do the work; errors of use and interruptions end with a sentence."""
    parser = argparse.ArgumentParser(
        f"python -m {name}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
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
        work(study, chosen(arms(base), given.arms), given.seeds, given.data)
    except Interrupted:
        sys.exit("stopped; the same command resumes")
    except SFDError as error:
        sys.exit(f"error: {error}")


def chosen(listed: list[Arm], names: str | None) -> list[Arm]:
    """The arms that are named, or all."""
    by_name = {arm.name: arm for arm in listed}
    for name in names.split(",") if names else ():
        if name not in by_name:
            raise unknown("arm", name, by_name)
    return [by_name[name] for name in names.split(",")] if names else listed
