"""Solvers of dx/du = f(u, x) on one smooth interval: free functions, stateless, registered by name in `SOLVERS`.

    euler       order 1, one evaluation per step
    heun        order 2, two evaluations per step
    multistep   order 2 or 3, one evaluation per step (Adams-Bashforth-Moulton)
    sde         order 2, two evaluations per step and fresh noise before each (Karras et al. 2022)
    dopri5      order 5, adaptive (Dormand & Prince 1980)

The contract of a solver `solve(dxdu, x, grid, callback, *, options) → x`:

    dxdu(u, x)    f: u a Python float (nothing synchronises with the device), x and the result (B, M). Smooth over the
                  interval; at its two ends the limit from inside.
    x             (B, M), the state at grid[0]; never written to.
    grid          base times of all steps, ascending, both ends included; only the ends for an adaptive solver.
    callback      called with (u, x) after each step, the last one included; or None.

A multistep method keeps its history in local variables, so it restarts in every interval, as it must: f jumps between.
It takes a `Seam` after the callback, by which the next interval corrects its last step. A stochastic solver takes
`churn(x, u, earlier)` there, which leads x back from u to an earlier base time by the noising process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Annotated, NamedTuple, Protocol

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from sfd.utils.errors import SFDError

Derivative = Callable[[float, Tensor], Tensor]
Callback = Callable[[float, Tensor], None]
Churn = Callable[[Tensor, float, float], Tensor]


def euler(dxdu: Derivative, x: Tensor, grid: Sequence[float], callback: Callback | None = None) -> Tensor:
    """x ← x + h·f(u, x)."""
    for u, after in pairwise(grid):
        x = x + (after - u) * dxdu(u, x)
        if callback is not None:
            callback(after, x)
    return x


def heun(dxdu: Derivative, x: Tensor, grid: Sequence[float], callback: Callback | None = None) -> Tensor:
    """x ← x + h/2·(f(u, x) + f(u + h, x + h·f(u, x))), the explicit trapezoidal rule."""
    for u, after in pairwise(grid):
        x = _heun_step(dxdu, x, u, after)
        if callback is not None:
            callback(after, x)
    return x


def _heun_step(dxdu: Derivative, x: Tensor, u: float, after: float) -> Tensor:
    h = after - u
    start = dxdu(u, x)
    end = dxdu(after, x + h * start)
    return x + h / 2 * (start + end)


def sde(
    dxdu: Derivative,
    x: Tensor,
    grid: Sequence[float],
    callback: Callback | None,
    churn: Churn,
    *,
    noise: Annotated[float, Field(ge=0)] = 0.5,
) -> Tensor:
    """Noise is put back before each step of Heun's method (Karras et al. 2022, arXiv 2206.00364, algorithm 2).

    On straight paths the stochastic equation with the same marginals as dx/dt = v is, for any g(t) ≥ 0,

        dx = (v + g²/2·∇log p) dt + g dw,    ∇log p = −E[x0 | x] / (1 − t) = (t·v − x) / (1 − t).

    Its last two terms alone keep the marginals. With g² = 2η·(1 − t)/t they are, over a time dt, the way back from t to
    t − η·dt in the noising process and the way forward again along v. The way back is known exactly (`churn`), each
    stream in its own time: it adds no error, and no score is divided by 1 − t. Left is Heun's error over a step 1 + η
    times as long. In each step: back to u − η·h, but not beyond the interval, and from there to u + h.

    Args:
        dxdu, x, grid, callback, churn: see the module.
        noise: η ≥ 0, how far back, in steps; 0 is Heun's method itself.
    """
    for u, after in pairwise(grid):
        back = max(grid[0], u - noise * (after - u))
        if back < u:
            x = churn(x, u, back)
        x = _heun_step(dxdu, x, back, after)
        if callback is not None:
            callback(after, x)
    return x


History = list[tuple[float, Tensor]]  # base times and values of f there, ascending


class Seam(Protocol):
    """Where two intervals of a multistep method meet."""

    def correct(self, x: Tensor, u: float, f: Tensor, order: int) -> Tensor:
        """Give the state (B, M) at an interval's start u, x (B, M) with its last step corrected by f (B, M) there."""

    def leave(self, start: Tensor, history: History) -> None:
        """Keep an interval's last step for the next: the state (B, M) that it set out from, and values of f (B, M)."""


def multistep(
    dxdu: Derivative,
    x: Tensor,
    grid: Sequence[float],
    callback: Callback | None = None,
    seam: Seam | None = None,
    *,
    order: Annotated[int, Field(ge=2, le=3)] = 3,
) -> Tensor:
    """Adams methods: one evaluation per step, each used three times.

    f at a step's start (a) corrects the step before it, (b) predicts this one and (c) stays in the history:
    Adams-Bashforth predicts, Adams-Moulton of the same order corrects, and f is not evaluated again (PEC; Hairer,
    Nørsett & Wanner, *Solving Ordinary Differential Equations I*, III.1 and III.5 for steps of any length). UniPC (Zhao
    et al. 2023, arXiv 2302.04867) found the corrector that costs nothing for diffusion models. DPM-Solver++(2M) (Lu et
    al. 2022, arXiv 2211.01095) interpolates the predicted data in the logarithm of the signal-to-noise ratio instead;
    on straight paths the velocity itself is the smoother function, and the error several times smaller.

    The first step predicts with Euler's method and corrects with the trapezoidal rule; its error, of order 3 once per
    interval, costs neither order. The last step of an interval is corrected by the first value of the next one, where
    the velocity is continuous. The callback sees predictions.

    Args:
        dxdu, x, grid, callback, seam: see the module.
        order: number of values that each polynomial goes through.
    """
    history: History = []
    corrected = x  # the state that the step before set out from
    for u, after in pairwise(grid):
        now = dxdu(u, x)
        nodes = [*history, (u, now)][-order:]
        if history:
            x = add_integral(corrected, nodes, history[-1][0], u)
        elif seam is not None:
            x = seam.correct(x, u, now, order)
        corrected, history = x, nodes
        x = add_integral(corrected, history, u, after)
        if callback is not None:
            callback(after, x)
    if seam is not None:
        seam.leave(corrected, history)
    return x


def add_integral(x: Tensor, nodes: History, start: float, end: float) -> Tensor:
    """Add to x the integral from start to end of the polynomial through the nodes."""
    first, *others = adams_weights(tuple(u for u, _ in nodes), start, end)
    total = torch.add(x, nodes[0][1], alpha=first)
    for weight, (_, f) in zip(others, nodes[1:], strict=True):
        total.add_(f, alpha=weight)
    return total


@lru_cache(maxsize=4096)  # each batch asks for the same ones
def adams_weights(nodes: tuple[float, ...], start: float, end: float) -> tuple[float, ...]:
    """Weights of values at the nodes whose sum is the integral of the polynomial through them."""
    # In units of the interval from its start: far better conditioned than in u, where short steps all look alike.
    places = (np.array(nodes) - start) / (end - start)
    powers = np.arange(len(nodes))
    weights = np.linalg.solve(np.vander(places, increasing=True).T, 1 / (powers + 1))
    return tuple(float(w) for w in (end - start) * weights)


WITHOUT_FLOAT64 = {"mps"}  # device types that know no float64


def dopri5(
    dxdu: Derivative,
    x: Tensor,
    grid: Sequence[float],
    callback: Callback | None = None,
    *,
    rtol: Annotated[float, Field(gt=0)] = 1e-3,
    atol: Annotated[float, Field(gt=0)] = 1e-6,
) -> Tensor:
    """Dormand and Prince's method of order 5 with an embedded error estimate (1980), from torchdiffeq.

    It chooses its own steps, from the first point of the grid exactly onto the last. All images of a batch share a
    step, so an image depends on the others in its batch, within the tolerance.

    Args:
        dxdu, x, grid, callback: see the module.
        rtol, atol: error allowed in a step, atol + rtol·|x|, root mean square over the batch; published runs use the
            defaults.
    """
    from torchdiffeq import odeint

    # torchdiffeq keeps times and step sizes on the state's device, and takes float64 unless told.
    dtype = torch.float32 if x.device.type in WITHOUT_FLOAT64 else torch.float64
    ends = torch.tensor([grid[0], grid[-1]], dtype=dtype, device=x.device)
    # step_t: without it the last step reaches beyond the interval, where f bends, and interpolates back.
    options = {"step_t": ends[1:], "dtype": dtype}
    derivative = _Derivative(dxdu, float(ends[0]), callback)
    try:
        end = odeint(derivative, x, ends, rtol=rtol, atol=atol, method="dopri5", options=options)[-1]
    except AssertionError as error:
        raise SFDError(
            f"dopri5 cannot continue between u = {grid[0]:.4g} and {grid[-1]:.4g} ({str(error)[:60]}); "
            f"allow a larger error than rtol {rtol} and atol {atol}, or take a solver with fixed steps"
        ) from error
    if callback is not None:
        callback(grid[-1], end)
    return end


class _Derivative:
    """f in torchdiffeq's terms: it passes times as tensors, and looks for its callback on the function."""

    def __init__(self, dxdu: Derivative, start: float, callback: Callback | None) -> None:
        self._dxdu, self._start, self._callback = dxdu, start, callback

    def __call__(self, u: Tensor, x: Tensor) -> Tensor:
        return self._dxdu(float(u), x)

    def callback_accept_step(self, u: Tensor, x: Tensor, h: Tensor) -> None:
        """Report the step before this one: torchdiffeq gives the state that the accepted step started from."""
        if self._callback is not None and float(u) > self._start:
            self._callback(float(u), x)


class Solver(NamedTuple):
    """An entry of `SOLVERS`."""

    solve: Callable[..., Tensor]  # its keyword-only arguments are the solver's options
    adaptive: bool = False  # it chooses its own steps: a number of steps and a time shift have no effect
    stochastic: bool = False  # it takes `churn` after the callback
    joined: bool = False  # it takes a `Seam` after the callback


SOLVERS: dict[str, Solver] = {
    "euler": Solver(euler),
    "heun": Solver(heun),
    "multistep": Solver(multistep, joined=True),
    "sde": Solver(sde, stochastic=True),
    "dopri5": Solver(dopri5, adaptive=True),
}
"""Solvers by name. A new one is a function with the contract above and an entry here."""
