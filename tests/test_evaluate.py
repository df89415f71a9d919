import json

import numpy as np
import pytest
from PIL import Image

from sfd.data.shapes import ShapesSource
from sfd.data.split import split
from sfd.evaluation.evaluate import METRICS, evaluate, evaluate_real, read_metrics
from sfd.evaluation.extractors._base import Extraction
from sfd.evaluation.metrics import Gaussian, gaussian
from sfd.evaluation.reference import RealImages, Reference, reference_of
from sfd.evaluation.samples import load_samples
from sfd.utils.errors import SFDError


class Thumbnails:
    """A simple extractor: features are 4×4 grey thumbnails, the class is in the first pixel."""

    name, identity, task, image_size = "thumbnails", "thumbnails-1", "nothing", 16

    def __init__(self, classes=(), trained_on=None, accuracy=None):
        self.classes, self.trained_on, self.accuracy = tuple(classes), trained_on, accuracy

    def extract(self, images):
        grey = images.astype(np.float32).mean(axis=3) / 255
        features = grey.reshape(len(images), 4, 4, 4, 4).mean(axis=(2, 4)).reshape(len(images), 16)
        if not self.classes:
            return Extraction(features, None)
        return Extraction(features, np.eye(len(self.classes), dtype=np.float32)[images[:, 0, 0, 0] % len(self.classes)])


SOURCE = ShapesSource(300, seed=0, image_size=16)
TRAINING, HELD_OUT = split(SOURCE, 0.5, 0)
REFERENCE = reference_of(HELD_OUT, Thumbnails(SOURCE.classes), "held-out images")
PLAIN = reference_of(HELD_OUT, Thumbnails(), "held-out images")
IMAGES = TRAINING.load(range(100))
LABELS = np.arange(100) % 10


def signed(images, labels):
    """Write the class into the first pixel."""
    result = images.copy()
    result[:, 0, 0] = np.asarray(labels)[:, None]
    return result


def test_class_accuracy_is_the_share_recognised_as_their_class():
    labels = np.repeat(np.arange(10), 10)
    shown = labels.copy()
    shown[:5] = 3  # half of class 0 look like class 3
    result = evaluate(signed(IMAGES, shown), labels, REFERENCE, name="samples")
    assert result.class_accuracy == pytest.approx(0.95)
    assert result.balanced


def test_metrics_are_saved_with_their_protocol(tmp_path):
    result = evaluate(IMAGES, LABELS, REFERENCE, name="samples", sampling={"steps": 50})
    result.write(tmp_path / "metrics.json")
    assert read_metrics(tmp_path / "metrics.json") == result
    written = json.loads((tmp_path / "metrics.json").read_text())
    assert written["sampling"] == {"steps": 50}
    assert written["protocol"]["reference_count"] == len(HELD_OUT)
    assert written["protocol"]["reference_identity"] == HELD_OUT.identity


def test_sfid_is_the_distance_of_spatial_features():
    seen = Thumbnails().extract(IMAGES)
    moments = gaussian(seen.features)
    scaled = Gaussian(moments.mean - 2, 9 * moments.covariance, 0)  # |Δμ|² + tr(Σ)·(3 − 1)²
    reference = Reference(PLAIN.extractor, PLAIN.protocol, None, moments, scaled)
    result = evaluate(seen._replace(spatial=seen.features), None, reference, name="samples")
    assert result.sfid == pytest.approx(16 * 4 + 4 * np.trace(moments.covariance))
    assert result.precision is result.recall is None
    assert evaluate(seen, None, reference, name="samples").sfid is None


def test_real_images_are_a_balanced_and_reproducible_choice():
    first, again = (evaluate_real(TRAINING, REFERENCE, 80, seed=4) for _ in range(2))
    assert first == again
    assert first.real and first.balanced and first.n_samples == 80
    assert evaluate_real(TRAINING, REFERENCE, 80, seed=5).frechet_distance != first.frechet_distance


@pytest.mark.parametrize(
    ("count", "given"),
    [
        (1, {"inception_score", "class_accuracy"}),
        (3, {"frechet_distance", "inception_score", "class_accuracy"}),
        (4, {"frechet_distance", "precision", "recall", "inception_score", "class_accuracy"}),
    ],
)
def test_few_samples_have_fewer_metrics_each_with_an_interval(count, given):
    result = evaluate(signed(IMAGES, LABELS)[:count], LABELS[:count], REFERENCE, name="samples")
    assert set(result.intervals) == given
    assert all(low <= getattr(result, metric) <= high for metric, (low, high) in result.intervals.items())
    assert {name for name in METRICS if getattr(result, name) is not None} == set(result.caveats) == given


def doubtful(samples=2000, reference=2000, size=16, moments=False, **judge):
    """The metrics of random features that have a caveat."""
    features = np.random.default_rng(0).normal(size=(max(samples, reference), size)).astype(np.float32)
    extractor = Thumbnails("ab", **judge)
    stored = gaussian(features) if moments else None

    class Images:
        image_size, identity = 16, "random"

        def __len__(self):
            return reference

        def load(self, indices):
            return np.zeros((len(indices), 16, 16, 3), np.uint8)

    against = Reference.of(RealImages("real", "id", Images(), stored), extractor)
    against = Reference(
        extractor, against.protocol, features[:reference], stored or gaussian(features[:reference]), None
    )
    labels = np.arange(samples) % 2
    seen = Extraction(features[:samples], np.eye(2, dtype=np.float32)[labels])
    return set(evaluate(seen, labels, against, name="samples").caveats)


FEATURES = {"frechet_distance", "precision", "recall"}
JUDGED = {"inception_score", "class_accuracy"}


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ({}, set()),
        ({"samples": 999}, FEATURES | JUDGED),
        ({"reference": 999}, FEATURES),
        ({"reference": 999, "moments": True}, {"precision", "recall"}),
        ({"size": 1001}, FEATURES),
        ({"trained_on": 1000, "accuracy": 0.71}, set()),
        ({"trained_on": 999}, FEATURES | JUDGED),
        ({"accuracy": 0.69}, FEATURES | JUDGED),
    ],
)
def test_unreliable_metrics_have_a_caveat(how, expected):
    assert doubtful(**how) == expected


@pytest.mark.parametrize("labels", [[0] * 99, [10] * 100])
def test_wrong_labels_are_refused(labels):
    with pytest.raises(SFDError, match="label"):
        evaluate(IMAGES, labels, REFERENCE, name="samples")


def write_images(folder, images, name="{:06d}.png", first=0):
    folder.mkdir(parents=True, exist_ok=True)
    for index, image in enumerate(images, first):
        Image.fromarray(image).save(folder / name.format(index))


def test_samples_are_read_with_their_record(tmp_path):
    write_images(tmp_path, IMAGES[:6])
    write_images(tmp_path, IMAGES[:1], "grid.png")
    record = {"labels": [0, 1, 0, 1, 0, 1], "classes": ["ring", "disk"], "sampling": {"steps": 8}, "model": "m-1"}
    (tmp_path / "samples.json").write_text(json.dumps(record))
    samples = load_samples(tmp_path)
    np.testing.assert_array_equal(samples.images.load(range(6)), IMAGES[:6])
    assert list(samples.labels_among(SOURCE.classes)) == [1, 0, 1, 0, 1, 0]
    assert samples.sampling == {"steps": 8, "model": "m-1"}


def test_a_million_samples_are_read_in_the_order_of_their_numbers(tmp_path):
    write_images(tmp_path, IMAGES[:4], first=999_998)
    (tmp_path / "samples.json").write_text("{}")
    np.testing.assert_array_equal(load_samples(tmp_path).images.load(range(4)), IMAGES[:4])


def test_sub_folders_are_classes_and_a_flat_folder_has_none(tmp_path):
    write_images(tmp_path / "a" / "star", IMAGES[:2])
    write_images(tmp_path / "a" / "disk", IMAGES[2:3])
    write_images(tmp_path / "flat", IMAGES[:2])
    assert list(load_samples(tmp_path / "a").labels_among(SOURCE.classes)) == [0, 4, 4]
    assert load_samples(tmp_path / "flat").labels_among(SOURCE.classes) is None


def test_an_unknown_class_is_named(tmp_path):
    write_images(tmp_path / "strar", IMAGES[:2])
    write_images(tmp_path / "disk", IMAGES[:2])
    with pytest.raises(SFDError, match="did you mean 'star'"):
        load_samples(tmp_path).labels_among(SOURCE.classes)


def test_samples_of_several_sizes_are_refused_or_cropped_as_for_training(tmp_path):
    write_images(tmp_path, IMAGES[:1])
    Image.fromarray(IMAGES[1][:8, :12]).save(tmp_path / "000001.png")
    with pytest.raises(SFDError, match="12×8"):
        load_samples(tmp_path)
    assert load_samples(tmp_path, 16).images.load(range(2)).shape == (2, 16, 16, 3)
    (tmp_path / "samples.json").write_text("{}")
    with pytest.raises(SFDError, match=r"000001\.png.*12×8"):
        load_samples(tmp_path).images.load(range(2))


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"labels": [0, 1], "classes": ["disk", "ring"]}, "2 labels among 2 classes for 3"),
        ({"seeds": [1, 2, 3, 4]}, "3 of its 4"),
        ({}, r"000001\.png"),
    ],
)
def test_an_incomplete_or_damaged_folder_of_samples_is_refused(tmp_path, record, words):
    write_images(tmp_path, IMAGES[:3])
    (tmp_path / "samples.json").write_text(json.dumps(record))
    (tmp_path / "000001.png").write_bytes(b"no image")
    with pytest.raises(SFDError, match=words):
        load_samples(tmp_path).images.load(range(3))
