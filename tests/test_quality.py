# ruff: noqa: E402
"""What the benchmark says of quality: differences of curves, losses on held-out images, and networks partly in bf16."""

from __future__ import annotations

import copy

import numpy as np
import pytest

pytest.skip("the benchmarks are being rewritten", allow_module_level=True)
import torch

from benchmarks.speed import error_sources, quality
from sfd.generation.model import Model
from sfd.models.dit import LightningDiT
from sfd.models.inference import in_bf16


@pytest.fixture(scope="module")
def network(finished):
    """A trained network of the tiny run, its modulations moved away from zero."""
    network = copy.deepcopy(finished.model.transformer)
    with torch.no_grad():
        for block in network.blocks:
            block.modulation.weight.normal_(std=0.1)
    return network


def velocity(network):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, network.config.composite.size, generator=generator)
    with torch.no_grad():
        return network(x, torch.rand(4, 2, generator=generator), torch.arange(4)).velocity


def test_a_curve_that_lies_higher_by_a_share_differs_by_that_share():
    plain = np.linspace(3, 1, 40)
    row = quality.compared(list(1.02 * plain), list(plain))
    assert row["its_relative_difference"] == pytest.approx(0.02)
    assert row["largest_relative_difference"] == pytest.approx(0.02)
    assert row["loss_in_the_last_quarter"] == pytest.approx(1.02 * plain[-10:].mean())


def test_what_is_trained_otherwise_lies_elsewhere(tmp_path, monkeypatch):
    ways = [quality.folder(tmp_path, way, torch.device("cpu")) for way in quality.WAYS]
    assert len(set(ways)) == len(ways) and ways[0].name.startswith("float32-cpu-")
    assert quality.folder(tmp_path, "bf16", torch.device("cpu")) == ways[1]
    other = quality.folder(tmp_path, "bf16", torch.device("mps"))
    monkeypatch.setattr(quality, "JUDGED", [*quality.JUDGED, "sample.steps=12"])
    changed = quality.folder(tmp_path, "bf16", torch.device("cpu"))
    assert len({ways[1], other, changed}) == 3


def test_noise_of_single_steps_is_smoothed_away():
    curve = np.ones(40)
    curve[::5] += 0.1
    np.testing.assert_allclose(quality.smoothed(curve), 1.02)


def test_the_held_out_loss_of_a_velocity_of_zero_is_the_weighted_variance_of_data_and_noise(finished, tmp_path):
    latents = quality.held_out(finished, tmp_path)
    assert len(latents) == len(finished.images[1])
    network = LightningDiT(finished.model.transformer.config)  # a new one's output is zero
    model = Model(network, finished.model.schedule, finished.texture, finished.model.classes)
    composite = network.config.composite
    channels = {s.name: s.channels * s.grid**2 for s in composite.streams}
    expected = sum(2 * s.weight * channels[s.name] for s in composite.streams) / sum(channels.values())
    assert quality.loss(model, latents, batch_size=40) == pytest.approx(expected, rel=0.15)


def test_a_network_of_which_nothing_is_in_bf16_is_the_network(network):
    torch.testing.assert_close(velocity(error_sources.in_part(network, [])), velocity(network), rtol=0, atol=0)


@pytest.mark.parametrize("name", [*error_sources.PRODUCTS, error_sources.ATTENTION])
def test_each_part_in_bf16_errs_by_less_than_the_whole_network(network, name):
    truth = velocity(network)
    part, whole = ((velocity(n) - truth).norm() for n in (error_sources.in_part(network, [name]), in_bf16(network)))
    assert 0 < part < whole


@pytest.mark.parametrize("operand", error_sources.OPERANDS)
def test_each_operand_in_bf16_errs_by_less_than_the_whole_network(network, operand):
    truth = velocity(network)
    part, whole = ((velocity(n) - truth).norm() for n in (error_sources.rounded(network, operand), in_bf16(network)))
    assert 0 < part < whole
