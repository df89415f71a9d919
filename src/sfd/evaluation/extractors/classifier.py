"""The embedded extractor: a classifier trained on real images that the generative model never sees.

It is trained on a part of the held-out images; the others test it and are the reference that samples are compared with.
Where images have no classes it learns to tell by how many quarter turns an image was rotated (Gidaris et al. 2018,
arXiv 1803.07728), which takes no labels and still makes features of what is in the image.

What a classifier of a few classes knows at its end is little but the class: images without their colours would pass.
The features are therefore the average of every stage, fine to coarse, each entry in units of its deviation over
real images, so that texture counts as well as meaning.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from sfd.data.images import ImageSource, to_tensor
from sfd.data.split import split
from sfd.evaluation.evaluate import NEIGHBOURS
from sfd.evaluation.extractors import _base
from sfd.evaluation.extractors._base import Extraction
from sfd.models.convnet import ConvNet, ConvNetConfig
from sfd.training.config import TrainSettings
from sfd.training.order import EpochOrder
from sfd.training.trainer import fit
from sfd.utils import distributed, rng
from sfd.utils.config import Settings, parse
from sfd.utils.errors import SFDError

ROTATIONS = 4
CHUNK = 256  # images that go through the network at once
CALIBRATION = 2048  # real images, at most, over which the features' deviations are measured
NETWORK = ConvNetConfig(widths=(16, 32, 64, 128))


class Config(Settings):
    """What a classifier is built from."""

    image_size: int = Field(gt=0)
    classes: tuple[str, ...] = Field((), description="empty: it tells rotations")
    network: ConvNetConfig = NETWORK

    @property
    def outputs(self) -> int:
        """Number of logits."""
        return len(self.classes) or ROTATIONS


class ClassifierSettings(Settings):
    """How the classifier is made from the held-out images."""

    network: ConvNetConfig = NETWORK
    training: TrainSettings = TrainSettings(
        steps=400, batch_size=128, learning_rate=2e-3, weight_decay=0.05, warmup=50, decay="cosine"
    )
    reference: float = Field(0.4, gt=0, lt=1, description="share of held-out images kept to test and to compare with")
    shift: int = Field(2, ge=0, description="largest random shift in training, pixels")
    flip: bool = Field(True, description="mirror half of the training images")
    seed: int = Field(0, ge=0)


class Classifier(nn.Module):
    """Images (B, 3, S, S) in [-1, 1] to (features (B, D), logits (B, outputs)); an `Extractor`.

    D is the sum of the network's widths.
    """

    name = "classifier"

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.body = ConvNet(config.network)
        self.head = nn.Linear(config.network.channels, config.outputs)
        self.scale: Tensor  # (D,), each feature's deviation over real images; 1 until calibrated
        self.register_buffer("scale", torch.ones(sum(config.network.widths)))
        self.accuracy: float | None = None

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Compute features and logits."""
        pooled = [level.mean(dim=(2, 3)) for level in self.body.pyramid(images)]
        return torch.cat(pooled, dim=1) / self.scale, self.head(pooled[-1])

    def calibrate(self, images: np.ndarray) -> None:
        """Measure the features' deviations over real uint8 images (B, S, S, 3) and divide by them from now on."""
        deviations = torch.from_numpy(self.extract(images).features.std(axis=0)).to(self.scale.device)
        # A feature that never changes, such as that of a dead channel, stays as it is.
        self.scale *= torch.where(deviations > 1e-6, deviations, 1)

    @property
    def image_size(self) -> int:
        """Rows and columns of its images."""
        return self.config.image_size

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes it tells; empty if it tells rotations."""
        return self.config.classes

    @property
    def task(self) -> str:
        """What it was trained to tell."""
        return f"{len(self.classes)} classes" if self.classes else f"{ROTATIONS} rotations"

    @property
    def identity(self) -> str:
        """Hash of configuration and weights."""
        return _base.identity(self.name, self.config.model_dump(mode="json"), self.state_dict())

    @torch.no_grad()
    def extract(self, images: np.ndarray) -> Extraction:
        """Compute features and class probabilities of uint8 images (B, S, S, 3)."""
        expected = (self.image_size, self.image_size, 3)
        if images.shape[1:] != expected:
            raise SFDError(
                f"the extractor takes images of shape {expected}, got {images.shape[1:]}; "
                "evaluate with an extractor trained at the samples' size"
            )
        device = self.head.weight.device
        parts = [self(to_tensor(images[i : i + CHUNK]).to(device)) for i in range(0, len(images), CHUNK)]
        features = torch.cat([f for f, _ in parts]).float().cpu().numpy()
        if not self.classes:
            return Extraction(features, None)
        return Extraction(features, torch.cat([logits for _, logits in parts]).float().softmax(dim=1).cpu().numpy())

    def save(self, folder: Path) -> None:
        """Write the directory that `load` reads."""
        record = {"config": self.config.model_dump(mode="json"), "accuracy": self.accuracy}
        _base.save(folder, self.name, record, self.state_dict())


def load(folder: Path, device: torch.device) -> Classifier:
    """Read a classifier's directory.

    Raises:
        SFDError: the directory is missing, damaged, or its weights do not fit its configuration.
    """
    record, tensors = _base.read(folder)
    model = Classifier(parse(Config, record.get("config", {}), str(folder / "extractor.json")))
    try:
        model.load_state_dict(tensors)
    except RuntimeError:
        raise SFDError(f"{folder}: the weights do not fit extractor.json; train the extractor again") from None
    model.accuracy = record.get("accuracy")
    return model.eval().to(device)


class ClassifierTask:
    """Trains a classifier, on classes or on rotations."""

    name = "evaluation classifier"

    def __init__(self, source: ImageSource, settings: ClassifierSettings) -> None:
        self.source, self.settings = source, settings
        config = Config(image_size=source.image_size, classes=tuple(source.classes), network=settings.network)
        with rng.seeded(settings.seed, "evaluation classifier"):
            self.model: nn.Module = Classifier(config)
        self._order = EpochOrder(settings.seed, len(source))
        self._labels = np.asarray(source.labels)

    def batch(self, step: int, samples: range) -> dict[str, Tensor]:
        """Load some slots of a step, augmented."""
        indices = self._order.indices(step, samples, self.settings.training.batch_size)
        images, labels = self.source.load(indices), self._labels[indices]
        generators = [rng.generator(self.settings.seed, "augmentation", step, slot) for slot in samples]
        seen = augment(images, generators, self.settings.shift, self.settings.flip)
        if not self.source.classes:
            labels = np.array([g.integers(ROTATIONS) for g in generators])
            seen = np.stack([np.rot90(image, turns) for image, turns in zip(seen, labels, strict=True)])
        return {"images": to_tensor(seen), "labels": torch.from_numpy(labels), "indices": torch.from_numpy(indices)}

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Cross-entropy, lightly smoothed, and the accuracy on the batch."""
        _, logits = model(batch["images"])
        loss = F.cross_entropy(logits.float(), batch["labels"], label_smoothing=0.05)
        return {"loss": loss, "accuracy": (logits.argmax(dim=1) == batch["labels"]).float().mean()}


def augment(images: np.ndarray, generators: Sequence[np.random.Generator], shift: int, flip: bool) -> np.ndarray:
    """Shift each uint8 image of (B, S, S, 3) by up to `shift` pixels, edges reflected, and mirror half of them."""
    size, result = images.shape[1], np.empty_like(images)
    padded = np.pad(images, ((0, 0), (shift, shift), (shift, shift), (0, 0)), mode="reflect")
    for row, generator in enumerate(generators):
        top, left, mirror = (*generator.integers(2 * shift + 1, size=2), generator.integers(2))
        moved = padded[row, top : top + size, left : left + size]
        result[row] = moved[:, ::-1] if flip and mirror else moved
    return result


def divide(held_out: ImageSource, settings: ClassifierSettings) -> tuple[ImageSource, ImageSource]:
    """Cut the held-out images in two: what the classifier learns from, and what tests it and is the reference."""
    return split(held_out, settings.reference, settings.seed)


def check_data(held_out: ImageSource, settings: ClassifierSettings) -> None:
    """Verify, before hours of work, that the held-out images will do for the classifier and as the reference.

    Raises:
        SFDError: their size does not fit the network, a class has too few of them to be cut in two, or too few would
            be left as the reference.
    """
    size, side = held_out.image_size, settings.network.downsample
    if size % side:
        fitting = " or ".join(str(s) for s in (size // side * side, size // side * side + side) if s)
        raise SFDError(
            f"the evaluation classifier needs images whose side is a multiple of {side}, but data.image_size is "
            f"{size}; set it to {fitting}, or give evaluation.classifier.network fewer widths or a smaller stem_stride"
        )
    counts = np.bincount(held_out.labels, minlength=max(1, len(held_out.classes)))
    if counts.min() < 2:
        scarce = int(counts.argmin())
        what = f"class {held_out.classes[scarce]!r}" if held_out.classes else "the data set"
        raise SFDError(
            f"{what} has {counts[scarce]} held-out image{'' if counts[scarce] == 1 else 's'}, but the evaluation "
            "needs 2, one to learn from and one to compare with; raise data.holdout, or give it at least "
            "2 / data.holdout images in all"
        )
    count = len(divide(held_out, settings)[1])
    if count <= NEIGHBOURS:
        raise SFDError(
            f"of {len(held_out)} held-out images {count} would be the reference, but precision and recall need at "
            f"least {NEIGHBOURS + 1}; add images, or raise data.holdout or evaluation.classifier.reference"
        )


def train(held_out: ImageSource, settings: ClassifierSettings, folder: Path, *, device: torch.device) -> Classifier:
    """Train the classifier, or go on training it; test it on images it never saw; save it as `folder/extractor`.

    Args:
        held_out: real images that the generative model is not trained on.
        settings: how.
        folder: where checkpoints, the log and the result go.
        device: where to train.
    """
    training, reference = divide(held_out, settings)
    model = fit(ClassifierTask(training, settings), settings.training, folder, device=device)
    assert isinstance(model, Classifier)
    model.calibrate(training.load(np.arange(min(len(training), CALIBRATION))))
    model.accuracy = accuracy(model, reference)
    if distributed.is_main_process():
        model.save(folder / "extractor")
    return model


@torch.no_grad()
def accuracy(model: Classifier, source: ImageSource) -> float:
    """Share of images (or of their rotations, all four of each) that a classifier tells right."""
    labels, right = np.asarray(source.labels), 0
    turns = (0,) if model.classes else range(ROTATIONS)
    device = model.head.weight.device
    for start in range(0, len(source), CHUNK):
        indices = np.arange(start, min(start + CHUNK, len(source)))
        images = source.load(indices)
        for turn in turns:
            _, logits = model(to_tensor(np.rot90(images, turn, axes=(1, 2)).copy()).to(device))
            truth = labels[indices] if model.classes else turn
            right += int((logits.argmax(dim=1).cpu().numpy() == truth).sum())
    return right / (len(source) * len(turns))
