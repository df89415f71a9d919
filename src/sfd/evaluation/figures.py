"""Figures of the report, as data URIs: they take the page's width, and their grey reads on white and on black."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from sfd.generation.curves import ScheduleCurves

# One colour for each stream everywhere.
COLOURS = ("#d9822b", "#2b7bba", "#3a9a5b", "#a05bb8", "#c2476a")
INK = "#808080"
MAX_POINTS = 400  # of a curve
MAX_PNG_SIDE = 64  # pixels; larger pictures are stored as WebP


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
    components = np.zeros((len(points), 3))
    components[:, : axes.shape[1]] = points @ axes
    low, high = np.percentile(components, [1, 99], axis=0)
    colours = (components - low) / np.maximum(high - low, 1e-12)
    return (colours.clip(0, 1) * 255).round().astype(np.uint8).reshape(n, height, width, 3)


def picture(image: Image.Image, side: int) -> str:
    """Encode a picture made of images `side` pixels high: PNG, or WebP where PNG would be large."""
    buffer, kind = io.BytesIO(), "PNG" if side <= MAX_PNG_SIDE else "WEBP"
    image.save(buffer, kind, quality=90)
    return _data_uri(buffer, kind.lower())


def scaled(images: np.ndarray, side: int) -> np.ndarray:
    """Scale images, uint8 (n, S, S, 3), down to `side` pixels if they are larger."""
    if images.shape[1] <= side:
        return images
    smaller = (Image.fromarray(image).resize((side, side), Image.Resampling.LANCZOS) for image in images)
    return np.stack([np.asarray(image) for image in smaller])


def curve(steps: Sequence[float], values: Sequence[float], quantity: str) -> str:
    """Draw a logged quantity over training: the log's own values pale, their trailing average over them."""
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
    return _svg(figure)


def schedule(curves: ScheduleCurves) -> str:
    """Draw each stream's time and rate over the base time."""
    figure = Figure(figsize=(9.6, 2.7), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axis, values, label in ((left, curves.times, "time  τ(u)"), (right, curves.rates, "rate  τ′(u)")):
        _plain(axis)
        for knot in curves.knots:
            axis.axvline(knot, color=INK, linewidth=0.8, linestyle=(0, (3, 3)), alpha=0.7)
        # Curves that coincide stay visible: the later ones are dashed where there are several.
        for index, name in enumerate(curves.names):
            style, colour = "solid" if index == 0 else (0, (4, 1.5)), COLOURS[index % len(COLOURS)]
            axis.plot(curves.base, values[:, index], color=colour, linewidth=2, label=name, linestyle=style)
        axis.set_xlim(0, 1)
        axis.set_xlabel("base time u")
        axis.set_title(label, loc="left", fontsize=9, color=INK)
    left.set_ylim(-0.03, 1.03)
    right.set_ylim(bottom=-0.05)
    left.legend(frameon=False, fontsize=8, labelcolor=INK)
    return _svg(figure)


def sensitivities(errors: np.ndarray, names: Sequence[str], curves: Mapping[str, np.ndarray]) -> Figure:
    """Draw how much each of two streams lowers the error of the other, and schedules in the square of their times.

    Args:
        errors: (2, G + 1, G + 1), each stream's error on a grid of times.
        names: of the streams.
        curves: paths (points, 2) of the streams' times, by name.
    """
    figure = Figure(figsize=(10.5, 3.4), layout="constrained", dpi=160)
    spacing = 1 / (errors.shape[1] - 1)
    helped = [-np.gradient(errors[1], spacing, axis=0), -np.gradient(errors[0], spacing, axis=1)]
    largest = max(1e-9, *(float(np.percentile(np.abs(each), 98)) for each in (*helped, helped[0] - helped[1])))
    titles = [f"-∂(error of {names[1 - k]}) / ∂(time of {names[k]})" for k in (0, 1)]
    titles.append(f"red: {names[0]} should lead, blue: {names[1]}")
    for axis, values, title in zip(figure.subplots(1, 3), (*helped, helped[0] - helped[1]), titles, strict=True):
        sides, limits = (-spacing / 2, 1 + spacing / 2), {"vmin": -largest, "vmax": largest}
        image = axis.imshow(values, origin="lower", extent=sides * 2, cmap="RdBu_r", aspect="equal", **limits)
        axis.set(xlim=(0, 1), ylim=(0, 1))
        axis.set_title(title, fontsize=8, color=INK)
        axis.set_xlabel(f"time of {names[1]}", color=INK, fontsize=8)
        axis.set_ylabel(f"time of {names[0]}", color=INK, fontsize=8)
        axis.tick_params(colors=INK, labelsize=7)
    for index, (name, curve) in enumerate(curves.items()):
        axis.plot(
            curve[:, 1], curve[:, 0], color="black", linestyle=("-", "--", ":")[index % 3], linewidth=1.4, label=name
        )
    axis.legend(fontsize=7, loc="upper left")
    figure.colorbar(image, ax=figure.axes, shrink=0.8)
    return figure


def _svg(figure: Figure) -> str:
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "sfd", "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _data_uri(buffer, "svg+xml")


def _data_uri(buffer: io.BytesIO, kind: str) -> str:
    return f"data:image/{kind};base64," + base64.b64encode(buffer.getvalue()).decode()


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
