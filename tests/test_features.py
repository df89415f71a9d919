import numpy as np
import pytest

from sfd.evaluation import features
from sfd.evaluation.extractors._base import Extraction
from sfd.evaluation.features import Features
from sfd.evaluation.metrics import Gaussian, gaussian
from sfd.evaluation.npz import Npz, NpzImages
from sfd.evaluation.reference import RealImages, measured
from sfd.utils.errors import SFDError
from sfd.utils.shares import WHOLE, Share

COUNT = 25


class Corners:
    """An extractor to work out by hand, which counts the images that it sees and may fail at one of them."""

    name, identity, task, accuracy, classes = "corners", "corners-1", "nothing", None, ()

    def __init__(self, fails_at=None):
        self.seen, self.fails_at = 0, fails_at

    def extract(self, images):
        for _ in images:
            self.seen += 1
            if self.seen == self.fails_at:
                raise KeyboardInterrupt
        flat = images.reshape(len(images), -1).astype(np.float32)
        probabilities = flat[:, :4] / flat[:, :4].sum(axis=1, keepdims=True)
        return Extraction(flat[:, :6], probabilities, flat[:, 6:10])


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(features, "CHUNK", 10)


@pytest.fixture
def images(tmp_path):
    pixels = np.random.default_rng(0).integers(1, 256, size=(COUNT, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", arr_0=pixels)
    return NpzImages(Npz(tmp_path / "images.npz"))


def computed(folder, images, extractor, part=WHOLE, batch_size=4):
    result = Features(folder, images, extractor)
    result.compute(batch_size, part, "features")
    return result


def assert_whole(extraction, images):
    """Check against what is seen at once."""
    for found, expected in zip(extraction, Corners().extract(images.load(range(COUNT))), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_features_in_chunks_are_those_of_all_images(tmp_path, images):
    assert_whole(computed(tmp_path, images, Corners()).read(), images)


def test_an_interrupted_computation_goes_on_at_the_chunk_where_it_was(tmp_path, images):
    with pytest.raises(KeyboardInterrupt):
        computed(tmp_path, images, Corners(fails_at=17))
    extractor = Corners()
    assert_whole(computed(tmp_path, images, extractor).read(), images)
    assert extractor.seen == COUNT - 10


def test_finished_features_are_not_computed_again(tmp_path, images):
    computed(tmp_path, images, Corners())
    extractor = Corners()
    computed(tmp_path, images, extractor)
    assert extractor.seen == 0


def test_a_damaged_chunk_is_computed_again(tmp_path, images):
    folder = computed(tmp_path, images, Corners()).folder
    chunk = folder / "features-00001.safetensors"
    chunk.write_bytes(chunk.read_bytes()[:-7])
    extractor = Corners()
    assert_whole(computed(tmp_path, images, extractor).read(), images)
    assert extractor.seen == 10


def test_parts_make_the_whole(tmp_path, images):
    extractors = [Corners(), Corners()]
    computed(tmp_path, images, extractors[1], Share(2, 2))
    with pytest.raises(SFDError, match="lacks 2 of 3 chunks"):
        Features(tmp_path, images, extractors[1]).read()
    assert_whole(computed(tmp_path, images, extractors[0], Share(1, 2)).read(), images)
    assert [extractor.seen for extractor in extractors] == [15, 10]


def test_other_images_and_other_extractors_have_features_of_their_own(tmp_path, images):
    np.savez(tmp_path / "others.npz", arr_0=images.load(range(COUNT))[::-1])
    others = NpzImages(Npz(tmp_path / "others.npz"))
    finer = Corners()
    finer.identity = "corners-2"
    folders = {Features(tmp_path, i, e).folder for i in (images, others) for e in (Corners(), finer)}
    assert len(folders) == 4


def test_moments_stored_with_a_reference_stand_for_its_images(tmp_path, images):
    extractor = Corners()
    seen = extractor.extract(images.load(range(COUNT)))
    stored = Gaussian(np.zeros(6), np.eye(6), 0)
    whole = measured(RealImages("real", "id", images), extractor, seen)
    assert whole.statistics.count == whole.spatial.count == COUNT and not whole.protocol.stored_moments
    np.testing.assert_allclose(whole.spatial.mean, gaussian(seen.spatial).mean)
    pooled = measured(RealImages("real", "id", images, stored), extractor, seen)
    assert pooled.statistics is stored and pooled.spatial is None and pooled.protocol.stored_moments
    alone = measured(RealImages("real", "id", None, stored, stored), extractor, None)
    assert alone.features is None and alone.spatial is stored and alone.protocol.reference_count == 0
