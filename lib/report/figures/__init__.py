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
    "font.size": 8,  # figures are at most as wide as two columns of a paper, so that this is what is printed
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}
COLOURS = sns.color_palette("colorblind")
SAMPLER_LOOKS = {  # marker and colour of samplers, the same in experiments 4 and 5
    "sde": ("s", "0.1"),
    "ode": ("D", "0.4"),
    "ddim": ("v", COLOURS[0]),
    "pd": ("X", COLOURS[4]),
    "cd": ("P", "#44aa99"),
}
SHARE = (0.0, 100.0)  # limits of a share in %


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


def count_seeds(records: Sequence) -> str:
    """Return "1 seed" or "5 seeds"."""
    return f"{len(records)} seed{'s' * (len(records) > 1)}"


def count_evidence(images: Sequence[int], what: str = "test images") -> str:
    """Return how many seeds and images of each a figure rests on, in words: "5 seeds × 100 test images"."""
    fewest, most = min(images), max(images)
    span = f"{most:,}" if fewest == most else f"{fewest:,} to {most:,}"
    return f"{count_seeds(images)} × {span} {what}"


def evidence_over_seeds(records: Sequence[dict]) -> str:
    """Return `count_evidence` of the test images of each record."""
    return count_evidence([r["metrics"]["n_test"] for r in records])


def bars_over_seeds(records: Sequence[dict], dots: bool = True) -> str:
    """Return the end of a caption: what points, error bars and, where they are drawn, faint dots are."""
    if len(records) == 1:
        return "no error bars, since there is one seed"
    faint = ", faint dots each seed" if dots else ""
    return f"points are means over seeds, error bars 95 % t intervals over seeds{faint}"


def mean_and_half_width(
    values: Sequence[Sequence[float]] | np.ndarray, scale: float = 100.0
) -> tuple[np.ndarray, np.ndarray]:
    """Return the means over seeds of (seed × position) values times `scale`, and their intervals' half widths."""
    triples = [mean_interval(column) for column in scale * np.asarray(values, dtype=float).T]
    centre = np.array([t[0] for t in triples])
    return centre, np.nan_to_num(np.array([t[2] - t[0] for t in triples]))


def cut_bars(centre: np.ndarray, half: np.ndarray, limits: tuple[float, float] = SHARE) -> np.ndarray:
    """Return the lengths of error bars below and above (2 × place), cut where no value can lie."""
    return np.array([centre - np.clip(centre - half, *limits), np.clip(centre + half, *limits) - centre])


def draw_bars(axes: Axes, places: Any, values: Any, limits: tuple[float, float] = SHARE, **options: Any) -> None:
    """Draw points with error bars over seeds, and each seed as a faint dot behind them.

    Args:
        axes: where.
        places: along the horizontal axis.
        values: seed × place; drawn in %.
        limits: what the values lie within, in %; bars are cut there.
        options: of `errorbar`, such as colour and label.
    """
    centre, half = mean_and_half_width(values)
    bars = axes.errorbar(places, centre, cut_bars(centre, half, limits), **{"capsize": 3, "marker": "o"} | options)
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
