"""What every data set looks like, and how a file becomes the square 8-bit image that the rest of the project sees."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile
from torch import Tensor

from sfd.utils.errors import SFDError

Indices = Sequence[int] | np.ndarray

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")

# More pixels than this are not decoded: at 3 bytes each they take half a gigabyte a thread.
MAX_PIXELS = 178_956_970
# A JPEG of more pixels than this is decoded at a half, a quarter or an eighth of its size, by its DCT coefficients.
REDUCED_PIXELS = 2**24
# Beyond this aspect ratio the ends of an image are cut off before scaling; scaled in whole they would fill the memory.
MAX_ASPECT = 16


class ImageSource(Protocol):
    """A data set of square images of one size, addressed by index."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in the order of the labels; () when unconditional."""

    @property
    def labels(self) -> np.ndarray:
        """(length,) int64, the class index of every image; all 0 when unconditional."""

    @property
    def image_size(self) -> int:
        """Rows and columns S of every image."""

    @property
    def identity(self) -> str:
        """Short stable hash of what the data set is; equal data sets have equal identities on any machine."""

    @property
    def resident(self) -> bool:
        """Whether the decoded images are in memory, so that loading is a look-up."""

    def __len__(self) -> int: ...

    def load(self, indices: Indices) -> np.ndarray:
        """Return the images at `indices` (each in [0, length)) as uint8 (B, S, S, 3)."""


def to_tensor(images: np.ndarray) -> Tensor:
    """Turn uint8 (B, H, W, 3) into float32 (B, 3, H, W) in [-1, 1]; `to_uint8` undoes it exactly."""
    pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).to(torch.float32)
    return (pixels / 127.5 - 1).contiguous()


def to_uint8(images: Tensor) -> np.ndarray:
    """Turn (B, 3, H, W) in [-1, 1] into uint8 (B, H, W, 3), rounded; what lies outside of the range is clamped."""
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
    width, height = image.size
    if max(width, height) > MAX_ASPECT * min(width, height):
        image = _trim(image, MAX_ASPECT * min(width, height))
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    target = (round(image.width * scale), round(image.height * scale))
    image = image.resize(target, Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.asarray(image)[top : top + size, left : left + size].copy()


def _trim(image: Image.Image, longest: int) -> Image.Image:
    """Cut the longer side to its central `longest` pixels."""
    left = max(0, (image.width - longest) // 2)
    top = max(0, (image.height - longest) // 2)
    return image.crop((left, top, left + min(image.width, longest), top + min(image.height, longest)))


def decode(data: bytes, size: int, *, exact: bool = False) -> np.ndarray:
    """Decode an image file's bytes and crop its centre; `exact`: refuse another size. Returns uint8 (size, size, 3).

    The EXIF orientation is honoured; alpha is laid over white; 16-bit grey, palettes and CMYK become 8-bit RGB; of an
    animation the first frame is taken.

    Raises:
        SFDError: these bytes are no whole image, or one that is refused; the message is the reason, without the name.
    """
    if not data:
        raise SFDError("the file is empty")
    try:
        with _open(data, size) as image:
            upright = _to_rgb(image)
            if exact and upright.size != (size, size):
                raise SFDError(f"{upright.width}×{upright.height} pixels in place of {size}×{size}")
            return centre_crop(upright, size)
    except SFDError:
        raise
    except UnidentifiedImageError:
        raise SFDError(f"no image in a known format ({', '.join(FORMATS)})") from None
    except Image.DecompressionBombError:
        raise SFDError(f"more than {MAX_PIXELS:,} pixels; scale it down") from None
    except Exception as error:  # Decoders meet damaged files with errors of nearly every type.
        raise SFDError(f"damaged or not readable ({error or type(error).__name__})") from None


def shorter_side(data: bytes) -> int:
    """Read the shorter side of an image file, in pixels."""
    try:
        with _open(data, MAX_PIXELS) as image:
            return min(image.size)
    except Exception as error:  # as above
        raise SFDError(f"damaged or not readable ({error or type(error).__name__})") from None


def _open(data: bytes, size: int) -> Image.Image:
    """Open without decoding; large JPEGs are set to be decoded at a fraction of their size."""
    file = io.BytesIO(data)
    if not data.startswith(b"\xff\xd8\xff"):
        return Image.open(file, formats=FORMATS)
    # Opened by its own class, since Image.open judges a JPEG's size before it can be asked for a fraction of it.
    image = JpegImageFile(file)
    if image.width * image.height > REDUCED_PIXELS:
        image.draft(None, (4 * size, 4 * size))  # four times the size leaves the filtering to the box
    if image.width * image.height > MAX_PIXELS:
        raise Image.DecompressionBombError
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    """Decode as 8-bit RGB, upright, over white."""
    if image.getexif().get(0x0112, 1) != 1:
        image = ImageOps.exif_transpose(image)
    image.load()
    # Older versions of Pillow give 16-bit grey PNGs as mode I.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        grey = np.asarray(image).astype(np.float32) / 257
        return Image.fromarray(grey.round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise SFDError("its pixels are 32-bit numbers of unknown range; store it with 8 or 16 bits a channel")
    if "transparency" in image.info or image.mode in ("RGBA", "RGBa", "LA", "La", "PA"):
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")
