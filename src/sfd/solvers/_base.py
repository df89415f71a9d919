"""What a solver is: a module with a name, options and one function that integrates one smooth piece."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, cast

from torch import Tensor

from sfd.utils import registry
from sfd.utils.config import Settings, parse
from sfd.utils.errors import SFDError


class Velocity(Protocol):
    """dx/du on one piece, and the noise that led there. Most solvers only call it, and a plain function will do."""

    def __call__(self, u: float | Tensor, x: Tensor, moving: Tensor | None = None, /) -> Tensor:
        """Evaluate dx/du.

        Args:
            u: a Python float, so that nothing waits for the device; or one base time an image, (B,), float64 on the
                CPU, for solvers that let each image take its own steps.
            x: (B, M), entries of the streams that move in this piece.
            moving: (B,), bool, on the CPU: which images have not arrived yet, to count evaluations by; None: all.

        Returns:
            (B, M).
        """

    def renoise(self, x: Tensor, u: float, earlier: float) -> Tensor:
        """Lead x (B, M) back from u to an earlier base time of the piece, as the noising process has it.

        Raises:
            SFDError: there are no seeds to draw noise from.
        """


Callback = Callable[[float, Tensor], None]
"""Called after each step with (u, x), the state that the step arrived at."""


class Solver(Protocol):
    """What a module in `sfd.solvers` holds."""

    Options: type[Settings]
    ADAPTIVE: bool  # True: it chooses its own steps, and a step count makes no sense

    def solve(
        self, velocity: Velocity, x: Tensor, points: Sequence[float], options: Any, callback: Callback | None = None
    ) -> Tensor:
        """Integrate one piece.

        Args:
            velocity: smooth over the piece, up to and including both ends.
            x: (B, M), the state at points[0]; never written to.
            points: all base times of the piece, ascending; the ends alone for an adaptive solver. A multistep solver
                keeps its history in local variables: it starts anew here, as it must, because a jump lies before.
            options: an instance of this module's `Options`.
            callback: see `Callback`.

        Returns:
            (B, M), the state at points[-1].
        """


def load_solver(name: str, options: Mapping[str, Any] | None = None) -> tuple[Solver, Settings]:
    """Find a solver and check its options.

    Raises:
        SFDError: no such solver or option (with the nearest right name), or a value of the wrong type or range.
    """
    solver = cast(Solver, registry.find(__package__ or "sfd.solvers", name, "solver"))
    return solver, parse(solver.Options, options or {}, f"solver {name!r}")


def check_steps(solver: Solver, name: str, steps: int | None, least: int, stops: str) -> None:
    """Verify that a step count fits the solver.

    Args:
        solver: as loaded.
        name: its name, for the message.
        steps: as the user gave it; None: not given.
        least: how many pieces there are; each needs a step.
        stops: what lies between them, for the message.

    Raises:
        SFDError: steps for an adaptive solver; none, or fewer than `least`, for any other.
    """
    if solver.ADAPTIVE:
        if steps is not None:
            raise SFDError(
                f"solver {name!r} chooses its own steps, but {steps} steps were asked for; "
                f"leave the number of steps out, and set its options ({', '.join(solver.Options.model_fields)})"
            )
        return
    if steps is None:
        raise SFDError(f"solver {name!r} needs a number of steps, at least {least} here; give one")
    if steps < 1:
        raise SFDError(f"the number of steps must be at least 1, got {steps}")
    if steps < least:
        raise SFDError(
            f"steps end at {stops}, and each of the {least} pieces between needs one, but {steps} steps were asked "
            f"for; give at least {least}"
        )
