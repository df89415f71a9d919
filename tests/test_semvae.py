import json

import pytest
import torch

from sfd.data.shapes import ShapesSource
from sfd.encoders import convnet
from sfd.models.semvae import SemVAE, SemVAEConfig, SemVAEObjective
from sfd.training.config import TrainSettings
from sfd.training.tasks.semvae import SemVAETask
from sfd.training.trainer import fit
from sfd.utils import rng
from sfd.utils.errors import SFDError

SMALL = SemVAEConfig(input_channels=12, latent_channels=3, width=16, heads=2, blocks=1)


def make(config: SemVAEConfig = SMALL) -> SemVAE:
    with rng.seeded(0, "test"):
        return SemVAE(config).eval()


def test_logvar_is_clamped():
    model = make()
    with torch.no_grad():
        model.encoder[-1].bias[3:] = 100.0
    assert float(model.moments(torch.zeros(1, 12, 2, 2)).logvar.detach().max()) == 20


def test_training_lowers_the_loss(tmp_path):
    with rng.seeded(0, "test"):
        encoder = convnet.build(convnet.Config(widths=(8, 8, 16), channels=12)).eval()
    task = SemVAETask(make(), encoder, ShapesSource(128, seed=0), SemVAEObjective(), seed=0, batch_size=16)
    settings = TrainSettings(steps=60, batch_size=16, learning_rate=3e-3, log_every=1)
    task.finish(fit(task, settings, tmp_path, device=torch.device("cpu")))
    losses = [json.loads(line)["loss"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def test_an_encoder_of_another_width_is_refused():
    encoder = convnet.build(convnet.Config(widths=(8, 8, 16), channels=8))
    with pytest.raises(SFDError, match="takes features of 12 channels, got 8"):
        SemVAETask(make(), encoder, ShapesSource(4, seed=0), SemVAEObjective(), seed=0, batch_size=2)
