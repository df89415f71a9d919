import pytest
import torch

from sfd.models.pca import PCAConfig, fit_pca
from sfd.utils.errors import SFDError


def features(count: int = 40, channels: int = 6, mean: float = 0.0) -> torch.Tensor:
    """(count, channels, 3, 2), of unequal variances and rotated."""
    draw = torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(channels, channels, generator=draw))[0]
    spread = 2.0 ** -torch.arange(channels)
    samples = torch.randn(count, channels, 3, 2, generator=draw) * spread[:, None, None]
    return torch.einsum("ij,bjhw->bihw", rotation, samples) + mean


def fit(data: torch.Tensor, latent_channels: int, **options: bool):
    return fit_pca(data.split(7), PCAConfig(input_channels=data.shape[1], latent_channels=latent_channels, **options))


def test_all_components_reconstruct_the_features():
    data = features(mean=3.0)
    pca = fit(data, 6)
    torch.testing.assert_close(pca.decode(pca.encode(data)), data, rtol=1e-5, atol=1e-5)
    assert pca.explained == pytest.approx(1)
    data[:, 2] = 5.0  # a constant channel
    pca = fit(data, 6, standardize=True)
    torch.testing.assert_close(pca.decode(pca.encode(data)), data, rtol=1e-5, atol=1e-5)


def test_the_error_is_the_discarded_variance():
    """Eckart and Young 1936: the squared error of the best linear map is the sum of the discarded eigenvalues."""
    data = features()
    pca = fit(data, 2)
    samples = data.numel() // 6
    error = (pca.decode(pca.encode(data)) - data).square().sum() / (samples - 1)
    assert float(error) == pytest.approx(float(pca.total_variance * (1 - pca.explained)), rel=1e-4)


def test_latents_are_uncorrelated_and_sorted_or_white():
    data = features()
    white = fit(data, 4, whiten=True).encode(data).movedim(1, -1).flatten(0, 2)
    torch.testing.assert_close(torch.cov(white.T), torch.eye(4), rtol=0, atol=1e-4)
    latents = fit(data, 4).encode(data).movedim(1, -1).flatten(0, 2)
    covariance = torch.cov(latents.T)
    torch.testing.assert_close(covariance, torch.diag(covariance.diagonal()), rtol=0, atol=1e-5)
    assert covariance.diagonal().tolist() == sorted(covariance.diagonal().tolist(), reverse=True)


def test_the_fit_does_not_depend_on_the_batches():
    data = features()
    one = fit_pca([data], PCAConfig(input_channels=6, latent_channels=3))
    torch.testing.assert_close(fit(data, 3).components, one.components)


def test_a_large_mean_keeps_precision():
    near, far = features(), features(mean=1000.0)
    torch.testing.assert_close(fit(far, 3).variance, fit(near, 3).variance, rtol=1e-4, atol=0)


@pytest.mark.parametrize("whiten", [False, True])
def test_standardised_components_are_those_of_standardised_features(whiten):
    data = features(mean=2.0)
    deviation, mean = data.std((0, 2, 3), keepdim=True), data.mean((0, 2, 3), keepdim=True)
    pca = fit(data, 3, whiten=whiten, standardize=True)
    plain = fit((data - mean) / deviation, 3, whiten=whiten)
    torch.testing.assert_close(pca.encode(data), plain.encode((data - mean) / deviation), rtol=1e-3, atol=1e-4)
    assert pca.explained == pytest.approx(plain.explained) and float(pca.total_variance) == pytest.approx(6)


def test_features_of_other_channels_are_refused():
    pca = fit(features(), 2)
    with pytest.raises(SFDError, match="takes features of 6 channels, got 5"):
        pca.encode(torch.zeros(1, 5, 2, 2))
    with pytest.raises(SFDError, match="takes features of 5 channels, got 6"):
        fit_pca([features()], PCAConfig(input_channels=5, latent_channels=2))
    with pytest.raises(ValueError, match="7 components cannot be had of 6 channels"):
        PCAConfig(input_channels=6, latent_channels=7)
