"""A small classifier whose features compare images: the network of the evaluation classifier.

Without classes it learns to predict by how many quarter turns an image was rotated (Gidaris et al. 2018, arXiv
1803.07728), which needs no labels and still gives features of the content.

The last features of a classifier of few classes hold little but the class: images without colours would pass.
The features are therefore the average of every stage, fine to coarse, each entry in units of its deviation over
real images, so that texture counts as well as meaning.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from sfd.models.component import Component
from sfd.models.convnet import ConvNet, ConvNetConfig
from sfd.utils.config import Settings

ROTATIONS = 4
CHUNK = 256  # images that go through the network at once
NETWORK = ConvNetConfig(widths=(16, 32, 64, 128))


class ClassifierConfig(Settings):
    """What a classifier is built from."""

    image_size: int = Field(gt=0)
    classes: tuple[str, ...] = Field((), description="empty: it predicts rotations")
    network: ConvNetConfig = NETWORK
    trained_on: int | None = Field(None, description="number of images; null until trained")
    accuracy: float | None = Field(None, description="accuracy on unseen real images; null until tested")

    @property
    def outputs(self) -> int:
        """Number of logits."""
        return len(self.classes) or ROTATIONS


class Classifier(Component):
    """Images (B, 3, S, S) in [-1, 1] to (features (B, D), logits (B, outputs)).

    D is the sum of the network's widths.
    """

    kind, name = "evaluation classifier", "classifier"
    config: ClassifierConfig

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        self.config = config
        self.body = ConvNet(config.network)
        self.head = nn.Linear(config.network.channels, config.outputs)
        self.scale: Tensor  # (D,), each feature's deviation over real images; 1 until calibrated
        self.register_buffer("scale", torch.ones(sum(config.network.widths)))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Compute features and logits."""
        pooled = [level.mean(dim=(2, 3)) for level in self.body.pyramid(images)]
        return torch.cat(pooled, dim=1) / self.scale, self.head(pooled[-1])

    @torch.no_grad()
    def predict(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Compute features (B, D) and logits (B, outputs) of images (B, 3, S, S) in [-1, 1]; float32, on the CPU."""
        chunks = [self(chunk.to(self.scale.device)) for chunk in images.split(CHUNK)]
        features, logits = zip(*chunks, strict=True)
        return torch.cat(features).float().cpu(), torch.cat(logits).float().cpu()

    def calibrate(self, images: Tensor) -> None:
        """Measure the features' deviations over real images (B, 3, S, S) and divide by them from now on."""
        deviations = torch.from_numpy(self.predict(images)[0].numpy().std(axis=0)).to(self.scale.device)
        # A feature that never changes, such as that of a dead channel, stays as it is.
        self.scale *= torch.where(deviations > 1e-6, deviations, 1)


Config, build = ClassifierConfig, Classifier  # as `component.load` calls them
