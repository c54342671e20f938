"""Figures for papers: one style, saved as SVG and PNG; each experiment's own are in the module of its name."""

import io
from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lib.utils.files import ROOT, compress_png, write_bytes
from lib.utils.intervals import mean_interval
from lib.utils.validation import Name, check_value

STYLE = {
    "figure.dpi": 80,
    "savefig.dpi": 160,
    "savefig.bbox": "tight",
    "svg.hashsalt": "distill",  # equal data give equal files
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.titlesize": 9,
    "figure.constrained_layout.use": True,
}
COLOURS = sns.color_palette("colorblind")


def set_style() -> None:
    """Set the project's look: seaborn's ticks and colour-blind safe palette."""
    sns.set_theme(context="paper", style="ticks", palette="colorblind", rc=STYLE)


def save_figure(figure: Figure, profile: str, name: str) -> None:
    """Write `figures/<profile>/<name>.svg` and `.png`, atomically; equal figures give equal bytes."""
    folder = ROOT / "figures" / check_value("a profile", profile, Name)
    for form, metadata in (("svg", {"Date": None}), ("png", {"Software": None})):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=form, metadata=metadata)
        content = buffer.getvalue()
        write_bytes(folder / f"{name}.{form}", compress_png(content) if form == "png" else content)


def seeds_note(records: Sequence[dict]) -> str:
    """Return what the error bars of a figure mean."""
    n = len(records)
    return f"n = {n} seeds, bars: 95 % t interval" if n > 1 else "one seed, no interval"


def mean_and_half_width(
    values: Sequence[Sequence[float]] | np.ndarray, scale: float = 100.0
) -> tuple[np.ndarray, np.ndarray]:
    """Return the means over seeds of (seed × position) values times `scale`, and their intervals' half widths."""
    triples = [mean_interval(column) for column in scale * np.asarray(values, dtype=float).T]
    centre = np.array([t[0] for t in triples])
    return centre, np.nan_to_num(np.array([t[2] - t[0] for t in triples]))


def draw_bars(axes: Axes, places: Any, values: Any, **options: Any) -> None:
    """Draw points with error bars over seeds, and each seed as a faint dot behind them; values: seed × place."""
    centre, half = mean_and_half_width(values)
    bars = axes.errorbar(places, centre, half, capsize=3, marker="o", **options)
    for row in np.asarray(values, dtype=float) * 100:
        axes.plot(places, row, ".", color=bars[0].get_color(), alpha=0.25, markersize=4, zorder=0)


def draw_image(axes: Axes, pixels: Any) -> None:
    """Show one image, (c h w) in [0, 1], without axes."""
    image = np.asarray(pixels, dtype=float)
    axes.imshow(image[0] if len(image) == 1 else image.transpose(1, 2, 0), cmap="gray", vmin=0, vmax=1)
    axes.set_axis_off()


def new_figure(
    rows: int = 1, columns: int = 1, width: float = 3.2, height: float = 2.6, **options: Any
) -> tuple[Figure, Any]:
    """Return a styled figure and its axes, `width` × `height` inches per panel."""
    set_style()
    return plt.subplots(rows, columns, figsize=(width * columns, height * rows), **options)
