"""Flow matching: the path's ends and derivative, base times, and losses in closed form."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sfd import flow
from sfd.latents import CompositeLatent, Stream

COMPOSITE = CompositeLatent(
    streams=(Stream(name="texture", channels=3, grid=4, patch_size=2), Stream(name="semantic", channels=5, grid=2))
)


def pair(batch: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, batch, COMPOSITE.size, generator=generator).unbind(0))


def test_the_path_runs_from_noise_to_data():
    x1, x0 = pair()
    assert torch.equal(flow.interpolate(x1, x0, torch.tensor(0.0)), x0)
    assert torch.equal(flow.interpolate(x1, x0, torch.tensor(1.0)), x1)
    times = torch.tensor([[0.0, 1.0]]).expand(4, 2)
    x = COMPOSITE.unpack(flow.interpolate(x1, x0, COMPOSITE.per_entry(times)))
    assert torch.equal(x["texture"], COMPOSITE.unpack(x0)["texture"])
    assert torch.equal(x["semantic"], COMPOSITE.unpack(x1)["semantic"])


@given(st.floats(0, 1))
def test_velocity_is_the_derivative_of_the_path(t):
    x1, x0 = (x.double() for x in pair())
    t, step = torch.tensor(t, dtype=torch.float64), 1e-3
    difference = (flow.interpolate(x1, x0, t + step) - flow.interpolate(x1, x0, t - step)) / (2 * step)
    torch.testing.assert_close(difference, flow.velocity_target(x1, x0), rtol=1e-9, atol=1e-9)


def test_logit_normal_times_have_normal_logits():
    normals = torch.linspace(-4, 4, 9)
    torch.testing.assert_close(torch.logit(flow.sample_base_time(normals, "logit_normal")), normals)


def test_uniform_times_are_uniform():
    u = flow.sample_base_time(torch.randn(20000, generator=torch.Generator().manual_seed(0)), "uniform").sort().values
    deviation = (u - torch.arange(20000) / 20000).abs().max().item()  # Kolmogorov–Smirnov
    assert deviation < 1.95 / math.sqrt(20000)


def test_velocity_loss_is_a_weighted_mean_over_all_entries():
    target, weights = torch.zeros(2, 4), torch.tensor([1.0, 1.0, 2.0, 2.0])
    prediction = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 3.0]])
    torch.testing.assert_close(flow.velocity_loss(prediction, target, weights), torch.tensor([1 / 4, 18 / 4]))


def test_cosine_loss_of_known_angles():
    target = torch.tensor([[[1.0, 1.0], [0.0, 0.0]]])  # one sample, two channels, two positions
    prediction = torch.tensor([[[5.0, 0.0], [0.0, 2.0]]])  # parallel, then perpendicular
    torch.testing.assert_close(flow.cosine_loss(prediction, target), torch.tensor([0.5]))
    torch.testing.assert_close(flow.cosine_loss(-target, target), torch.tensor([2.0]))


def test_losses_are_float32_for_bf16_predictions():
    x1, x0 = pair()
    assert flow.velocity_loss(x1.bfloat16(), x0, torch.ones(COMPOSITE.size)).dtype == torch.float32
    positions = COMPOSITE.per_position(x1)
    assert flow.cosine_loss(positions.bfloat16(), positions).dtype == torch.float32


def test_repa_loss_compares_tokens_in_row_major_order():
    features = torch.randn(2, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    tokens = torch.stack([features[:, :, i, j] for i in range(2) for j in range(2)], dim=1)
    torch.testing.assert_close(flow.repa_loss(7 * tokens, features), torch.zeros(2), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="do not fit"):
        flow.repa_loss(tokens[:, :3], features)


def test_positions_are_on_the_shared_grid():
    x, _ = pair()
    positions, latents = COMPOSITE.per_position(x), COMPOSITE.unpack(x)
    assert positions.shape == (4, 3 * 2 * 2 + 5, 4)
    # The last position holds the texture's last 2×2 entries of each channel, then the semantic channels.
    assert torch.equal(positions[:, :12, 3], latents["texture"][:, :, 2:, 2:].flatten(1))
    assert torch.equal(positions[:, 12:, 3], latents["semantic"][:, :, 1, 1])
