"""The image data set protocol, and the one reader of image files, for training, references and samples."""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from sfd.utils.errors import SFDError
from sfd.utils.files import failed_download

Indices = Sequence[int] | np.ndarray

# Formats that Pillow recognises but leaves to another program or library.
_NOT_DECODED = ("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF")
# Image formats that Pillow does not know, how their files begin, and what reads them.
_UNKNOWN = (
    (r".{4}ftyp(hei[cxms]|hev[cx]|mif1|msf1)", "HEIC", "heif-convert (of libheif)"),
    (r"\xff\x0a|\0\0\0\x0cJXL ", "JPEG XL", "djxl (of libjxl)"),
    (r".{,1000}<svg", "SVG", "rsvg-convert (of librsvg)"),
    (r"v/1\x01", "OpenEXR", "oiiotool (of OpenImageIO)"),
)
# Suffixes of cameras' raw files. Some are TIFFs, of which Pillow would read a thumbnail.
RAW = frozenset(
    (".dng", ".cr2", ".cr3", ".nef", ".nrw", ".arw", ".raf", ".rw2", ".orf", ".pef", ".srw", ".3fr", ".iiq")
)
NO_IMAGE = "no image in a known format"
_PNG = b"\x89PNG\r\n\x1a\n"
# More pixels than this Pillow does not decode: at 3 bytes each they take half a gigabyte a thread.
MAX_PIXELS = 178_956_970
# A JPEG of more pixels than this is decoded at a half, a quarter or an eighth of its size, by its DCT coefficients.
REDUCED_PIXELS = 2**24
# Beyond this aspect ratio the ends of an image are cut off before scaling; scaled in whole they would fill the memory.
MAX_ASPECT = 16


class Images(Protocol):
    """Square images of one size; evaluation loads successive indices only."""

    @property
    def image_size(self) -> int:
        """Rows and columns S of every image."""

    @property
    def identity(self) -> str:
        """Short stable hash of what the images are; equal ones have equal identities on any machine."""

    def __len__(self) -> int: ...

    def load(self, indices: Indices) -> np.ndarray:
        """Return the images at `indices` (each in [0, length)) as uint8 (B, S, S, 3)."""


class ImageSource(Images, Protocol):
    """A data set; any of its images can be loaded at any time."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in the order of the labels; () when unconditional."""

    @property
    def labels(self) -> np.ndarray:
        """(length,) int64, the class index of every image; all 0 when unconditional."""

    @property
    def resident(self) -> bool:
        """Whether the decoded images are in memory, so that loading is a look-up."""


def to_tensor(images: np.ndarray) -> Tensor:
    """Turn uint8 (B, H, W, 3) into float32 (B, 3, H, W) in [-1, 1]; `to_uint8` undoes it exactly."""
    pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).to(torch.float32)
    return (pixels / 127.5 - 1).contiguous()


def to_uint8(images: Tensor) -> np.ndarray:
    """Turn (B, 3, H, W) in [-1, 1] into uint8 (B, H, W, 3), rounded and clamped."""
    return to_pixels(images).cpu().numpy()


def to_pixels(images: Tensor) -> Tensor:
    """Do what `to_uint8` does on the images' device, and leave them there."""
    pixels = ((images.detach().to(torch.float32) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).contiguous()


def stable_hash(kind: str, **parameters: Any) -> str:
    """Hash a kind of thing and its (JSON) parameters to 16 hexadecimal digits, the same in every process."""
    text = json.dumps([kind, parameters], sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def centre_crop(image: Image.Image, size: int) -> np.ndarray:
    """Scale the shorter side of an RGB image to `size` and cut out the centre, as ADM does (Dhariwal & Nichol 2021).

    Halved with a box filter while the shorter side is at least 2·size, then scaled bicubically. Smaller images are
    scaled up. Returns uint8 (size, size, 3).
    """
    longest = MAX_ASPECT * min(image.size)
    image = _centre(image, longest, longest)
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    target = (round(image.width * scale), round(image.height * scale))
    return np.array(_centre(image.resize(target, Image.Resampling.BICUBIC), size, size))


def _centre(image: Image.Image, width: int, height: int) -> Image.Image:
    """Cut out the centre, at most this wide and high."""
    width, height = min(width, image.width), min(height, image.height)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def decode(data: bytes, size: int, *, exact: bool = False) -> np.ndarray:
    """Read an image file's bytes, scaled and centre-cropped to uint8 (size, size, 3): `read_image`, then `centre_crop`.

    But a JPEG of more than REDUCED_PIXELS is decoded at a fraction of its size. `exact`: refuse images of another size.
    """
    if exact:
        image = read_image(data)
        if image.shape[:2] != (size, size):
            raise SFDError(f"{image.shape[1]}×{image.shape[0]} pixels instead of {size}×{size}")
        return image
    return centre_crop(_read(data, 4 * size), size)  # four times the size leaves the filtering to the box


def read_image(data: bytes) -> np.ndarray:
    """Read an image file's bytes in full size, uint8 (H, W, 3).

    The EXIF orientation is applied; alpha is laid over white; 16-bit grey, palettes and CMYK become 8-bit RGB; of an
    animation the first frame is taken. Damaged metadata does not cost the image. The message of an SFDError is the
    reason alone, to be put after the file's name.
    """
    return np.array(_read(data))


@cache
def formats() -> tuple[str, ...]:
    """The names of the formats that Pillow decodes, the usual ones first."""
    Image.init()
    usual = ("PNG", "JPEG", "WEBP")
    return usual + tuple(name for name in Image.OPEN if name not in usual + _NOT_DECODED)


@cache
def suffixes() -> frozenset[str]:
    """The suffixes, in lower case, of files that are meant to be images, whether they can be read or not."""
    known = formats()
    readable = {suffix for suffix, name in Image.registered_extensions().items() if name in known}
    return frozenset(readable | RAW | {".heic", ".heif", ".hif", ".jxl", ".svg", ".exr"})


def _read(data: bytes, reduced: int | None = None) -> Image.Image:
    """Read as RGB; `reduced`: the rows and columns that are enough of a large JPEG."""
    if not data:
        raise SFDError("the file is empty")
    try:
        try:
            return _to_rgb(data, reduced)
        except (ValueError, UnidentifiedImageError):
            if not data.startswith(_PNG):
                raise
            return _to_rgb(_without_metadata(data), reduced)
    except SFDError:
        raise
    except UnidentifiedImageError:
        raise SFDError(_why_unidentified(data)) from None
    except Image.DecompressionBombError:
        raise SFDError(f"more than {MAX_PIXELS:,} pixels; scale it down") from None
    except Exception as error:  # Decoders meet damaged files with errors of nearly every type.
        raise SFDError(f"damaged or not readable ({error or type(error).__name__})") from None


def _why_unidentified(data: bytes) -> str:
    for start, kind, converter in _UNKNOWN:
        if re.match(start.encode(), data[:1024], re.DOTALL):
            return f"{kind}, which Pillow does not read; convert it to PNG, for example with {converter}"
    return failed_download(data) or NO_IMAGE


def _without_metadata(data: bytes) -> bytes:
    """Keep the chunks of a PNG that its pixels need: Pillow gives up an image for damage in the others."""
    kept, start = [_PNG], len(_PNG)
    while start < len(data):
        stop = start + 12 + int.from_bytes(data[start : start + 4], "big")
        if data[start + 4 : start + 8] in (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"):
            kept.append(data[start:stop])
        start = stop
    return b"".join(kept)


def _to_rgb(data: bytes, reduced: int | None) -> Image.Image:
    """Decode as 8-bit RGB, upright, over white."""
    image = Image.open(io.BytesIO(data), formats=formats())
    if reduced is not None and image.width * image.height > REDUCED_PIXELS:
        image.draft(None, (reduced, reduced))  # of JPEGs alone
    image.load()
    with suppress(Exception):  # Pillow meets damaged EXIF data with errors of several types
        ImageOps.exif_transpose(image, in_place=True)
    # Pillow gives 16-bit grey as mode I where the format does not say more (PGM; PNG in older versions).
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        grey = np.asarray(image).astype(np.float32) / 257
        return Image.fromarray(grey.round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise SFDError("its pixels are 32-bit numbers of unknown range; store it with 8 or 16 bits per channel")
    if "transparency" in image.info or image.mode in ("RGBA", "RGBa", "LA", "La", "PA"):
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")
