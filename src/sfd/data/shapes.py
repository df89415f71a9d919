"""The procedural data set: shape and position (semantics) and colours (texture) are independent and known.

Every image shows one of ten shapes over a background. Its semantic factors are the shape, its position, size and
rotation; its texture factors are a pattern with two colours for the shape and for the background. Image i depends on
the seed and i alone, and looks the same at every size but for its resolution.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from sfd.data.images import Indices, stable_hash
from sfd.utils import rng
from sfd.utils.errors import SFDError

# Component of the identity: raised when the same seed gives other images.
VERSION = 1

TEXTURE = np.dtype([
    ("pattern", np.int64),  # index into PATTERNS
    ("angle", np.float32),  # of the pattern, radians
    ("period", np.float32),  # in image sides
    ("phase", np.float32, 2),  # in periods
    ("colours", np.float32, (2, 3)),  # sRGB in [0, 1]
])  # fmt: skip
FACTORS = np.dtype([
    ("shape", np.int64),  # index into ShapesSource.classes: the label
    ("x", np.float32),  # centre, right of the image's centre, in image sides
    ("y", np.float32),  # centre, below the image's centre, in image sides
    ("radius", np.float32),  # in image sides
    ("rotation", np.float32),  # clockwise, radians
    ("figure", TEXTURE),
    ("ground", TEXTURE),
])  # fmt: skip

_SEMANTIC_DRAWS = 5
_TEXTURE_DRAWS = 9
_DRAWS = _SEMANTIC_DRAWS + 2 * _TEXTURE_DRAWS + 1

# Images rendered at a time: their arrays stay within the processor's cache.
_CHUNK = 64


class ShapesSource:
    """`count` images of the data set of `seed`, rendered on demand."""

    def __init__(self, count: int, seed: int, image_size: int = 32) -> None:
        for name, value, least in (("count", count, 1), ("seed", seed, 0), ("image_size", image_size, 8)):
            if value < least:
                raise SFDError(f"shapes: {name} is {value}, but must be at least {least}")
        self.seed = seed
        self.image_size = image_size
        self.classes = CLASSES
        self.identity = stable_hash("shapes", version=VERSION, count=count, seed=seed, image_size=image_size)
        self.resident = False
        self._factors = _draw(seed, count)

    @property
    def labels(self) -> np.ndarray:
        """(count,) int64, the shape of every image."""
        return self._factors["shape"]

    def __len__(self) -> int:
        return len(self._factors)

    def factors(self, indices: Indices) -> np.ndarray:
        """Return the factors that the images at `indices` were rendered from, a structured array of dtype FACTORS."""
        return self._factors[np.asarray(indices, dtype=np.int64)]

    def load(self, indices: Indices) -> np.ndarray:
        """Render the images at `indices`. Returns uint8 (B, S, S, 3)."""
        factors = self.factors(indices)
        images = np.empty((len(factors), self.image_size, self.image_size, 3), np.uint8)
        for start in range(0, len(factors), _CHUNK):
            images[start : start + _CHUNK] = render(factors[start : start + _CHUNK], self.image_size)
        return images


def _draw(seed: int, count: int) -> np.ndarray:
    """Draw the factors of images 0 … count-1, each image's from a generator of its own."""
    draws = np.stack([rng.generator(seed, "shapes", i).random(_DRAWS) for i in range(count)])
    factors = np.empty(count, FACTORS)
    factors["shape"] = np.floor(draws[:, 0] * len(_DISTANCES))
    factors["x"] = (2 * draws[:, 1] - 1) * 3 / 32
    factors["y"] = (2 * draws[:, 2] - 1) * 3 / 32
    factors["radius"] = (9 + 3 * draws[:, 3]) / 32
    factors["rotation"] = (2 * draws[:, 4] - 1) * np.pi / 6
    light_figure = draws[:, -1] < 0.5  # light on dark or dark on light: never without contrast
    middle = _SEMANTIC_DRAWS + _TEXTURE_DRAWS
    factors["figure"] = _draw_texture(draws[:, _SEMANTIC_DRAWS:middle], light_figure)
    factors["ground"] = _draw_texture(draws[:, middle:-1], ~light_figure)
    return factors


def _draw_texture(draws: np.ndarray, light: np.ndarray) -> np.ndarray:
    """Turn uniform numbers (n, 9) into textures, light or dark (n,)."""
    texture = np.empty(len(draws), TEXTURE)
    texture["pattern"] = np.floor(draws[:, 0] * len(PATTERNS))
    texture["angle"] = draws[:, 1] * 2 * np.pi
    texture["period"] = (8 + 4 * draws[:, 2]) / 32
    texture["phase"] = draws[:, 3:5]
    # The pattern's second colour is nearer to the middle, but stays on its own side of it.
    lightness = np.where(light, 0.82 + 0.10 * draws[:, 5], 0.26 + 0.12 * draws[:, 5])
    second = lightness + np.where(light, -0.11, 0.11)
    hue = draws[:, 6] * 2 * np.pi
    shift = np.where(draws[:, 7] < 0.5, -1, 1) * np.pi / 4
    chroma = 0.08 + 0.07 * draws[:, 8]
    texture["colours"][:, 0] = _srgb(lightness, chroma, hue)
    texture["colours"][:, 1] = _srgb(second, chroma, hue + shift)
    return texture


_TO_CONES = np.array(
    [[1, 0.3963377774, 0.2158037573], [1, -0.1055613458, -0.0638541728], [1, -0.0894841775, -1.291485548]]
)
_TO_LINEAR = np.array([
    [4.0767416621, -3.3077115913, 0.2309699292],
    [-1.2684380046, 2.6097574011, -0.3413193965],
    [-0.0041960863, -0.7034186147, 1.707614701],
])  # fmt: skip


def _srgb(lightness: np.ndarray, chroma: np.ndarray, hue: np.ndarray) -> np.ndarray:
    """Turn polar Oklab colours, (n,) each, into sRGB (n, 3) in [0, 1] (Ottosson 2020): equal lightness looks so."""
    a, b = chroma * np.cos(hue), chroma * np.sin(hue)
    linear = ((np.stack([lightness, a, b], -1) @ _TO_CONES.T) ** 3 @ _TO_LINEAR.T).clip(0, 1)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def render(factors: np.ndarray, image_size: int) -> np.ndarray:
    """Render images from their factors, anti-aliased by signed distances. Returns uint8 (B, S, S, 3)."""
    # Pixel centres, in image sides from the image's centre; x to the right, y down.
    axis = ((np.arange(image_size) + 0.5) / image_size - 0.5).astype(np.float32)
    x, y = axis[None, None, :], axis[None, :, None]
    cover = _coverage(factors, x, y, image_size)[..., None]
    figure, ground = (_paint(factors[layer], x, y, image_size) for layer in ("figure", "ground"))
    images = ground + cover * (figure - ground)
    return (images * 255).round().astype(np.uint8)


def _coverage(factors: np.ndarray, x: np.ndarray, y: np.ndarray, image_size: int) -> np.ndarray:
    """Compute how much of each pixel the shape covers, (B, S, S) in [0, 1]."""
    column = factors[:, None, None]
    cos, sin = np.cos(column["rotation"]), np.sin(column["rotation"])
    dx, dy = (x - column["x"]) / column["radius"], (y - column["y"]) / column["radius"]
    right, up = dx * cos + dy * sin, dx * sin - dy * cos
    cover = np.empty(right.shape, np.float32)
    for shape, distance in enumerate(_DISTANCES.values()):
        rows = np.flatnonzero(factors["shape"] == shape)
        if len(rows):
            pixels = distance(right[rows], up[rows]) * column["radius"][rows] * image_size
            cover[rows] = (0.5 - pixels).clip(0, 1)
    return cover


def _paint(texture: np.ndarray, x: np.ndarray, y: np.ndarray, image_size: int) -> np.ndarray:
    """Fill images with their patterns, (B, S, S, 3) in [0, 1]."""
    column = texture[:, None, None]
    cos, sin = np.cos(column["angle"]), np.sin(column["angle"])
    along, across = x * cos + y * sin, y * cos - x * sin
    mix = np.zeros(along.shape, np.float32)  # share of the second colour
    for pattern, share in enumerate(_SHARES.values()):
        rows = np.flatnonzero(texture["pattern"] == pattern)
        if share is not None and len(rows):
            mix[rows] = share(along[rows], across[rows], column["period"][rows], column["phase"][rows], image_size)
    first, second = column["colours"][..., 0, :], column["colours"][..., 1, :]
    return first + mix[..., None] * (second - first)


def _wave(position: np.ndarray, period: np.ndarray, phase: np.ndarray, image_size: int) -> np.ndarray:
    """Alternate between 0 and 1 every half period, with edges one pixel wide."""
    to_edge = np.abs((position / period + phase) % 1 - 0.5) - 0.25
    return (0.5 + to_edge * period * image_size).clip(0, 1)


def _checks(along: np.ndarray, across: np.ndarray, period: np.ndarray, phase: np.ndarray, size: int) -> np.ndarray:
    # Fields as wide as half a period of 1.5 times the stripes' keep checks as coarse as stripes.
    one = _wave(along, 1.5 * period, phase[..., 0], size)
    other = _wave(across, 1.5 * period, phase[..., 1], size)
    return one + other - 2 * one * other


def _dots(along: np.ndarray, across: np.ndarray, period: np.ndarray, phase: np.ndarray, size: int) -> np.ndarray:
    one = (along / period + phase[..., 0]) % 1 - 0.5
    other = (across / period + phase[..., 1]) % 1 - 0.5
    return (0.5 + (0.3 - np.hypot(one, other)) * period * size).clip(0, 1)


# Share of the second colour at positions along and across the pattern, in image sides.
_SHARES: dict[str, Callable[..., np.ndarray] | None] = {
    "solid": None,
    "stripes": lambda along, across, period, phase, size: _wave(along, period, phase[..., 0], size),
    "checks": _checks,
    "dots": _dots,
    "gradient": lambda along, across, period, phase, size: (0.5 + 1.2 * along).clip(0, 1),
}
PATTERNS = tuple(_SHARES)


# Signed distances to the shapes at unit size, negative inside; x to the right, y up. Each fits in a circle of radius
# 1.06, is its own mirror image, and no two look alike within the range of rotations.


def _box(x: np.ndarray, y: np.ndarray, width: float, height: float) -> np.ndarray:
    dx, dy = np.abs(x) - width, np.abs(y) - height
    return np.hypot(dx.clip(0), dy.clip(0)) + np.maximum(dx, dy).clip(max=0)


def _polygon(x: np.ndarray, y: np.ndarray, corners: np.ndarray) -> np.ndarray:
    """Signed distance to a simple polygon with `corners` (n, 2): nearest edge, sign by the even-odd rule."""
    nearest = np.full(x.shape, np.inf, np.float32)
    inside = np.zeros(x.shape, bool)
    for (ax, ay), (bx, by) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        ex, ey = float(bx - ax), float(by - ay)
        dx, dy = x - float(ax), y - float(ay)
        share = ((dx * ex + dy * ey) / (ex * ex + ey * ey)).clip(0, 1)
        nearest = np.minimum(nearest, (dx - share * ex) ** 2 + (dy - share * ey) ** 2)
        if ey:
            inside ^= ((y < ay) != (y < by)) & (dx < dy * (ex / ey))
    return np.where(inside, -1, 1) * np.sqrt(nearest)


_TRIANGLE = np.array([[0, 1.0], [-0.95, -0.7], [0.95, -0.7]]) * 0.95
_ANGLES = np.pi / 2 + np.arange(10) * np.pi / 5
_STAR = np.where(np.arange(10) % 2, 0.45, 1.05)[:, None] * np.stack([np.cos(_ANGLES), np.sin(_ANGLES)], -1)
_HALF_ARROW = np.array([[0.0, 1.0], [0.9, 0.05], [0.3, 0.05], [0.3, -1.0]])
_ARROW = np.concatenate([_HALF_ARROW, _HALF_ARROW[:0:-1] * (-1, 1)])


def _heart(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Two disks on a quarter-turned square (as Quilez builds his), shifted to the centre."""
    x, y = np.abs(x) / 1.55, y / 1.55 + 0.55
    to_lobe = np.hypot(x - 0.25, y - 0.75) - np.sqrt(2) / 4
    fold = 0.5 * (x + y).clip(0)
    to_square = np.minimum(np.hypot(x, y - 1), np.hypot(x - fold, y - fold)) * np.sign(x - y)
    return 1.55 * np.where(x + y > 1, to_lobe, to_square)


def _crescent(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A moon that opens upwards."""
    y = y - 0.1
    return np.maximum(np.hypot(x, y) - 0.98, 0.75 - np.hypot(x, y - 0.52))


_DISTANCES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "disk": lambda x, y: np.hypot(x, y) - 0.9,
    "ring": lambda x, y: np.abs(np.hypot(x, y) - 0.73) - 0.25,
    "square": lambda x, y: _box(x, y, 0.74, 0.74),
    "triangle": lambda x, y: _polygon(x, y, _TRIANGLE),
    "star": lambda x, y: _polygon(x, y, _STAR),
    "cross": lambda x, y: np.minimum(_box(x, y, 0.98, 0.33), _box(x, y, 0.33, 0.98)),
    "heart": _heart,
    "crescent": _crescent,
    "arrow": lambda x, y: _polygon(x, y, _ARROW),
    "bar": lambda x, y: _box(x, y, 1.0, 0.35),
}
CLASSES = tuple(_DISTANCES)
