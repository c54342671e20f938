"""Figures of experiment 5 on why defences do what they do: residual perturbation, certificates, pictures, diagnosis."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from lib.report.figures import draw_image, mean_and_half_width, new_figure, sanity_checks, seeds_note
from lib.report.figures.diffpure_defences import LOOKS, Look, defence_label, defence_order, defence_style
from lib.utils.specs import ResultKey

UNDISTILLED_LOOK = Look("undistilled", LOOKS["ddim"].marker, LOOKS["ddim"].colour)


def dp_inheritance(records: Sequence[dict]) -> Figure:
    """Draw how much of δ each purifier leaves, and how much the residual perturbation hurts the classifier."""
    residuals = [r["metrics"]["inheritance"] for r in records]
    names = sorted(set.intersection(*map(set, residuals)), key=defence_order)[::-1]
    figure, axes = new_figure(1, 3, width=3.0, height=1.5 + 0.2 * len(names), sharey=True)
    panels = {
        "projection": "residual perturbation\n⟨r, δ⟩/‖δ‖² (%)",
        "ratio": "size of the residual,\n‖r‖ / ‖δ‖ (%)",
        "damage": "margin lost per unit of ‖r‖\n(logits per pixel unit)",
    }
    for panel, (what, text) in zip(axes, panels.items()):
        scale = 1.0 if what == "damage" else 100.0
        for row, name in enumerate(names):
            style = defence_style(name)
            grey = [[residual[name][what]] for residual in residuals]
            own = [[residual[name]["own"][what]] for residual in residuals if "own" in residual[name]]
            for shift, values, fill in ((0.15, grey, style["color"]), (-0.15, own, "white")):
                if values:
                    centre, half = mean_and_half_width(values, scale)
                    options = {"markerfacecolor": fill, "capsize": 2, "markersize": 5}
                    panel.errorbar(centre, [row + shift], xerr=half, **options, **style)
        panel.set(xlabel=text)
    before = np.mean([residual[names[0]]["damage_before"] for residual in residuals])
    axes[2].axvline(before, color="0.4", linestyle=":", linewidth=1)
    axes[0].set_yticks(range(len(names)), [defence_label(name) for name in names], fontsize=7)
    images = records[0]["metrics"]["n_inherited"]
    axes[0].set_title(f"{seeds_note(records)}\n{images} images per seed", fontsize=7)
    axes[1].set_title("filled: δ of the grey box;\nopen: δ through itself", fontsize=7)
    axes[2].set_title("dotted: δ itself, no purifier", fontsize=7)
    sns.despine(figure)
    return figure


def dp_certified(records: Sequence[dict]) -> Figure:
    """Draw certified accuracy against the L2 radius, up to the ceiling of what so many draws can certify."""
    certified = [r["metrics"]["certified"] for r in records]
    keys = [ResultKey.parse(key) for key in certified[0]["accuracy"]]
    levels = sorted({float(key.what) for key in keys})
    looks = {"teacher": UNDISTILLED_LOOK} | LOOKS
    networks = sorted({key.name for key in keys}, key=[*looks, *(key.name for key in keys)].index)
    figure, axes = new_figure(1, len(levels), width=3.3, height=3.0, sharey=True, squeeze=False)
    step = 0.06 * float(np.median(np.diff(certified[0]["radii"])))
    for panel, sigma in zip(axes[0], levels):
        ceiling = certified[0].get("ceiling", {}).get(f"{sigma:g}", np.inf)
        below = np.array(certified[0]["radii"]) < ceiling  # beyond it the accuracy is 0, whatever the defence
        for i, net in enumerate(networks):
            look = looks.get(net, Look(net))
            values = [np.array(c["accuracy"][str(ResultKey(net, f"{sigma:g}"))])[below] for c in certified]
            centre, half = mean_and_half_width(np.array(values))
            low, high = np.clip(centre - half, 0, 100), np.clip(centre + half, 0, 100)
            options = {"marker": look.marker, "color": look.colour, "markersize": 4, "capsize": 2}
            radii = np.array(certified[0]["radii"])[below] + step * (i - (len(networks) - 1) / 2)
            panel.errorbar(radii, centre, [centre - low, high - centre], label=look.words, **options)
        if ceiling < np.inf:
            panel.axvline(ceiling, color="0.4", linestyle="--", linewidth=1)
            words = f"ceiling: no more can be\ncertified from {certified[0]['draws']} draws"
            note = {"rotation": 90, "va": "bottom", "ha": "right", "fontsize": 6}
            panel.annotate(words, (ceiling, 3), (-3, 0), textcoords="offset points", **note)
        panel.set(xlabel="L2 radius (pixel units)", title=f"σ = {sigma:g}", ylim=(-3, 103))
    axes[0, 0].set(ylabel="certified accuracy (%)")
    figure.supxlabel(f"{seeds_note(records)}; {certified[0]['n']} images per seed", fontsize=7)
    handles = axes[0, 0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=len(networks), fontsize=7)
    sns.despine(figure)
    return figure


def dp_pictures(records: Sequence[dict]) -> Figure:
    """Draw images, the attack on them, the difference × 10, and what teacher and students make of it."""
    images = records[0]["arrays"]["pictures"]
    first = [name for name in ("image", "attacked", "δ × 10") if name in images]
    names = first + sorted(set(images) - {*first}, key=defence_order)
    figure, axes = new_figure(len(names), len(images[names[0]]), width=0.6, height=0.66, squeeze=False)
    for panels, name in zip(axes, names):
        for panel, pixels in zip(panels, images[name]):
            draw_image(panel, np.asarray(pixels) / 255)
        panels[0].set_title(name if name in first else defence_label(name), fontsize=6, loc="left", pad=1)
    return figure


def dp_diagnosis(records: Sequence[dict]) -> Figure:
    """Draw the matrix of `lib.evaluation.sanity_checks` for the defences that claims are about."""
    tables = [r["arrays"]["diagnosis"] for r in records]
    names = sorted(set.intersection(*map(set, tables)), key=defence_order)
    return sanity_checks.check_matrix({defence_label(n): [pd.DataFrame(t[n]) for t in tables] for n in names})
