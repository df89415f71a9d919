"""Solvers of dx/du = velocity(u, x) on one smooth piece of [0, 1], stateless.

A new file here is a new solver (docs/extending-solvers.md). Each module holds `Options`, a `Settings` record,
`ADAPTIVE` and `solve(velocity, x, points, options, callback)`; `Solver` is the contract.
"""

from __future__ import annotations

from sfd.solvers._base import Callback, Solver, Velocity, check_steps, load_solver

__all__ = ["Callback", "Solver", "Velocity", "check_steps", "load_solver"]
