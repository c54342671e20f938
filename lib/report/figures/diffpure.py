"""Figures of experiment 5, distilled DiffPure: each takes records of one seed or of many (`lib.utils.artifacts`)."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from lib.report.figures import COLOURS, draw_image, mean_and_half_width, new_figure, sanity_checks, seeds_note
from lib.utils.specs import PurifierSpec, ResultKey, effort_label, parse_effort

PURIFIER_NAMES = {
    "none": "no purifier",
    "sde": "DiffPure, reverse SDE (teacher)",
    "ddpm": "DiffPure, DDPM (teacher)",
    "ddim": "undistilled, DDIM",
    "pd": "progressive distillation",
    "cd": "consistency distillation",
    "clean": "CD, trained on with clean pairs",
    "random": "CD, random δ",
    "grey": "CD, δ of the grey box",
    "adaptive": "CD, adaptive δ",
    "match-ode": "CD, the teacher's ODE from x + δ",
    "match-sde": "CD, the teacher's SDE from x + δ",
    "noskip": "consistency distillation without c_skip",
    "noskip-clean": "CD without c_skip, trained on with clean pairs",
    "noskip-adaptive": "CD without c_skip, adaptive δ",
}
PURIFIER_MARKS = dict(zip(PURIFIER_NAMES, "XssvPodhH^<>odH", strict=True))
STUDENT_COLOURS = (*(COLOURS[k] for k in (0, 1, 2, 9, 5, 4, 3, 8, 6)), "0.65", "0.65", "0.65")
PURIFIER_COLOURS = dict(zip(PURIFIER_NAMES, ["0.5", "0.1", "0.1", *STUDENT_COLOURS], strict=True))
OFF_SCALE = "noskip"  # untrained by its variants it is far off any scale: its numbers are in the notebook
UNDEFENDED = PurifierSpec.parse("none-0")
THREAT_COLUMNS = {
    "none": "no attack",
    "grey": "grey box",
    "bpda": "BPDA",
    "sweep": "PGD-EOT,\nsmall budget",
    "exact": "PGD-EOT,\nfull budget",
    "apgd": "APGD",
    "square": "Square",
    "surrogate": "surrogate",
    "other": "other\nclassifier",
    "fixed": "fixed noise",
}


def purifier_label(name: str) -> str:
    """Return a purifier's name in words."""
    spec = PurifierSpec.parse(name)
    label = PURIFIER_NAMES[spec.kind]
    if spec.network.weight is not None:
        label += f", weight {spec.network.weight:g}"
    if spec.network.distance is not None:
        label += f", distance {spec.network.distance}"
    return label if spec == UNDEFENDED else f"{label} ({spec.steps})"


def purifier_order(name: str) -> tuple:
    """Return what purifiers are sorted by: kinds in the order of `PURIFIER_NAMES`, few steps first."""
    spec = PurifierSpec.parse(name)
    return list(PURIFIER_NAMES).index(spec.kind), str(spec.network), spec.steps


def purifier_style(name: str) -> dict:
    """Return a purifier's marker and colour."""
    kind = PurifierSpec.parse(name).kind
    return {"marker": PURIFIER_MARKS[kind], "color": PURIFIER_COLOURS[kind]}


def accuracy_left(record: dict, name: str, threat: str, what: str = "average") -> float:
    """Return what a threat model left of a purifier; "surrogate": the least that attacks made for others left."""
    results = record["metrics"]["threats"]
    if threat != "surrogate":
        key = str(ResultKey(name, threat))
        return results[key][what] if key in results else np.nan
    return min(
        [result["others"][name][what] for result in results.values() if name in result["others"]], default=np.nan
    )


def purifiers_under(record: dict, threat: str) -> list[str]:
    """Return the purifiers that met a threat model, in the order of `purifier_order`."""
    keys = map(ResultKey.parse, record["metrics"]["threats"])
    return sorted({key.name for key in keys if key.what == threat}, key=purifier_order)


def diffpure_over_seeds(records: Sequence[dict]) -> pd.DataFrame:
    """Return what the strongest attack leaves, in %, one row per defence, as means over seeds."""
    tables = [pd.DataFrame(r["metrics"]["strongest"]).T.astype(float) * 100 for r in records]
    return sum(tables[1:], start=tables[0]) / len(tables)


def dp_speed(records: Sequence[dict]) -> Figure:
    """Draw what the strongest attack leaves against how many times fewer evaluations a defence needs."""
    figure, axes = new_figure(1, 2, width=3.7, height=3.4, sharex=True)
    strongest = [r["metrics"]["strongest"] for r in records]
    no_purifier, teacher = str(UNDEFENDED), records[0]["metrics"]["teacher"]  # no purifier, no evaluation
    evaluations = PurifierSpec.parse(teacher).steps
    for panel, what in zip(axes, ("average", "worst")):
        for name in [teacher, *(name for name in purifiers_under(records[0], "exact") if name != no_purifier)]:
            centre, half = mean_and_half_width([[s[name][what]] for s in strongest])
            spec = PurifierSpec.parse(name)
            at = evaluations / spec.steps * 1.05 ** (list(PURIFIER_NAMES).index(spec.kind) - 4)
            style = purifier_style(name) | {"capsize": 2, "markersize": 5}
            panel.errorbar(at, centre, half, linestyle="", label=PURIFIER_NAMES[spec.kind], **style)
        for name, dashes in ((teacher, ":"), (no_purifier, "--")):
            level, _ = mean_and_half_width([[s[name][what]] for s in strongest])
            panel.axhline(level[0], color=purifier_style(name)["color"], linestyle=dashes, linewidth=1)
        panel.set_xscale("log")
        ticks = [1, evaluations // 4, evaluations // 2, evaluations]
        panel.set_xticks(ticks, [f"{tick}×" for tick in ticks])
        panel.minorticks_off()
        panel.set(xlabel="network evaluations, times fewer than the teacher's")
    axes[0].set(ylabel="accuracy under the strongest attack (%)", title=f"average over draws; {seeds_note(records)}")
    axes[1].set(title=f"{worst_of(records)}; dashed: no purifier")
    handles = dict(zip(*axes[0].get_legend_handles_labels()[::-1], strict=True))
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=2, frameon=False, fontsize=7)
    sns.despine(figure)
    return figure


def worst_of(records: Sequence[dict]) -> str:
    """Return the name of the accuracy in all draws."""
    return f"worst-of-{records[0]['metrics']['budget']['draws']} accuracy"


def dp_variants(records: Sequence[dict]) -> Figure:
    """Draw, paired within each seed and at one budget, what each student gains over the one trained on clean pairs."""
    names = [n for n in purifiers_under(records[0], "sweep") if n != records[0]["metrics"]["teacher"]][::-1]
    specs = {name: PurifierSpec.parse(name) for name in names}
    names = [name for name, spec in specs.items() if spec.steps != 4 and spec.kind != OFF_SCALE]
    figure, axes = new_figure(1, 2, width=3.9, height=max(3.4, 0.17 * len(names)), sharey=True)
    for panel, what in zip(axes, ("average", "worst")):
        for row, name in enumerate(names):
            base, style = f"clean-{specs[name].steps}", purifier_style(name)
            values = [accuracy_left(r, name, "sweep", what) - accuracy_left(r, base, "sweep", what) for r in records]
            centre, half = mean_and_half_width([[v] for v in values])
            panel.errorbar(centre, [row], xerr=half, capsize=3, **style)
            panel.plot(100 * np.array(values), [row] * len(values), ".", color=style["color"], alpha=0.3)
        panel.axvline(0, color="0.4", linestyle="--", linewidth=1)
        panel.set_xlabel(
            f"accuracy under PGD-EOT, small budget,\nminus “{PURIFIER_NAMES['clean']}” (points)", fontsize=7
        )
    axes[0].set_yticks(range(len(names)), [purifier_label(name) for name in names], fontsize=7)
    axes[0].set_title(f"average over draws; {seeds_note(records)}")
    axes[1].set_title(worst_of(records))
    sns.despine(figure)
    return figure


def threat_label(record: dict, threat: str) -> str:
    """Return the words for a column of `dp_threats`."""
    if threat == "many":
        n = max(
            result["n"] for key, result in record["metrics"]["threats"].items() if ResultKey.parse(key).what == threat
        )
        return f"PGD-EOT, small\nbudget, {n} images"
    effort = parse_effort(threat)
    return (
        f"PGD-EOT,\n{effort[0]} × {effort[1]}"
        if effort
        else THREAT_COLUMNS.get(threat, threat.replace("extra", "noise\n+"))
    )


def dp_threats(records: Sequence[dict]) -> Figure:
    """Draw the heat map: threat models in columns, defences in rows, mean accuracy over seeds and draws."""
    names = [*purifiers_under(records[0], "grey"), str(UNDEFENDED)]
    keys = map(ResultKey.parse, records[0]["metrics"]["threats"])
    columns = [*THREAT_COLUMNS, *sorted({key.what for key in keys if key.name in names} - {*THREAT_COLUMNS})]
    table = pd.DataFrame([[np.mean([accuracy_left(r, n, t) for r in records]) for t in columns] for n in names]) * 100
    table.index, table.columns = [purifier_label(n) for n in names], [threat_label(records[0], t) for t in columns]
    figure, axes = new_figure(width=1.6 + 0.5 * len(columns), height=1.0 + 0.33 * len(names))
    options = {"annot": True, "fmt": ".0f", "cmap": "cividis", "vmin": 0, "vmax": 100, "linewidths": 1}
    sns.heatmap(table, mask=table.isna(), ax=axes, cbar_kws={"label": "accuracy (%)"}, **options)
    axes.set(facecolor="0.9", title=f"average over draws; {len(records)} seed(s)")
    axes.tick_params(length=0)
    return figure


def dp_inheritance(records: Sequence[dict]) -> Figure:
    """Draw how much of δ each purifier leaves, and how much the residual perturbation hurts the classifier."""
    residuals = [r["metrics"]["inheritance"] for r in records]
    names = [name for name in residuals[0] if PurifierSpec.parse(name).kind != OFF_SCALE]
    names = sorted(names, key=lambda name: purifier_order(name)[::2])[::-1]
    figure, axes = new_figure(1, 3, width=3.0, height=max(3.2, 0.17 * len(names)), sharey=True)
    panels = {
        "projection": "residual perturbation\n⟨r, δ⟩/‖δ‖² (%)",
        "ratio": "size of the residual,\n‖r‖ / ‖δ‖ (%)",
        "damage": "margin lost per unit of ‖r‖\n(logits per pixel unit)",
    }
    for panel, (what, text) in zip(axes, panels.items()):
        scale = 1.0 if what == "damage" else 100.0
        for row, name in enumerate(names):
            style = purifier_style(name)
            grey = [[residual[name][what]] for residual in residuals]
            own = [[residual[name]["own"][what]] for residual in residuals if "own" in residual[name]]
            for shift, values, fill in ((0.12, grey, style["color"]), (-0.12, own, "white")):
                if values:
                    centre, half = mean_and_half_width(values, scale)
                    panel.errorbar(centre, [row + shift], xerr=half, markerfacecolor=fill, capsize=2, **style)
        panel.set(xlabel=text)
    before = np.mean([residual[names[0]]["damage_before"] for residual in residuals])
    axes[2].axvline(before, color="0.4", linestyle=":", linewidth=1)
    axes[0].set_yticks(range(len(names)), [purifier_label(name) for name in names], fontsize=7)
    axes[0].set_title(seeds_note(records), fontsize=7)
    axes[1].set_title("filled: δ of the grey box; open: through itself", fontsize=7)
    axes[2].set_title("dotted: δ itself, no purifier", fontsize=7)
    sns.despine(figure)
    return figure


def dp_certified(records: Sequence[dict]) -> Figure:
    """Draw certified accuracy against the L2 radius: the student as denoiser and the undistilled network."""
    certified = [r["metrics"]["certified"] for r in records]
    levels = sorted({float(ResultKey.parse(key).what) for key in certified[0]["accuracy"]})
    figure, axes = new_figure(1, len(levels), width=3.3, height=2.8, sharey=True, squeeze=False)
    styles = {"teacher": ("undistilled", COLOURS[1]), "cd": (PURIFIER_NAMES["cd"], PURIFIER_COLOURS["cd"])}
    styles["adaptive"] = (PURIFIER_NAMES["adaptive"], PURIFIER_COLOURS["adaptive"])
    for panel, sigma in zip(axes[0], levels):
        for i, (net, (text, tint)) in enumerate(styles.items()):
            values = [c["accuracy"][str(ResultKey(net, f"{sigma:g}"))] for c in certified]
            centre, half = mean_and_half_width(values)
            radii = np.array(certified[0]["radii"]) + 0.004 * (i - 1)
            panel.errorbar(radii, centre, half, marker="o", markersize=3, capsize=2, color=tint, label=text)
        panel.set(xlabel="L2 radius (pixel units)", title=f"σ = {sigma:g}")
    axes[0, 0].set(ylabel=f"certified accuracy (%)\n{seeds_note(records)}")
    axes[0, -1].legend(frameon=False, fontsize=7)
    sns.despine(figure)
    return figure


def dp_convergence(records: Sequence[dict]) -> Figure:
    """Draw what is left against the attack's steps and against its passes per gradient, one step, adaptive δ."""
    figure, axes = new_figure(1, 2, width=3.0, height=2.6, sharey=True)
    b, results = records[0]["metrics"]["budget"], records[0]["metrics"]["threats"]
    efforts = [effort for key in results if (effort := parse_effort(ResultKey.parse(key).what))]
    for axis, place, name in ((0, b["eot"], "PGD steps"), (1, b["steps"], "passes per gradient (EOT)")):
        some = sorted(effort[axis] for effort in efforts if effort[1 - axis] == place)
        keys = [effort_label(s, place) if axis == 0 else effort_label(place, s) for s in some]
        for what, tint in (("average", COLOURS[0]), ("worst", COLOURS[3])):
            values = [[accuracy_left(r, "adaptive-1", k, what) for k in [*keys, "exact"]] for r in records]
            centre, half = mean_and_half_width(values)
            label = "average over draws" if what == "average" else worst_of(records)
            places = [*some, b["steps"] if axis == 0 else b["eot"]]
            axes[axis].errorbar(places, centre, half, marker="o", capsize=2, color=tint, label=label)
        axes[axis].set_xscale("log")
        axes[axis].set_xticks(places, places)
        axes[axis].minorticks_off()
        axes[axis].set(xlabel=name)
    axes[0].set(ylabel="accuracy (%)", title=seeds_note(records))
    axes[1].legend(frameon=False, fontsize=7)
    sns.despine(figure)
    return figure


def dp_pictures(records: Sequence[dict]) -> Figure:
    """Draw images, the attack on them, the difference × 10, and what teacher and students make of it."""
    images = records[0]["arrays"]["pictures"]
    first = [name for name in ("image", "attacked", "δ × 10") if name in images]
    names = first + sorted(set(images) - {*first}, key=lambda n: (not n.startswith(("sde", "ddpm")), n))
    figure, axes = new_figure(len(names), len(images[names[0]]), width=0.6, height=0.66, squeeze=False)
    for panels, name in zip(axes, names):
        for panel, pixels in zip(panels, images[name]):
            draw_image(panel, np.asarray(pixels) / 255)
        panels[0].set_title(name if name in first else purifier_label(name), fontsize=6, loc="left", pad=1)
    return figure


def dp_sanity_checks(records: Sequence[dict]) -> Figure:
    """Draw the matrix of `lib.evaluation.sanity_checks` for the defences that claims are about."""
    tables = [r["arrays"]["diagnosis"] for r in records]
    return sanity_checks.check_matrix({purifier_label(n): [pd.DataFrame(t[n]) for t in tables] for n in tables[0]})


FIGURES = {
    "dp_speed": dp_speed,
    "dp_variants": dp_variants,
    "dp_threats": dp_threats,
    "dp_inheritance": dp_inheritance,
    "dp_certified": dp_certified,
    "dp_convergence": dp_convergence,
    "dp_pictures": dp_pictures,
    "dp_diagnosis": dp_sanity_checks,
}
