"""Error of each solver where guidance acts within an interval, on the exact field of benchmarks/solvers.py.

    python -m benchmarks.solvers_interval

Guidance 2 by a mixture with means 0.9 and deviations 1.15 times as large. Each solver runs twice: blind to the ends of
the interval, where times are compared with it at each evaluation, and stopping at them, as `integrate` does. Prints
the evaluations, an image's own in the mean, and the median and the largest relative error of the texture against dopri5
at a tolerance of 1e-10.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from sfd.schedules import build_schedule

from benchmarks.solvers import COMPOSITE, DELTA, SAMPLES, data, texture_errors
from sfd.guidance import VelocityField, guide
from sfd.models.toy import GaussianMixture
from sfd.sampling import Result, initial_noise, integrate

INTERVALS: tuple[Any, ...] = (None, (0.2, 0.8), {"texture": (0.3, 1.0), "semantic": (0.0, 0.6)})
FIGURES = "evaluations", "of an image", "median", "worst"
SCALE, MEANS, DEVIATIONS = 2.0, 0.9, 1.15


def runs() -> Iterator[tuple[str, dict[str, Any]]]:
    """Name each run, with its settings as `integrate` takes them."""
    for control in ("batch", "worst", "image"):
        for rtol in (1e-3, 1e-4, 1e-5):
            options = {"rtol": rtol, "atol": rtol / 1000, "control": control}
            yield f"dopri5, {control}, rtol {rtol:g}", {"solver": "dopri5", "options": options}
    for evaluations in (12, 24, 48, 96):
        yield f"euler {evaluations}", {"solver": "euler", "steps": evaluations}
        if evaluations // 2 > 6:
            yield f"heun {evaluations}", {"solver": "heun", "steps": evaluations // 2}
        for order in (2, 3):
            how = {"solver": "multistep", "steps": evaluations, "options": {"order": order}}
            yield f"multistep, order {order}, {evaluations}", how


def fields(interval: Any) -> dict[str, Callable[[], VelocityField]]:
    """Make the guided field, and one that does not tell where it jumps."""
    strong = data()
    weak = GaussianMixture(COMPOSITE, strong.weights, MEANS * strong.means, DEVIATIONS * strong.stds)

    def stopping() -> VelocityField:
        return guide(strong.velocity, weak.velocity, SCALE, COMPOSITE, interval)

    def blind() -> VelocityField:
        guided = stopping()
        return lambda x, times: guided(x, times)

    return {"blind": blind, "stopping": stopping}


def main() -> None:
    schedule = build_schedule({"name": "offset", "delta": DELTA}, COMPOSITE.names)
    noise = initial_noise(range(SAMPLES), COMPOSITE).double()

    def solved(field: VelocityField, **how: Any) -> Result:
        return integrate(field, noise, schedule, COMPOSITE, **how)

    for interval in INTERVALS:
        made = fields(interval)
        head = [f"guidance in {interval}"] + [f"{name}: {what}" for name in made for what in FIGURES]
        print("\n| " + " | ".join(head) + " |" + "\n" + "|---" * len(head) + "|")
        reference = solved(made["stopping"](), solver="dopri5", options={"rtol": 1e-10, "atol": 1e-12}).x
        for name, how in runs():
            cells = [name]
            for field in made.values():
                result = solved(field(), **how)
                errors, own = texture_errors(result.x, reference), result.image_evaluations.double().mean()
                cells += [str(result.evaluations), f"{own:.0f}", f"{errors.median():.1e}", f"{errors.max():.1e}"]
            print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
