"""Dormand and Prince's method of order 5 with an embedded error estimate (1980), from torchdiffeq.

It chooses its own steps. With one step size for the whole batch an image depends on the others in its batch, though
only within the tolerance; with `control: image` each image takes its own steps, and depends on its seed alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torchdiffeq import odeint

from sfd.solvers._base import Callback, Velocity
from sfd.solvers._by_image import solve_by_image
from sfd.utils.config import Settings
from sfd.utils.errors import SFDError

ADAPTIVE = True
WITHOUT_FLOAT64 = {"mps"}  # device types that know no float64


class Options(Settings):
    """Error allowed in a step, atol + rtol·|x|. Published runs use the defaults."""

    rtol: float = Field(1e-3, gt=0)
    atol: float = Field(1e-6, gt=0)
    control: Literal["batch", "worst", "image"] = Field(
        "batch",
        description="whose error, root mean square, sets the step: the whole batch's, that of its worst image, or each "
        "image's its own step",
    )


class _Derivative:
    """The velocity in torchdiffeq's terms: it passes times as tensors, and looks for its callback on the function."""

    def __init__(self, velocity: Velocity, start: float, callback: Callback | None) -> None:
        self._velocity = velocity
        self._start = start
        self._callback = callback

    def __call__(self, u: Tensor, x: Tensor) -> Tensor:
        return self._velocity(float(u), x)

    def callback_accept_step(self, u: Tensor, x: Tensor, h: Tensor) -> None:
        """Report the step before this one: torchdiffeq names the state that the accepted step left from."""
        if self._callback is not None and float(u) > self._start:
            self._callback(float(u), x)


def solve(
    velocity: Velocity, x: Tensor, points: Sequence[float], options: Options, callback: Callback | None = None
) -> Tensor:
    """Integrate from the first point to the last, and step exactly onto the last; see `Solver.solve`.

    With `control: image` images are at different times between the ends, so the callback is called at the end alone.

    Raises:
        SFDError: the state is no longer finite, or the step became too small to go on.
    """
    if options.control == "image":
        x = solve_by_image(velocity, x, points[0], points[-1], options.rtol, options.atol)
        if callback is not None:
            callback(points[-1], x)
        return x
    # torchdiffeq keeps times and step sizes beside the state, on its device, and takes float64 unless told.
    dtype = torch.float32 if x.device.type in WITHOUT_FLOAT64 else torch.float64
    ends = torch.tensor([points[0], points[-1]], dtype=dtype, device=x.device)
    norm: dict[str, Any] = {"norm": _worst_image} if options.control == "worst" else {}
    try:
        # step_t: without it the last step reaches beyond the piece, where the velocity bends, and interpolates back.
        solution = odeint(
            _Derivative(velocity, float(ends[0]), callback),
            x,
            ends,
            rtol=options.rtol,
            atol=options.atol,
            method="dopri5",
            options={"step_t": ends[1:], "dtype": dtype, **norm},
        )
    except AssertionError as error:
        raise SFDError(
            f"dopri5 cannot go on between u = {points[0]:.4g} and {points[-1]:.4g} ({str(error)[:60]}); "
            f"allow a larger error than rtol {options.rtol} and atol {options.atol}, or take a solver with fixed steps"
        ) from error
    if callback is not None:
        callback(points[-1], solution[-1])
    return solution[-1]


def _worst_image(values: Tensor) -> Tensor:
    """Give the largest root mean square of a row; of a whole batch (B, M) that is its worst image's."""
    return values.square().mean(dim=-1).sqrt().max()
