import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sfd.models.convnet import ConvNet, ConvNetConfig
from sfd.utils import rng
from sfd.utils.config import parse
from sfd.utils.errors import SFDError


def network(**fields):
    with rng.seeded(0, "test"):
        return ConvNet(ConvNetConfig(**fields)).eval()


@given(stride=st.integers(1, 4), stages=st.integers(1, 3), blocks=st.integers(1, 2), size=st.integers(1, 3))
@settings(max_examples=15, deadline=None)
def test_the_grid_is_the_image_over_downsample(stride, stages, blocks, size):
    config = ConvNetConfig(widths=(8, 16, 24)[:stages], blocks=blocks, stem_stride=stride)
    side = size * config.downsample
    assert ConvNet(config)(torch.zeros(2, 3, side, side)).shape == (2, config.channels, size, size)


def test_features_do_not_depend_on_the_batch():
    net, images = network(), torch.randn(5, 3, 32, 32)
    together = net(images)
    alone = torch.cat([net(image[None]) for image in images])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_the_pyramid_has_a_level_a_stage_and_ends_in_the_features():
    net, images = network(widths=(8, 16, 24), blocks=2), torch.randn(2, 3, 32, 32)
    levels = net.pyramid(images)
    assert [tuple(level.shape[1:]) for level in levels] == [(8, 16, 16), (16, 8, 8), (24, 4, 4)]
    torch.testing.assert_close(levels[-1], net(images), rtol=0, atol=0)


def test_every_parameter_gets_a_gradient():
    net = network(blocks=2)
    net(torch.randn(2, 3, 32, 32)).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


def test_an_image_side_that_does_not_divide_is_refused():
    with pytest.raises(SFDError, match="multiple of 8"):
        network()(torch.zeros(1, 3, 30, 32))


def test_widths_must_fill_whole_normalisation_groups():
    with pytest.raises(SFDError, match="multiples of 8"):
        parse(ConvNetConfig, {"widths": [12]})
