"""Image files of every kind become the right 8-bit image; damaged ones are refused with a reason."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageChops, ImageOps

from sfd.data.images import centre_crop, decode, read_image, stable_hash, to_tensor, to_uint8
from sfd.utils.errors import SFDError


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def plain(colour: tuple[int, int, int], size: tuple[int, int] = (16, 16)) -> Image.Image:
    return Image.new("RGB", size, colour)


def photo(width: int, height: int) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x % 256, y % 256, (x + y) % 256], -1).astype(np.uint8))


def near(image: np.ndarray, colour: tuple[int, int, int], within: int = 6) -> bool:
    return bool(np.abs(image.astype(int) - colour).max() <= within)


def test_tensors_span_minus_one_to_one_and_convert_back_without_loss() -> None:
    images = np.arange(256 * 3, dtype=np.int64).reshape(1, 16, 16, 3).astype(np.uint8)
    tensor = to_tensor(images)
    assert (tensor.shape, tensor.dtype, tensor.min(), tensor.max()) == ((1, 3, 16, 16), torch.float32, -1, 1)
    assert np.array_equal(to_uint8(tensor), images)
    assert to_uint8(torch.tensor([-9.0, 9.0, 0.0]).view(1, 3, 1, 1)).ravel().tolist() == [0, 255, 128]


def test_crop_takes_the_centre() -> None:
    image = photo(48, 32)
    assert np.array_equal(centre_crop(image, 32), np.asarray(image)[:, 8:40])
    for width, height, size in ((1, 90, 7), (20_000, 1, 64), (5, 3, 40)):
        assert centre_crop(photo(width, height), size).shape == (size, size, 3)


def test_crop_halves_with_a_box_filter_then_scales_bicubically() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    means = pixels.reshape(32, 2, 32, 2, 3).mean((1, 3))
    assert np.abs(centre_crop(Image.fromarray(pixels), 32) - means).max() <= 1  # rounded once per axis
    image = photo(63, 63)
    assert np.array_equal(centre_crop(image, 32), np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC)))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "GIF", "TIFF", "JPEG", "AVIF", "JPEG2000", "PPM", "TGA"])
def test_formats(kind: str) -> None:
    assert near(decode(encoded(plain((200, 40, 90)), kind), 8), (200, 40, 90))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(photo(7, 5), exif=exif)
    assert np.array_equal(read_image(data), np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data)))))


def with_chunk(kind: bytes, data: bytes, crc: int | None = None) -> bytes:
    """A PNG with one more chunk after its header."""
    png = encoded(plain((9, 8, 7)))
    crc = zlib.crc32(kind + data) if crc is None else crc
    return png[:33] + struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc) + png[33:]


@pytest.mark.parametrize(
    "data",
    [
        with_chunk(b"eXIf", b"this is no tiff"),
        with_chunk(b"eXIf", b"II*\0\x08\0\0\0\x05\0"),
        with_chunk(b"eXIf", b"II*\0", crc=1),
        with_chunk(b"iCCP", b"profile\0\7garbage"),
        with_chunk(b"gAMA", b"x"),
        with_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(2**21))),
        *(encoded(plain((9, 8, 7)), kind, exif=b"Exif\0\0II*\0\xff\xff\xff\x7f") for kind in ("JPEG", "AVIF", "TIFF")),
        encoded(plain((9, 8, 7)), "WEBP", exif=b"Exif\0\0this is no tiff"),
        encoded(plain((9, 8, 7)), "JPEG", icc_profile=b"garbage"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_an_image_with_damaged_metadata_is_read(data: bytes) -> None:
    assert near(read_image(data), (9, 8, 7), within=2)


def test_alpha_is_composited_over_white() -> None:
    assert decode(encoded(Image.new("1", (8, 8), 1)), 8).min() == 255
    assert decode(encoded(Image.new("RGBA", (8, 8), (255, 0, 0, 0))), 8).min() == 255
    assert near(decode(encoded(Image.new("LA", (8, 8), (0, 128))), 8), (127, 127, 127), within=1)


def test_palette_and_its_transparency() -> None:
    palette = plain((10, 200, 30)).convert("P", palette=Image.Palette.ADAPTIVE)
    assert near(decode(encoded(palette), 16), (10, 200, 30), within=0)
    assert decode(encoded(palette, transparency=palette.getpixel((0, 0))), 16).min() == 255


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bit_grey_keeps_its_range(kind: str) -> None:
    ramp = np.linspace(0, 65535, 16).round().astype(np.uint16)
    image = Image.fromarray(np.tile(ramp, (16, 1)))
    image = decode(encoded(image.convert("I") if kind == "PPM" else image, kind), 16)
    assert np.array_equal(image[0], np.repeat((ramp / 257).round().astype(np.uint8)[:, None], 3, 1))


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])  # JPEGs store inverted inks and say so in an Adobe segment
@pytest.mark.parametrize("colour", [(255, 0, 0), (255, 255, 255)])
def test_cmyk_is_not_inverted(kind: str, colour: tuple[int, int, int]) -> None:
    assert near(decode(encoded(plain(colour).convert("CMYK"), kind), 8), colour)


def test_animations_give_their_first_frame() -> None:
    data = encoded(plain((0, 0, 255)), "GIF", save_all=True, append_images=[plain((255, 0, 0))])
    assert near(decode(data, 16), (0, 0, 255), within=0)


def test_a_large_jpeg_is_decoded_at_reduced_size() -> None:
    whole = Image.linear_gradient("L").resize((10_000, 900))
    image = decode(encoded(whole, "JPEG"), 32)
    # Decoding at an eighth is nearly a box filter.
    assert np.abs(image.astype(int) - centre_crop(whole.convert("RGB"), 32)).mean() < 4


def test_a_decompression_bomb_is_refused() -> None:
    header = bytearray(encoded(Image.new("1", (8, 8))))
    header[16:24] = (40_000).to_bytes(4, "big") * 2
    header[29:33] = zlib.crc32(header[12:29]).to_bytes(4, "big")
    with pytest.raises(SFDError, match="pixels; scale it down"):
        decode(bytes(header), 8)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "AVIF"])
def test_truncated_files_are_refused(kind: str) -> None:
    data = encoded(ImageChops.offset(photo(64, 64), 3), kind)
    with pytest.raises(SFDError):
        decode(data[: len(data) // 2], 32)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"hello, this is no image", "no image in a known format"),
        (b"\xff\xd8\xff", "no image"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "HEIC.*heif-convert"),
        (b"\xff\x0a\0\0", "JPEG XL.*djxl"),
        (b"v/1\x01\x02\0\0\0", "OpenEXR.*oiiotool"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer"),
        (encoded(Image.new("F", (8, 8), 0.5), "TIFF"), "32-bit"),
    ],
)
def test_an_unreadable_file_is_refused_with_the_reason(data: bytes, reason: str) -> None:
    with pytest.raises(SFDError, match=reason):
        decode(data, 8)


@given(st.integers(0, 2000), st.integers(0, 255))
def test_a_changed_byte_gives_an_image_or_a_reason(place: int, value: int) -> None:
    data = bytearray(encoded(photo(32, 24), "PNG"))
    data[place % len(data)] = value
    try:
        assert decode(bytes(data), 16).shape == (16, 16, 3)
    except SFDError as error:
        assert str(error)


def test_hashes_do_not_depend_on_the_order_of_fields() -> None:
    assert stable_hash("a", x=1, y=2) == stable_hash("a", y=2, x=1) != stable_hash("b", x=1, y=2)
