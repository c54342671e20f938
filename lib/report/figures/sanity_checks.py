"""The red and green matrix of `lib.evaluation.sanity_checks`: checks in rows, models in columns."""

from collections.abc import Mapping, Sequence
from textwrap import fill

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from lib.report.figures import COLOURS, evidence_over_seeds, new_figure


def check_matrix(tables: Mapping[str, Sequence[pd.DataFrame]]) -> Figure:
    """Draw model → its tables of `sanity_checks`, one per seed: the median measurement, ✗ where a check is red.

    A field is vermilion where most seeds raise the flag, else green (both of the colour-blind palette), and grey where
    the check was not run. Without models it says so.
    """
    if not tables:
        figure, axes = new_figure()
        axes.set_axis_off()
        axes.set_title("no sanity checks in this profile")
        return figure
    checks = list(next(iter(tables.values()))[0]["check"])
    columns = {name: [table.set_index("check") for table in some] for name, some in tables.items()}
    median = {name: np.median([t["measured"].astype(float) for t in some], axis=0) for name, some in columns.items()}
    raised = {name: np.mean([t["flag"].astype(float) for t in some], axis=0) for name, some in columns.items()}
    measured, red = pd.DataFrame(median, index=checks), pd.DataFrame(raised, index=checks)
    marks = red.map(lambda share: " ✓" if share == 0 else " ✗" if share == 1 else f" ✗ {share:.0%} of seeds")
    text = (measured.map("{:.3g}".format) + marks).where(measured.notna(), "–")
    figure, axes = new_figure(width=2.4 + 1.2 * len(tables), height=0.27 * len(checks) + 0.8)
    options = {"cmap": ListedColormap([COLOURS[2], COLOURS[3]]), "vmin": 0, "vmax": 1, "cbar": False, "linewidths": 1}
    options["xticklabels"] = [fill(name, 16) for name in tables]  # long names would run into each other
    sns.heatmap((red > 0.5).astype(float), mask=measured.isna(), annot=text, fmt="", ax=axes, **options)
    n = len(next(iter(tables.values())))
    title = f"median of {n} seeds; vermilion: flag in most" if n > 1 else "one seed; vermilion: flag"
    axes.set(facecolor="0.85", xlabel="", ylabel="", title=title)
    axes.tick_params(length=0)
    return figure


def checks_caption(models: str, records: Sequence[dict], images: str = "") -> str:
    """Return what a matrix of checks shows.

    Args:
        models: whose checks they are, in words, with the attack's radius.
        records: one per seed.
        images: seeds and images of each, in words; default: the first of the test images that are attacked.

    Returns:
        The caption.
    """
    over = "median over seeds of the measurement" if len(records) > 1 else "the measurement"
    images = images or f"Among the first of {evidence_over_seeds(records)}"
    return (
        f"Checks for masked gradients of {models}: {over}, ✓ where no seed raises the flag, ✗ where one does, with the "
        f"share of seeds if not all do. Vermilion: most seeds raise it; green: most do not; grey: not run. {images}; "
        "no intervals."
    )
