import numpy as np
import pytest
from PIL import Image

from sfd.data.shapes import ShapesSource
from sfd.evaluation import features
from sfd.evaluation.extractors._base import Extraction
from sfd.evaluation.features import extract
from sfd.evaluation.metrics import Gaussian
from sfd.evaluation.reference import RealImages, Reference, open_reference
from sfd.evaluation.samples import load_samples

COUNT = 25
IMAGES = ShapesSource(COUNT, seed=0, image_size=8)


class Corners:
    """A simple extractor that counts images and may be interrupted at one."""

    name, identity, task, accuracy, trained_on, classes = "corners", "corners-1", "nothing", None, None, ()

    def __init__(self, fails_at=None):
        self.seen, self.fails_at = 0, fails_at

    def extract(self, images):
        for _ in images:
            self.seen += 1
            if self.seen == self.fails_at:
                raise KeyboardInterrupt
        flat = images.reshape(len(images), -1).astype(np.float32) + 1
        probabilities = flat[:, :4] / flat[:, :4].sum(axis=1, keepdims=True)
        return Extraction(flat[:, :6], probabilities, flat[:, 6:10])


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(features, "CHUNK", 10)


def assert_complete(extraction):
    for found, expected in zip(extraction, Corners().extract(IMAGES.load(range(COUNT))), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_features_do_not_depend_on_chunks_and_batches(tmp_path):
    assert_complete(extract(IMAGES, Corners(), batch_size=4))
    assert_complete(extract(IMAGES.load(range(COUNT)), Corners(), batch_size=7))
    assert_complete(extract(IMAGES, Corners(), cache=tmp_path, batch_size=4))


def test_an_interrupted_computation_resumes_at_its_chunk(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        extract(IMAGES, Corners(fails_at=17), cache=tmp_path, batch_size=4)
    for seen in (COUNT - 10, 0):
        extractor = Corners()
        assert_complete(extract(IMAGES, extractor, cache=tmp_path))
        assert extractor.seen == seen


def test_a_damaged_chunk_is_computed_again(tmp_path):
    extract(IMAGES, Corners(), cache=tmp_path)
    chunk = next(tmp_path.glob("*/features-00001.safetensors"))
    chunk.write_bytes(chunk.read_bytes()[:-7])
    extractor = Corners()
    assert_complete(extract(IMAGES, extractor, cache=tmp_path))
    assert extractor.seen == 10


def test_stored_moments_replace_those_of_the_images():
    stored = Gaussian(np.zeros(6), np.eye(6), 0)
    own = Reference.of(RealImages("real", "id", IMAGES), Corners())
    assert own.statistics.count == own.spatial.count == COUNT and not own.protocol.stored_moments
    pooled = Reference.of(RealImages("real", "id", IMAGES, stored), Corners())
    assert pooled.statistics is stored and pooled.spatial is None and pooled.protocol.stored_moments
    alone = Reference.of(RealImages("real", "id", None, stored, stored), Corners())
    assert alone.features is None and alone.spatial is stored and alone.protocol.reference_count == 0


def grey(folder, number):
    values = np.full((8, 8), 1000 * number, np.uint16)
    Image.fromarray(values).save(folder / f"{number}.png")


def turned(folder, number):
    picture = Image.fromarray(IMAGES.load([number])[0])
    exif = picture.getexif()
    exif[0x0112] = 6
    picture.save(folder / f"{number}.JPG", exif=exif)


def transparent(folder, number):
    rgba = np.dstack([IMAGES.load([number])[0], np.full((8, 8), 10 * number, np.uint8)])
    Image.fromarray(rgba).save(folder / f"{number}.PNG")


@pytest.mark.parametrize("write", [grey, turned, transparent])
def test_samples_and_reference_are_read_alike(tmp_path, write):
    for number in range(6):
        write(tmp_path, number)
    (tmp_path / "@eaDir").mkdir()
    grey(tmp_path / "@eaDir", 9)
    (tmp_path / "._1.png").write_bytes(b"of an operating system")
    samples = load_samples(tmp_path).images
    reference = open_reference(tmp_path, 8, "dinov2").images
    assert len(samples) == 6 and samples.identity == reference.identity
    np.testing.assert_array_equal(samples.load(range(6)), reference.load(range(6)))
    if write is grey:
        assert [int(image.mean()) for image in samples.load(range(6))] == [round(1000 * n / 257) for n in range(6)]
