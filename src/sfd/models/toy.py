"""A distribution of composite latents whose velocity field is known exactly: a mixture of Gaussians.

Tests hold the sampler against it, and benchmarks measure solvers on it without a network's error in between.

Let component c have weight w_c, and given c let the entries of x1 be independent, x1_i ~ N(m_ci, s_ci²). Entry i
belongs to a stream at time t_i, and x_i = t_i·x1_i + (1 − t_i)·x0_i with x0_i ~ N(0, 1). Then given c

    x_i ~ N(t_i·m_ci, V_ci),    V_ci = t_i²·s_ci² + (1 − t_i)²,

and x1_i and x0_i are jointly Gaussian with x_i, of covariances t_i·s_ci² and 1 − t_i. Conditioning on x_i gives

    E[x1_i | x, c] = m_ci + t_i·s_ci² / V_ci · (x_i − t_i·m_ci)
    E[x0_i | x, c] =          (1 − t_i) / V_ci · (x_i − t_i·m_ci).

The velocity is v_i(x) = E[x1_i − x0_i | x] = Σ_c p(c | x)·(E[x1_i | x, c] − E[x0_i | x, c]), where the component is
inferred from all entries of all streams at once, whatever their times: p(c | x) ∝ w_c · Π_i N(x_i; t_i·m_ci, V_ci).
That is where streams inform each other. Moving each stream at rate τ_k′ times this v carries N(0, 1) to the mixture
for every schedule, because d/du E[f(x(u))] = E[∇f·τ′(x1 − x0)] = E[∇f·τ′ v(x(u))] for every smooth f.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from sfd.latents import CompositeLatent
from sfd.utils import rng
from sfd.utils.errors import SFDError


class GaussianMixture:
    """A mixture of axis-aligned Gaussians over packed composite latents."""

    def __init__(self, composite: CompositeLatent, weights: Tensor, means: Tensor, stds: Tensor) -> None:
        """Describe the data.

        Args:
            composite: the streams, N entries in all.
            weights: (C,), positive; normalised here.
            means: (C, N).
            stds: (C, N), positive.
        """
        expected = (len(weights), composite.size)
        if tuple(means.shape) != expected or tuple(stds.shape) != expected:
            raise SFDError(
                f"means and stds of {expected[0]} components must have shape {expected}, "
                f"got {tuple(means.shape)} and {tuple(stds.shape)}"
            )
        if not bool((stds > 0).all() and (weights > 0).all()):
            raise SFDError("weights and standard deviations of a mixture must all be greater than 0")
        self.composite = composite
        self.weights = weights / weights.sum()
        self.means = means
        self.stds = stds

    def component(self, index: int) -> GaussianMixture:
        """Give one component alone: the data of one class, for guidance."""
        chosen = slice(index, index + 1)
        return GaussianMixture(self.composite, self.weights[chosen], self.means[chosen], self.stds[chosen])

    def sample(self, count: int, seed: int) -> Tensor:
        """Draw data: (count, N)."""
        generator = rng.generator(seed, "mixture")
        which = torch.from_numpy(generator.choice(len(self.weights), count, p=_exact(self.weights)))
        normals = torch.from_numpy(generator.standard_normal((count, self.composite.size))).to(self.means)
        return self.means[which] + self.stds[which] * normals

    def responsibilities(self, x: Tensor, times: Tensor) -> Tensor:
        """Infer the component, p(c | x): (B, C). Arguments as for `velocity`."""
        return torch.softmax(self._joint(x, times), dim=-1)

    def log_density(self, x: Tensor, times: Tensor) -> Tensor:
        """Evaluate log p(x) of the noised streams: (B,). Arguments as for `velocity`."""
        return self._joint(x, times).logsumexp(dim=-1)

    def velocity(self, x: Tensor, times: Tensor) -> Tensor:
        """Evaluate v(x) = E[x1 − x0 | x].

        Args:
            x: (B, N) packed.
            times: (K,), one per stream, in [0, 1]; or (B, K), each image's own.

        Returns:
            (B, N).
        """
        t = self._entry_times(x, times)
        variance = t**2 * self.stds**2 + (1 - t) ** 2  # (…, C, N)
        gain = (t * self.stds**2 - (1 - t)) / variance
        given_component = self.means + gain * (x[:, None] - t * self.means)  # (B, C, N)
        return torch.einsum("bc,bcn->bn", self.responsibilities(x, times), given_component)

    def transport(self, noise: Tensor) -> Tensor:
        """Carry noise (B, N) to data exactly: m + s·noise, for a single Gaussian and any schedule.

        There v_i depends on x_i alone, and x_i(t) = t·m_i + √V_i·x0_i solves dx/dt = v, since V′ = 2·(t·s² − (1 − t)).
        """
        if len(self.weights) > 1:
            raise SFDError(f"the exact map is known for one Gaussian, but this mixture has {len(self.weights)}")
        return self.means + self.stds * noise

    def _joint(self, x: Tensor, times: Tensor) -> Tensor:
        """Logarithm of w_c·p(x | c): (B, C)."""
        t = self._entry_times(x, times)
        variance = t**2 * self.stds**2 + (1 - t) ** 2  # (…, C, N)
        residual = x[:, None] - t * self.means  # (B, C, N)
        log_density = -0.5 * (residual**2 / variance + variance.log() + math.log(2 * math.pi)).sum(dim=-1)
        return self.weights.log() + log_density

    def _entry_times(self, x: Tensor, times: Tensor) -> Tensor:
        return self.composite.per_entry(times.to(x)).unsqueeze(-2)  # (1, N) or (B, 1, N), to go with (C, N)


def _exact(weights: Tensor) -> np.ndarray:
    """Probabilities that sum to 1 in float64, as numpy demands."""
    p = weights.double().cpu().numpy()
    return np.asarray(p / p.sum())
