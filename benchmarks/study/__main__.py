"""The evidence: does it help that semantics lead? One command trains all arms, measures them and writes the page.

    python -m benchmarks.study shapes|photos [FIELD=VALUE]... [--arms NAME,...] [--seeds 3] [--out runs/study]

Every result is written as it comes, and training writes checkpoints: the same command resumes. The most telling arms
come first, each with all its seeds. FIELD=VALUE changes the recipe of all arms; give another --out then.
"""

from __future__ import annotations

import time

from benchmarks.study import command, page
from benchmarks.study.arms import Arm
from benchmarks.study.work import Study
from sfd.utils.progress import say


def work(study: Study, listed: list[Arm], seeds: int, name: str) -> None:
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
    say(str(page.write(study.folder, name, images, steps)))


def main(arguments: list[str] | None = None) -> None:
    command.run("benchmarks.study", __doc__, work, arguments)


if __name__ == "__main__":
    main()
