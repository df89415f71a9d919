"""Pictures for the report: latents as colours, curves; bitmaps as PNG, drawings as SVG."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

# One colour a stream everywhere; readable on white and on black.
COLOURS = ("#d9822b", "#2b7bba", "#3a9a5b", "#a05bb8", "#c2476a")
INK = "#808080"  # axes and text of drawings until the page's own colour replaces it
MAX_PNG = 100_000  # bytes of a picture in the report beyond which it is stored as WebP
MAX_POINTS = 400  # of a drawn curve


def semantic_colours(latents: np.ndarray) -> np.ndarray:
    """Show latents (n, C, h, w) as colours, uint8 (n, h, w, 3).

    The three leading principal components over all frames together become red, green and blue, so that equal colours
    mean equal latents across frames; 1 % at either end is cut off.
    """
    n, channels, height, width = latents.shape
    points = latents.transpose(0, 2, 3, 1).reshape(-1, channels).astype(np.float64)
    points = points - points.mean(axis=0)
    _, vectors = np.linalg.eigh(points.T @ points)
    axes = vectors[:, ::-1][:, :3]
    # An eigenvector's sign is arbitrary; fix it, so that the same latents always get the same colours.
    axes = axes * np.where(axes[np.abs(axes).argmax(axis=0), range(axes.shape[1])] < 0, -1, 1)
    parts = np.zeros((len(points), 3))
    parts[:, : axes.shape[1]] = points @ axes
    low, high = np.percentile(parts, [1, 99], axis=0)
    colours = (parts - low) / np.maximum(high - low, 1e-12)
    return (colours.clip(0, 1) * 255).round().astype(np.uint8).reshape(n, height, width, 3)


def data_uri(picture: Image.Image | np.ndarray) -> str:
    """Encode a picture, or uint8 (H, W, 3), as a data URI: PNG, or WebP where that would be large."""
    image = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    kind = "png"
    if buffer.tell() > MAX_PNG:
        buffer, kind = io.BytesIO(), "webp"
        image.save(buffer, "WEBP", quality=90)
    return f"data:image/{kind};base64," + base64.b64encode(buffer.getvalue()).decode()


def curve(steps: Sequence[float], values: Sequence[float], quantity: str) -> str:
    """Draw a logged quantity over training, as SVG: the log's own values pale, their trailing average over them."""
    figure = Figure(figsize=(2.9, 1.9), layout="constrained")
    axis = figure.subplots()
    _plain(axis)
    raw = np.asarray(values, dtype=float)
    smooth = _smoothed(raw)
    every = max(1, len(raw) // MAX_POINTS)
    axis.plot(steps[::every], raw[::every], color=COLOURS[1], linewidth=0.7, alpha=0.35)
    axis.plot(steps[::every], smooth[::every], color=COLOURS[1], linewidth=1.6)
    axis.set_title(f"{quantity}: {smooth[-1]:.4g} at the end", loc="left", fontsize=9, color=INK)
    axis.set_xlabel("step")
    axis.set_xlim(left=0)
    # A wild start must not flatten everything that comes after it.
    low, high = raw.min(), max(np.percentile(raw, 98), smooth[-1])
    if high > low:
        axis.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    return _svg(figure, f"{quantity} over training steps")


def schedule_drawing(
    base: np.ndarray, times: np.ndarray, rates: np.ndarray, names: Sequence[str], knots: Sequence[float]
) -> str:
    """Draw each stream's time and rate over the base time, as SVG.

    Args:
        base: base times u (n,), ascending.
        times: τ_k(u) (n, K).
        rates: τ_k′(u) (n, K).
        names: of the K streams.
        knots: base times at which a rate jumps.
    """
    figure = Figure(figsize=(9.6, 2.7), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axis, values, label in ((left, times, "time  τ(u)"), (right, rates, "rate  τ′(u)")):
        _plain(axis)
        for knot in knots:
            axis.axvline(knot, color=INK, linewidth=0.8, linestyle=(0, (3, 3)), alpha=0.7)
        # Curves that coincide stay visible: the later ones are dashed where there are several.
        for index, name in enumerate(names):
            dashes = "solid" if index == 0 else (0, (4, 1.5))
            axis.plot(
                base, values[:, index], color=COLOURS[index % len(COLOURS)], linewidth=2, label=name, linestyle=dashes
            )
        axis.set_xlim(0, 1)
        axis.set_xlabel("base time u")
        axis.set_title(label, loc="left", fontsize=9, color=INK)
    left.set_ylim(-0.03, 1.03)
    right.set_ylim(bottom=-0.05)
    _legend(left)
    return _svg(figure, "the schedule: each stream's time and rate over the base time")


def strip_picture(
    base: np.ndarray, times: np.ndarray, names: Sequence[str], semantic: np.ndarray, decoded: np.ndarray
) -> Figure:
    """Draw samples on their way from noise to an image: latents above, decoded images below, times under each.

    Args:
        base: base times u (n,).
        times: τ_k(u) (n, K).
        names: of the K streams.
        semantic: latents (n, C, h, w), shown by `semantic_colours`.
        decoded: uint8 (n, H, W, 3).
    """
    count = len(base)
    figure = Figure(figsize=(count * 0.82 + 0.9, 2.6), layout="constrained", dpi=160)
    rows = figure.subplots(2, count, squeeze=False)
    for pictures, row in ((semantic_colours(semantic), rows[0]), (decoded, rows[1])):
        for picture, axis in zip(pictures, row, strict=True):
            axis.imshow(picture, interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            axis.spines[:].set_visible(False)
    rows[0, 0].set_ylabel("semantic\nlatent", color=INK, fontsize=8)
    rows[1, 0].set_ylabel("decoded\ntexture", color=INK, fontsize=8)
    for u, at, axis in zip(base, times, rows[1], strict=True):
        lines = [f"u {u:.2f}", *(f"{name[0]} {t:.2f}" for name, t in zip(names, at, strict=True))]
        axis.set_xlabel("\n".join(lines), color=INK, fontsize=7)
    initials = ", ".join(f"{name[0]}: {name} time" for name in names)
    figure.supxlabel(f"u: base time, {initials}; 0 is noise, 1 is data", color=INK, fontsize=7)
    return figure


def _smoothed(values: np.ndarray) -> np.ndarray:
    """Average over a trailing window: a tenth of the curve, less at its start, not to lag where it is steep."""
    ends = np.arange(1, len(values) + 1)
    starts = ends - np.clip(ends // 3, 1, max(1, len(values) // 10))
    sums = np.concatenate([[0.0], values.cumsum()])
    return (sums[ends] - sums[starts]) / (ends - starts)


def _plain(axis: Axes) -> None:
    """Take away what carries no information."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(INK)
    axis.tick_params(colors=INK, labelsize=8, length=3)
    axis.xaxis.label.set_color(INK)
    axis.xaxis.label.set_fontsize(8)
    axis.grid(axis="y", color=INK, alpha=0.18, linewidth=0.6)
    axis.locator_params(axis="both", nbins=5)


def _legend(axis: Axes) -> None:
    axis.legend(frameon=False, fontsize=8, labelcolor=INK)


def _svg(figure: Figure, title: str) -> str:
    """Render as an SVG element that takes the page's text colour and width, and names itself to screen readers."""
    buffer = io.StringIO()
    settings = {"svg.fonttype": "none", "svg.hashsalt": title, "font.family": "sans-serif"}
    with matplotlib.rc_context(settings):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # Ids must differ between the drawings of one page; matplotlib numbers them alike in each.
    mark = re.sub(r"\W+", "-", title)
    text = re.sub(r'\bid="', f'id="{mark}-', text)
    text = re.sub(r'(xlink:href="#|url\(#)', rf"\1{mark}-", text)
    return text.replace("<svg", f'<svg role="img" aria-label="{title}"', 1)
