"""Fine-tuning starts from every tensor that fits."""

from __future__ import annotations

import pytest
import torch

from sfd.models.dit import LightningDiT
from sfd.models.warm_start import warm_start
from sfd.utils.errors import SFDError
from test_transformer import EQUAL, awake, configuration, inputs

CLASSES = ("ant", "bee", "cat", "dog", "elk")
CLOCKS = ("semantic", "texture")


def test_the_same_network_on_the_same_classes_gives_the_same():
    config = configuration(clocks=CLOCKS)
    source, network = awake(config), LightningDiT(config, seed=5)
    assert warm_start(network, source, CLASSES, CLASSES) == []
    assert torch.equal(network(*inputs(config)).velocity, source(*inputs(config)).velocity)


def test_other_classes_start_fresh_and_the_null_class_is_kept():
    source = awake(configuration())
    network = LightningDiT(configuration(num_classes=2), seed=5)
    before = network.class_embedding.weight.detach().clone()
    assert warm_start(network, source, ("fox", "bee"), CLASSES) == ["class fox"]
    rows = network.class_embedding.weight
    assert torch.equal(rows[0], before[0])
    assert torch.equal(rows[1], source.class_embedding.weight[1])
    assert torch.equal(rows[2], source.class_embedding.weight[5])


def test_streams_are_matched_by_name():
    source = awake(configuration(clocks=CLOCKS))
    network = LightningDiT(configuration(EQUAL[::-1], clocks=CLOCKS), seed=5)
    assert warm_start(network, source, CLASSES, CLASSES) == []
    x, times, labels = inputs(source.config)
    there = source(x, times, labels).velocity.split([64, 32], dim=1)
    here = network(torch.cat([x[:, 64:], x[:, :64]], dim=1), times.flip(1), labels).velocity.split([32, 64], dim=1)
    torch.testing.assert_close(here[::-1], there, rtol=1e-4, atol=1e-5)


def test_what_the_source_has_not_starts_fresh():
    source = awake(configuration(EQUAL[:1], depth=1))
    network = LightningDiT(configuration(repa_block=1, repa_width=8, repa_channels=7), seed=5)
    fresh = warm_start(network, source, CLASSES, CLASSES)
    assert {name.split(".")[0] for name in fresh} == {"blocks", "embeddings", "heads", "projector"}
    assert all(name.startswith("blocks.1") for name in fresh if name.startswith("blocks"))


def test_a_network_of_another_width_is_refused():
    with pytest.raises(SFDError, match="width 48"):
        warm_start(LightningDiT(configuration(width=96)), awake(configuration()), CLASSES, CLASSES)
