"""Figures of experiment 5 on why defences do what they do: residual perturbation, certificates, pictures, diagnosis."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from lib.report.figures import (
    bars_over_seeds,
    count_evidence,
    cut_bars,
    draw_image,
    mean_and_half_width,
    new_figure,
    sanity_checks,
    seeds_note,
)
from lib.report.figures.diffpure_defences import LOOKS, Look, defence_label, defence_order, defence_style
from lib.utils.specs import ResultKey

UNDISTILLED_LOOK = Look("undistilled", LOOKS["ddim"].marker, LOOKS["ddim"].colour)


def dp_inheritance(records: Sequence[dict]) -> Figure:
    """Draw how much of δ each purifier leaves, and how much the residual perturbation hurts the classifier."""
    residuals = [r["metrics"]["inheritance"] for r in records]
    names = sorted(set.intersection(*map(set, residuals)), key=defence_order)[::-1]
    figure, axes = new_figure(1, 3, width=2.4, height=1.5 + 0.2 * len(names), sharey=True)
    panels = {
        "projection": "residual perturbation\n⟨r, δ⟩/‖δ‖² (%)",
        "ratio": "size of the residual,\n‖r‖ / ‖δ‖ (%)",
        "damage": "margin lost per ‖r‖\n(logits per pixel unit)",
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
    axes[2].set_title("dotted: δ itself", fontsize=7)
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
            options = {"marker": look.marker, "color": look.colour, "markersize": 4, "capsize": 2}
            radii = np.array(certified[0]["radii"])[below] + step * (i - (len(networks) - 1) / 2)
            panel.errorbar(radii, centre, cut_bars(centre, half), label=look.words, **options)
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


def mechanism_captions(records: Sequence[dict]) -> dict[str, str]:
    """Return what each figure of this module shows, computed from the records that it draws."""
    first, certified = records[0]["metrics"], [r["metrics"]["certified"] for r in records]
    ball, bars = f"Linf, ε = {first['eps']:g} in pixel units", bars_over_seeds(records, dots=False)
    inherited = count_evidence([r["metrics"]["n_inherited"] for r in records])
    checked = count_evidence([r["metrics"]["n_diagnosed"] for r in records])
    shown = records[0]["arrays"]["pictures"]["image"]
    radii, levels = (
        certified[0]["radii"],
        sorted({ResultKey.parse(k).what for k in certified[0]["accuracy"]}, key=float),
    )
    return {
        "dp_inheritance": "Residual perturbation r that each purifier leaves of an attack δ, the difference of its "
        f"outputs with and without δ under the same noise ({ball}): its part along δ, its size, and the classifier's "
        "margin lost per unit of r. Filled: δ of the grey box, against the bare classifier; open: δ through the "
        f"purifier itself; dotted: margin lost per unit of δ itself. {inherited}; {bars}; filled and open stand one "
        "above the other.",
        "dp_certified": f"Certified accuracy against the L2 radius (up to {max(radii):g} pixel units) of randomised "
        f"smoothing with Gaussian noise σ = {', '.join(levels)}, {certified[0]['draws']:,} draws per image; dashed: "
        f"the largest radius that so many draws can certify. {count_evidence([c['n'] for c in certified])}; {bars}; "
        "bars are cut at 0 and 100 %; values of one radius stand side by side.",
        "dp_pictures": f"{len(shown)} test images, the grey-box attack on them ({ball}), the difference × 10 about "
        f"grey, and what each purifier makes of the attacked ones (seed {records[0]['seed']}, one of {len(records)}). "
        "Examples, no intervals.",
        "dp_diagnosis": sanity_checks.checks_caption(f"purified classifiers, {ball}", records, checked),
    }
