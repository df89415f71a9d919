"""Files of every kind become the right square 8-bit image; arrays and tensors convert without loss."""

from __future__ import annotations

import io
import warnings
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageChops

from sfd.data.images import MAX_PIXELS, centre_crop, decode, stable_hash, to_tensor, to_uint8
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


def test_every_value_survives_the_round_trip() -> None:
    images = np.arange(256 * 3, dtype=np.int64).reshape(1, 16, 16, 3).astype(np.uint8)
    assert np.array_equal(to_uint8(to_tensor(images)), images)


def test_tensors_span_minus_one_to_one_with_channels_first() -> None:
    images = np.zeros((1, 2, 3, 3), np.uint8)
    images[..., 2] = 255
    tensor = to_tensor(images)
    assert tensor.shape == (1, 3, 2, 3)
    assert tensor.dtype == torch.float32
    assert tensor[:, :2].eq(-1).all()
    assert tensor[:, 2].eq(1).all()


def test_values_out_of_range_are_clamped() -> None:
    assert to_uint8(torch.tensor([-9.0, 9.0, 0.0]).view(1, 3, 1, 1)).ravel().tolist() == [0, 255, 128]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 40))
def test_crop_has_the_size_asked_for(width: int, height: int, size: int) -> None:
    assert centre_crop(photo(width, height), size).shape == (size, size, 3)


def test_crop_of_the_right_size_is_the_image() -> None:
    image = photo(32, 32)
    assert np.array_equal(centre_crop(image, 32), np.asarray(image))


def test_crop_takes_the_centre() -> None:
    image = photo(48, 32)
    assert np.array_equal(centre_crop(image, 32), np.asarray(image)[:, 8:40])


def test_crop_halves_with_a_box_filter() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    means = pixels.reshape(32, 2, 32, 2, 3).mean((1, 3))
    assert np.abs(centre_crop(Image.fromarray(pixels), 32) - means).max() <= 1  # rounded once an axis


def test_crop_below_twice_the_size_is_bicubic() -> None:
    image = photo(63, 63)
    assert np.array_equal(centre_crop(image, 32), np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC)))


def test_a_thread_thin_image_costs_no_more_than_a_wide_one() -> None:
    assert centre_crop(photo(20_000, 1), 64).shape == (64, 64, 3)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "GIF", "TIFF", "JPEG"])
def test_formats(kind: str) -> None:
    image = decode(encoded(plain((200, 40, 90)), kind), 8)
    assert np.abs(image.astype(int) - (200, 40, 90)).max() <= 6


def test_exif_orientation_is_honoured() -> None:
    image = plain((0, 0, 0))
    image.paste((255, 255, 255), (0, 0, 16, 8))  # white above
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise: white on the right
    turned = decode(encoded(image, exif=exif), 16)
    assert turned[:, :8].max() == 0
    assert turned[:, 8:].min() == 255


def test_alpha_is_laid_over_white() -> None:
    assert decode(encoded(Image.new("RGBA", (8, 8), (255, 0, 0, 0))), 8).min() == 255
    half = decode(encoded(Image.new("LA", (8, 8), (0, 128))), 8)
    assert np.abs(half.astype(int) - 127).max() <= 1


def test_palette_and_its_transparency() -> None:
    palette = plain((10, 200, 30)).convert("P", palette=Image.Palette.ADAPTIVE)
    assert np.array_equal(decode(encoded(palette), 16)[0, 0], (10, 200, 30))
    assert decode(encoded(palette, transparency=palette.getpixel((0, 0))), 16).min() == 255


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_grey_keeps_its_range(kind: str) -> None:
    ramp = np.linspace(0, 65535, 16).round().astype(np.uint16)
    image = decode(encoded(Image.fromarray(np.tile(ramp, (16, 1))), kind), 16)
    assert np.array_equal(image[0], np.repeat((ramp / 257).round().astype(np.uint8)[:, None], 3, 1))


def test_bilevel_is_black_and_white() -> None:
    assert decode(encoded(Image.new("1", (8, 8), 1)), 8).min() == 255


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk_is_not_inverted(kind: str) -> None:
    image = decode(encoded(plain((255, 0, 0)).convert("CMYK"), kind), 8)
    assert np.abs(image.astype(int) - (255, 0, 0)).max() <= 6


def test_adobe_cmyk_is_not_inverted() -> None:
    # Photoshop's JPEGs store inverted inks and say so in an Adobe segment; so does Pillow when it writes CMYK.
    data = encoded(plain((255, 255, 255)).convert("CMYK"), "JPEG")
    assert b"Adobe" in data
    assert decode(data, 8).min() >= 250


def test_animations_give_their_first_frame() -> None:
    frames = [plain((0, 0, 255)), plain((255, 0, 0))]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert np.array_equal(decode(data, 16)[0, 0], (0, 0, 255))


def test_twenty_thousand_pixels_wide() -> None:
    whole = Image.linear_gradient("L").resize((20_000, 900))
    image = decode(encoded(whole, "JPEG"), 32)
    # Decoded at an eighth, which is a box filter, nearly.
    assert np.abs(image.astype(int) - centre_crop(whole.convert("RGB"), 32)).mean() < 4


def test_a_jpeg_beyond_the_limit_is_decoded_at_a_fraction() -> None:
    side = int(MAX_PIXELS**0.5) + 1000
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        data = encoded(Image.new("L", (side, side), 77), "JPEG")
    assert np.ptp(decode(data, 32)) == 0


def test_a_decompression_bomb_is_refused() -> None:
    header = bytearray(encoded(Image.new("1", (8, 8))))
    header[16:24] = (40_000).to_bytes(4, "big") * 2
    header[29:33] = zlib.crc32(header[12:29]).to_bytes(4, "big")
    with pytest.raises(SFDError, match="pixels; scale it down"):
        decode(bytes(header), 8)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "TIFF"])
def test_truncated_files_are_refused(kind: str) -> None:
    noise = ImageChops.offset(photo(64, 64), 3)
    data = encoded(noise, kind)
    with pytest.raises(SFDError):
        decode(data[: len(data) // 2], 32)


@pytest.mark.parametrize("data", [b"", b"hello, this is no image", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n" + bytes(40)])
def test_what_is_no_image_is_refused_with_a_reason(data: bytes) -> None:
    with pytest.raises(SFDError, match=r"empty|known format|damaged"):
        decode(data, 8)


def test_floating_point_pixels_are_refused() -> None:
    with pytest.raises(SFDError, match="32-bit"):
        decode(encoded(Image.new("F", (8, 8), 0.5), "TIFF"), 8)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2000), st.integers(0, 255))
def test_damage_gives_an_image_or_a_reason(place: int, value: int) -> None:
    data = bytearray(encoded(photo(32, 24), "PNG"))
    data[place % len(data)] = value
    try:
        assert decode(bytes(data), 16).shape == (16, 16, 3)
    except SFDError as error:
        assert str(error)


def test_hashes_depend_on_content_not_on_order() -> None:
    assert stable_hash("a", x=1, y=2) == stable_hash("a", y=2, x=1) != stable_hash("b", x=1, y=2)
