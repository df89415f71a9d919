import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from sfd.data.shapes import ShapesSource
from sfd.data.split import split
from sfd.evaluation.evaluate import compare, evaluate, evaluate_real, measure, read_metrics
from sfd.evaluation.extractors._base import Extraction
from sfd.evaluation.metrics import Gaussian, gaussian
from sfd.evaluation.samples import load_samples
from sfd.utils.errors import SFDError


class Thumbnails:
    """An extractor to work out by hand: features are 4×4 grey thumbnails, the class is in the first pixel."""

    name, identity, task, accuracy, image_size = "thumbnails", "thumbnails-1", "nothing", None, 16

    def __init__(self, classes=()):
        self.classes = tuple(classes)

    def extract(self, images):
        grey = images.astype(np.float32).mean(axis=3) / 255
        features = grey.reshape(len(images), 4, 4, 4, 4).mean(axis=(2, 4)).reshape(len(images), 16)
        if not self.classes:
            return Extraction(features, None)
        return Extraction(features, np.eye(len(self.classes), dtype=np.float32)[images[:, 0, 0, 0] % len(self.classes)])


SOURCE = ShapesSource(300, seed=0, image_size=16)
TRAINING, HELD_OUT = split(SOURCE, 0.5, 0)
REFERENCE = measure(HELD_OUT, Thumbnails(SOURCE.classes), "held-out images")
IMAGES = TRAINING.load(range(100))


def signed(images, labels):
    """Write the class into the first pixel."""
    result = images.copy()
    result[:, 0, 0] = np.asarray(labels)[:, None]
    return result


def test_the_reference_is_at_distance_zero_from_itself():
    result = evaluate(
        signed(HELD_OUT.load(range(len(HELD_OUT))), HELD_OUT.labels), HELD_OUT.labels, REFERENCE, name="same"
    )
    assert result.frechet_distance == pytest.approx(0, abs=1e-2)  # the first pixel differs a little
    assert result.precision == result.recall == result.class_accuracy == 1


def test_batches_give_what_the_whole_gives():
    labels = np.arange(100) % 10
    images = signed(IMAGES, labels)
    whole = evaluate(images, labels, REFERENCE, name="samples")
    parts = evaluate((images[i : i + 7] for i in range(0, 100, 7)), labels, REFERENCE, name="samples")
    assert whole == parts


def test_class_accuracy_counts_the_samples_of_the_class_asked_for():
    asked = np.repeat(np.arange(10), 10)
    shown = asked.copy()
    shown[:5] = 3  # half of class 0 came out as class 3
    result = evaluate(signed(IMAGES, shown), asked, REFERENCE, name="samples")
    assert result.class_accuracy == pytest.approx(0.95)
    assert result.accuracy_by_class["disk"] == pytest.approx(0.5)
    assert result.accuracy_by_class["star"] == 1
    assert result.balanced


def test_unlabelled_samples_have_no_class_accuracy():
    result = evaluate(signed(IMAGES, np.zeros(100, int)), None, REFERENCE, name="samples")
    assert result.class_accuracy is None and result.accuracy_by_class == {} and not result.balanced


def test_classes_of_unequal_number_are_told():
    labels = np.array([0] * 91 + list(range(1, 10)))
    assert not evaluate(signed(IMAGES, labels), labels, REFERENCE, name="samples").balanced


def test_metrics_carry_their_protocol_and_survive_the_disk(tmp_path):
    result = evaluate(signed(IMAGES, np.zeros(100, int)), None, REFERENCE, name="samples", sampling={"steps": 50})
    result.write(tmp_path / "metrics.json")
    assert read_metrics(tmp_path / "metrics.json") == result
    written = json.loads((tmp_path / "metrics.json").read_text())
    assert written["sampling"] == {"steps": 50}
    assert written["protocol"]["reference_count"] == len(HELD_OUT)
    assert written["protocol"]["reference_identity"] == HELD_OUT.identity


def test_metrics_written_before_there_was_sfid_are_read(tmp_path):
    result = evaluate(signed(IMAGES, np.zeros(100, int)), None, REFERENCE, name="samples")
    older = result.model_dump(mode="json")
    del older["sfid"], older["caveats"], older["protocol"]["stored_moments"]
    (tmp_path / "metrics.json").write_text(json.dumps(older))
    assert read_metrics(tmp_path / "metrics.json") == result


def test_spatial_features_have_a_distance_of_their_own():
    seen = Thumbnails().extract(IMAGES)
    moments = gaussian(seen.features)
    scaled = Gaussian(moments.mean - 2, 9 * moments.covariance, 0)  # |Δμ|² + tr(Σ)·(3 − 1)²
    reference = replace(REFERENCE, spatial=scaled, features=None)
    result = compare(seen._replace(spatial=seen.features), None, (), reference, balanced=True, name="samples")
    assert result.sfid == pytest.approx(16 * 4 + 4 * np.trace(moments.covariance))
    assert result.precision is result.recall is None
    assert compare(seen, None, (), reference, balanced=True, name="samples").sfid is None


def test_real_images_are_chosen_evenly_and_always_the_same():
    reference = measure(HELD_OUT, Thumbnails(), "held-out images")
    first, again = (evaluate_real(TRAINING, reference, 80, seed=4) for _ in range(2))
    assert first == again
    assert first.real and first.balanced and first.n_samples == 80
    assert evaluate_real(TRAINING, reference, 80, seed=5).frechet_distance != first.frechet_distance


def test_real_images_are_nearer_to_the_reference_than_noise():
    reference = measure(HELD_OUT, Thumbnails(), "held-out images")
    noise = np.random.default_rng(0).integers(256, size=(100, 16, 16, 3), dtype=np.uint8)
    real = evaluate_real(TRAINING, reference, 100)
    made = evaluate(noise, None, reference, name="noise")
    assert made.frechet_distance > 5 * real.frechet_distance
    assert made.recall < real.recall


@pytest.mark.parametrize("labels", [[0] * 99, [10] * 100, [-1] * 100])
def test_labels_that_do_not_fit_are_refused(labels):
    with pytest.raises(SFDError, match="label"):
        evaluate(signed(IMAGES, np.zeros(100, int)), labels, REFERENCE, name="samples")


def test_too_few_samples_are_refused():
    with pytest.raises(SFDError, match="more than k = 3"):
        evaluate(signed(IMAGES[:3], [0, 0, 0]), None, REFERENCE, name="samples")


def test_no_samples_are_refused():
    with pytest.raises(SFDError, match="no images"):
        evaluate([], None, REFERENCE, name="samples")


def write_images(folder, images, name="{:06d}.png"):
    folder.mkdir(parents=True, exist_ok=True)
    for index, image in enumerate(images):
        Image.fromarray(image).save(folder / name.format(index))


def test_samples_are_read_with_their_record(tmp_path):
    write_images(tmp_path, IMAGES[:6])
    write_images(tmp_path, IMAGES[:1], "grid.png")
    record = {"labels": [0, 1, 0, 1, 0, 1], "classes": ["ring", "disk"], "sampling": {"steps": 8}, "model": "m-1"}
    (tmp_path / "samples.json").write_text(json.dumps(record))
    samples = load_samples(tmp_path)
    np.testing.assert_array_equal(np.concatenate(list(samples.batches(4))), IMAGES[:6])
    assert list(samples.labels_among(SOURCE.classes)) == [1, 0, 1, 0, 1, 0]
    assert samples.sampling == {"steps": 8, "model": "m-1"}


def test_sub_folders_are_classes(tmp_path):
    write_images(tmp_path / "star", IMAGES[:2])
    write_images(tmp_path / "disk", IMAGES[2:3])
    samples = load_samples(tmp_path)
    assert list(samples.labels_among(SOURCE.classes)) == [0, 4, 4]


def test_a_flat_folder_has_no_classes(tmp_path):
    write_images(tmp_path, IMAGES[:2])
    assert load_samples(tmp_path).labels_among(SOURCE.classes) is None


def test_a_class_that_does_not_exist_is_named(tmp_path):
    write_images(tmp_path / "strar", IMAGES[:2])
    with pytest.raises(SFDError, match="did you mean 'star'"):
        load_samples(tmp_path).labels_among(SOURCE.classes)


def test_a_folder_without_images_is_refused(tmp_path):
    with pytest.raises(SFDError, match="no PNG"):
        load_samples(tmp_path)
    with pytest.raises(SFDError, match="there is no folder"):
        load_samples(tmp_path / "nowhere")


def test_a_record_of_other_images_is_refused(tmp_path):
    write_images(tmp_path, IMAGES[:3])
    (tmp_path / "samples.json").write_text(json.dumps({"labels": [0, 1], "classes": ["disk", "ring"]}))
    with pytest.raises(SFDError, match="2 labels for 3 images"):
        load_samples(tmp_path)


def test_a_damaged_image_is_named(tmp_path):
    write_images(tmp_path, IMAGES[:2])
    (tmp_path / "000001.png").write_bytes(b"no image")
    with pytest.raises(SFDError, match=r"000001\.png"):
        list(load_samples(tmp_path).batches())


def test_images_of_two_sizes_are_refused(tmp_path):
    write_images(tmp_path, IMAGES[:1])
    Image.fromarray(IMAGES[1][:8, :12]).save(tmp_path / "000001.png")
    with pytest.raises(SFDError, match="12×8"):
        list(load_samples(tmp_path).batches(1))
