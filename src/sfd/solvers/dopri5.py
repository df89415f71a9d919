"""Dormand and Prince's method of order 5 with an embedded error estimate (1980), from torchdiffeq.

It chooses its own steps, by the error over the whole batch. So an image depends on the others in its batch, though only
within the tolerance; solvers with fixed steps give each image exactly what it gets alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor
from torchdiffeq import odeint

from sfd.errors import SFDError
from sfd.settings import Settings
from sfd.solvers._base import Callback, Velocity

ADAPTIVE = True
WITHOUT_FLOAT64 = {"mps"}  # device types that know no float64


class Options(Settings):
    """Error allowed in a step, atol + rtol·|x|, root mean square over the batch. Published runs use the defaults."""

    rtol: float = Field(1e-3, gt=0)
    atol: float = Field(1e-6, gt=0)


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

    Raises:
        SFDError: the state is no longer finite, or the step became too small to go on.
    """
    # torchdiffeq keeps times and step sizes beside the state, on its device, and takes float64 unless told.
    dtype = torch.float32 if x.device.type in WITHOUT_FLOAT64 else torch.float64
    ends = torch.tensor([points[0], points[-1]], dtype=dtype, device=x.device)
    try:
        # step_t: without it the last step reaches beyond the knot, where the velocity bends, and interpolates back.
        solution = odeint(
            _Derivative(velocity, float(ends[0]), callback),
            x,
            ends,
            rtol=options.rtol,
            atol=options.atol,
            method="dopri5",
            options={"step_t": ends[1:], "dtype": dtype},
        )
    except AssertionError as error:
        raise SFDError(
            f"dopri5 cannot go on between u = {points[0]:.4g} and {points[-1]:.4g} ({str(error)[:60]}); "
            f"allow a larger error than rtol {options.rtol} and atol {options.atol}, or take a solver with fixed steps"
        ) from error
    if callback is not None:
        callback(points[-1], solution[-1])
    return solution[-1]
