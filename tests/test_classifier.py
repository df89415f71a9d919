import numpy as np
import pytest
import torch

from helpers.pictures import Unlabelled
from sfd.data.shapes import ShapesSource
from sfd.evaluation.extractors.classifier import ClassifierExtractor, check_data, load_classifier
from sfd.models.convnet import ConvNetConfig
from sfd.training.config import TrainSettings
from sfd.training.tasks.classifier import ClassifierSettings, divide, train_classifier
from sfd.utils.errors import SFDError

CPU = torch.device("cpu")
NETWORK = ConvNetConfig(widths=(16, 32, 32))
SOURCE = ShapesSource(1000, seed=0, image_size=16)


class Darkened(Unlabelled):
    """Dark below, so that a rotation can be seen."""

    def load(self, indices):
        images = super().load(indices)
        images[:, 10:] //= 4
        return images


def settings(steps):
    training = TrainSettings(steps=steps, batch_size=64, learning_rate=3e-3, warmup=min(5, steps - 1))
    return ClassifierSettings(network=NETWORK, training=training, shift=1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifier")
    network = train_classifier(SOURCE, settings(60), folder, device=CPU)
    network.save(folder / "extractor")
    return ClassifierExtractor(network), folder / "extractor"


def test_a_short_training_beats_chance_on_held_out_images(trained):
    assert trained[0].accuracy > 0.25
    np.testing.assert_allclose(trained[0].extract(SOURCE.load(range(9))).probabilities.sum(axis=1), 1, rtol=1e-5)


def test_a_classifier_is_saved_and_loaded(trained):
    model, folder = trained
    loaded = load_classifier(folder, CPU)
    images = SOURCE.load(range(20))
    assert (loaded.identity, loaded.accuracy, loaded.classes) == (model.identity, model.accuracy, SOURCE.classes)
    assert loaded.trained_on == len(divide(SOURCE, settings(60))[0])
    np.testing.assert_array_equal(loaded.extract(images).features, model.extract(images).features)


def test_features_have_unit_variance_over_real_images(trained):
    seen = trained[0].extract(SOURCE.load(range(1000)))
    np.testing.assert_allclose(np.median(seen.features.std(axis=0)), 1, atol=0.1)


def test_without_classes_the_task_is_rotation(tmp_path):
    model = ClassifierExtractor(train_classifier(Darkened(1000, 16), settings(60), tmp_path, device=CPU))
    assert model.task == "4 rotations" and model.accuracy > 0.9
    assert model.extract(SOURCE.load([0])).probabilities is None


class Few:
    """Black images of given classes."""

    identity = "few"
    resident = True

    def __init__(self, labels, classes=("disk", "ring"), image_size=16):
        self.labels, self.classes, self.image_size = np.array(labels, np.int64), classes, image_size

    def __len__(self):
        return len(self.labels)

    def load(self, indices):
        return np.zeros((len(indices), self.image_size, self.image_size, 3), np.uint8)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (Few([0] * 20, (), 20), "multiple of 8, but data.image_size is 20; set it to 16 or 24"),
        (Few([0] * 20 + [1]), "ring: fewer than 2 held-out"),
        (Few([], ()), "the data set: fewer than 2 held-out"),
    ],
)
def test_unsuitable_data_are_refused(images, message):
    with pytest.raises(SFDError, match=message):
        check_data(images, settings(1))


def test_the_smallest_accepted_data_can_be_trained_on(tmp_path):
    few = Few([0] * 2 + [1] * 2)
    check_data(few, settings(1))
    model = train_classifier(few, settings(1), tmp_path, device=CPU)
    assert len(divide(few, settings(1))[1]) == 2 and model.config.accuracy is not None


def test_the_reference_is_disjoint_from_the_training_images():
    training, reference = divide(SOURCE, settings(1))
    assert len(training) + len(reference) == 1000 and len(reference) == pytest.approx(400, abs=10)
    assert not set(training.indices) & set(reference.indices)


def test_images_of_another_size_are_refused(trained):
    with pytest.raises(SFDError, match="16×16"):
        trained[0].extract(np.zeros((2, 32, 32, 3), np.uint8))
