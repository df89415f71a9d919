import json
import zipfile

import numpy as np
import pytest
from PIL import Image

from sfd.evaluation.npz import Npz, NpzImages, read_moments
from sfd.evaluation.reference import open_reference
from sfd.evaluation.samples import load_samples, pack
from sfd.utils.errors import SFDError

IMAGES = np.random.default_rng(0).integers(256, size=(10, 8, 8, 3), dtype=np.uint8)
RECORD = {
    "labels": [0, 1] * 5,
    "classes": ["ring", "disk"],
    "sampling": {"solver": "heun", "steps": 8},
    "model": "m-1",
    "seeds": [4, 4, 5, 5, 6, 6, 9, 9, 0, 0],
}


def write_folder(folder, record=RECORD):
    folder.mkdir()
    for index, image in enumerate(IMAGES):
        Image.fromarray(image).save(folder / f"{index:06d}.png")
    if record:
        (folder / "samples.json").write_text(json.dumps(record))
    return folder


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_images_are_read_in_any_order(tmp_path, save):
    save(tmp_path / "a.npz", arr_0=IMAGES)
    images = NpzImages(Npz(tmp_path / "a.npz"))
    assert len(images) == 10 and images.image_size == 8
    for start, stop in ((0, 3), (3, 4), (7, 10), (2, 5), (0, 10)):
        np.testing.assert_array_equal(images.load(range(start, stop)), IMAGES[start:stop])


def test_packed_samples_are_read_back(tmp_path):
    samples = load_samples(write_folder(tmp_path / "samples"))
    pack(samples, tmp_path / "out.npz")
    packed = load_samples(tmp_path / "out.npz")
    np.testing.assert_array_equal(packed.images.load(range(10)), IMAGES)
    assert (packed.labels, packed.classes, packed.sampling) == (samples.labels, samples.classes, samples.sampling)
    assert packed.sampling == {"solver": "heun", "steps": 8, "model": "m-1", "seeds": "0, 4-6, 9"}
    assert packed.balanced


def test_packed_samples_have_the_format_of_adm(tmp_path):
    pack(load_samples(write_folder(tmp_path / "samples")), tmp_path / "out.npz")
    with np.load(tmp_path / "out.npz", allow_pickle=False) as arrays:
        np.testing.assert_array_equal(arrays["arr_0"], IMAGES)
        np.testing.assert_array_equal(arrays["arr_1"], RECORD["labels"])
    with zipfile.ZipFile(tmp_path / "out.npz") as archive:  # not compressed: any part of it can be read at once
        assert {member.compress_type for member in archive.infolist()} == {zipfile.ZIP_STORED}
    (tmp_path / "samples" / "000007.png").write_bytes(b"no image")
    with pytest.raises(SFDError, match=r"000007\.png"):
        pack(load_samples(tmp_path / "samples"), tmp_path / "damaged.npz")
    assert {path.name for path in tmp_path.iterdir()} == {"samples", "out.npz"}


@pytest.mark.parametrize("record", [None, {**RECORD, "labels": [], "classes": []}])
def test_samples_without_classes_are_packed(tmp_path, record):
    pack(load_samples(write_folder(tmp_path / "samples", record)), tmp_path / "out.npz")
    packed = load_samples(tmp_path / "out.npz")
    assert packed.labels is None and packed.classes == ()
    assert packed.balanced == bool(record)  # of one class; without a record nothing says so


def test_labels_of_an_archive_are_its_classes(tmp_path):
    np.savez(tmp_path / "a.npz", arr_0=IMAGES, arr_1=[0, 2] * 5)
    samples = load_samples(tmp_path / "a.npz")
    assert samples.classes == ("0", "1", "2") and not samples.balanced


def test_stored_moments_are_read(tmp_path):
    mu, sigma = np.arange(3.0), np.eye(3)
    np.savez(tmp_path / "a.npz", arr_0=IMAGES, mu=mu, sigma=sigma)
    npz = Npz(tmp_path / "a.npz")
    found = read_moments(npz, "mu", "sigma", 3)
    np.testing.assert_array_equal(found.mean, mu)
    np.testing.assert_array_equal(found.covariance, sigma)
    assert read_moments(npz, "mu_s", "sigma_s", 5) is None


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"arr_0": IMAGES.astype(np.float32)}, "uint8"),
        ({"arr_0": IMAGES[:, :4]}, "square images"),
        ({"arr_0": np.array([{}])}, "object"),
        ({"images": IMAGES}, "no array 'arr_0'.*it has images"),
        ({"arr_0": IMAGES, "arr_1": np.arange(9)}, "10 whole numbers"),
    ],
)
def test_archives_of_other_content_are_refused(tmp_path, arrays, words):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(SFDError, match=words):
        load_samples(tmp_path / "a.npz")


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"mu": np.zeros(2048)}, "no array 'sigma'"),
        ({"mu": np.zeros(2047), "sigma": np.zeros((2047, 2047))}, "shape \\(2048,\\)"),
        ({"mu_s": np.zeros(2023), "sigma_s": np.zeros((2023, 2023))}, "neither arr_0"),
        ({"arr_0": np.zeros((4, 16, 16, 3), np.uint8)}, "8×8.*16×16"),
    ],
)
def test_references_of_other_content_are_refused(tmp_path, arrays, words):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(SFDError, match=words):
        open_reference(tmp_path / "a.npz", 8, "inception")


def test_a_truncated_or_damaged_archive_is_refused(tmp_path):
    np.savez_compressed(tmp_path / "whole.npz", arr_0=IMAGES)
    data = bytearray((tmp_path / "whole.npz").read_bytes())
    (tmp_path / "a.npz").write_bytes(data[:-20])
    with pytest.raises(SFDError, match=r"a\.npz is no whole \.npz"):
        load_samples(tmp_path / "a.npz")
    data[len(data) // 2] ^= 0xFF
    (tmp_path / "a.npz").write_bytes(data)
    with pytest.raises(SFDError, match="fetch it again"):
        load_samples(tmp_path / "a.npz").images.load(range(10))
