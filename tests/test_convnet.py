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


def test_the_pyramid_has_one_level_per_stage_and_ends_in_the_features():
    net, images = network(widths=(8, 16, 24), blocks=2), torch.randn(2, 3, 32, 32)
    levels = net.pyramid(images)
    assert [tuple(level.shape[1:]) for level in levels] == [(8, 16, 16), (16, 8, 8), (24, 4, 4)]
    torch.testing.assert_close(levels[-1], net(images), rtol=0, atol=0)


def test_widths_must_be_multiples_of_the_group_size():
    with pytest.raises(SFDError, match="multiples of 8"):
        parse(ConvNetConfig, {"widths": [12]})
