"""Figures of experiment 5, distilled DiffPure: each takes the records of one seed or of many (`lib.utils.artifacts`)."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from lib.report.figures import COLOURS, draw_image, mean_and_half_width, new_figure, sanity_checks, seeds_note

PURIFIER_NAMES = {
    "nothing": "no purifier",
    "sde": "DiffPure, reverse SDE (teacher)",
    "ddpm": "DiffPure, DDPM (teacher)",
    "ddim": "undistilled, DDIM",
    "pd": "progressive distillation",
    "cd": "consistency distillation",
    "clean": "CD, clean pairs go on",
    "random": "CD, random δ",
    "grey": "CD, δ of the grey box",
    "adaptive": "CD, adaptive δ",
    "match-ode": "CD, the teacher's ODE from x + δ",
    "match-sde": "CD, the teacher's SDE from x + δ",
    "noskip": "consistency distillation without c_skip",
    "noskip-clean": "CD without c_skip, clean pairs go on",
    "noskip-adaptive": "CD without c_skip, adaptive δ",
}
PURIFIER_MARKS = dict(zip(PURIFIER_NAMES, "XssvPodhH^<>odH", strict=True))
STUDENT_COLOURS = (*(COLOURS[k] for k in (0, 1, 2, 9, 5, 4, 3, 8, 6)), "0.65", "0.65", "0.65")
PURIFIER_COLOURS = dict(zip(PURIFIER_NAMES, ["0.5", "0.1", "0.1", *STUDENT_COLOURS], strict=True))
OFF_SCALE = "noskip"  # before its variants go on, such a student is far off any scale: its numbers are in the notebook
THREAT_COLUMNS = ("none", "grey", "bpda", "sweep", "exact", "apgd", "square", "surrogate", "other")


def purifier_kind(name: str) -> str:
    """Returns the kind in a purifier's name: "adaptive@0.3-2" is of the kind adaptive."""
    return name.rpartition("-")[0].split("@")[0]


def purifier_label(name: str) -> str:
    """Returns a purifier's name as people say it."""
    kind, _, n = name.rpartition("-")
    own = kind.partition("@")[2]
    what = "weight" if own[:1].isdigit() else "distance"
    return (
        f"{PURIFIER_NAMES[purifier_kind(name)]}" + (f", {what} {own}" if own else "") + (f" ({n})" if n != "0" else "")
    )


def accuracy_left(record: dict, name: str, threat: str, what: str = "average") -> float:
    """Returns what a threat model left of a purifier; "surrogate": the worst that attacks made for others did to it."""
    rows = record["metrics"]["threats"]
    if threat != "surrogate":
        return rows[f"{name}/{threat}"][what] if f"{name}/{threat}" in rows else np.nan
    return min([row["others"][name][what] for row in rows.values() if name in row["others"]], default=np.nan)


def purifiers_under(record: dict, threat: str) -> list[str]:
    """Returns the purifiers that met a threat model, kinds in the order of `PURIFIER_NAMES`, few steps first."""
    found = {key.split("/")[0] for key in record["metrics"]["threats"] if key.split("/")[1] == threat}
    return sorted(
        found,
        key=lambda n: (list(PURIFIER_NAMES).index(purifier_kind(n)), n.partition("@")[2], int(n.rpartition("-")[2])),
    )


def diffpure_over_seeds(records: Sequence[dict]) -> pd.DataFrame:
    """Returns what the strongest attack leaves, in %, one row per defence, as means over seeds."""
    each = [pd.DataFrame(r["metrics"]["strongest"]).T.astype(float) * 100 for r in records]
    return sum(each) / len(each)


def dp_speed(records: Sequence[dict]) -> Figure:
    """Draws what the strongest attack leaves against how many times fewer evaluations a defence needs."""
    figure, axes = new_figure(1, 2, width=3.7, height=3.4, sharex=True)
    strongest = [r["metrics"]["strongest"] for r in records]
    bare, teacher = "nothing-0", records[0]["metrics"]["teacher"]  # no purifier, no evaluation
    evaluations = int(teacher.rpartition("-")[2])
    for panel, what in zip(axes, ("average", "worst")):
        for name in [teacher, *(name for name in purifiers_under(records[0], "exact") if name != bare)]:
            centre, half = mean_and_half_width([[s[name][what]] for s in strongest])
            n, kind = int(name.rpartition("-")[2]), purifier_kind(name)
            at = evaluations / n * 1.05 ** (list(PURIFIER_NAMES).index(kind) - 4)
            style = {"marker": PURIFIER_MARKS[kind], "color": PURIFIER_COLOURS[kind], "capsize": 2, "markersize": 5}
            panel.errorbar(at, centre, half, linestyle="", label=PURIFIER_NAMES[kind], **style)
        for name, dashes in ((teacher, ":"), (bare, "--")):
            level, _ = mean_and_half_width([[s[name][what]] for s in strongest])
            panel.axhline(level[0], color=PURIFIER_COLOURS[purifier_kind(name)], linestyle=dashes, linewidth=1)
        panel.set_xscale("log")
        ticks = [1, evaluations // 4, evaluations // 2, evaluations]
        panel.set_xticks(ticks, [f"{tick}×" for tick in ticks])
        panel.minorticks_off()
        panel.set(xlabel="network evaluations, times fewer than the teacher's")
    axes[0].set(ylabel="accuracy under the strongest attack (%)", title=f"average over draws; {seeds_note(records)}")
    n = records[0]["metrics"]["budget"]["draws"]
    axes[1].set(title=f"right in all of {n} draws; dashed: no purifier")
    handles = dict(zip(*axes[0].get_legend_handles_labels()[::-1], strict=True))
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=2, frameon=False, fontsize=7)
    sns.despine(figure)
    return figure


def dp_variants(records: Sequence[dict]) -> Figure:
    """Draws, paired within each seed and at one budget, what each student gains over the one that trains on clean."""
    names = [n for n in purifiers_under(records[0], "sweep") if n != records[0]["metrics"]["teacher"]][::-1]
    names = [n for n in names if not n.endswith("-4") and purifier_kind(n) != OFF_SCALE]
    figure, axes = new_figure(1, 2, width=3.9, height=max(3.4, 0.17 * len(names)), sharey=True)
    for panel, what in zip(axes, ("average", "worst")):
        for row, name in enumerate(names):
            base = f"clean-{name.rpartition('-')[2]}"
            values = [accuracy_left(r, name, "sweep", what) - accuracy_left(r, base, "sweep", what) for r in records]
            centre, half = mean_and_half_width([[v] for v in values])
            panel.errorbar(
                centre,
                [row],
                xerr=half,
                marker=PURIFIER_MARKS[purifier_kind(name)],
                color=PURIFIER_COLOURS[purifier_kind(name)],
                capsize=3,
            )
            panel.plot(
                100 * np.array(values), [row] * len(values), ".", color=PURIFIER_COLOURS[purifier_kind(name)], alpha=0.3
            )
        panel.axvline(0, color="0.4", linestyle="--", linewidth=1)
        panel.set(xlabel=f"accuracy under exact gradients,\nminus “{PURIFIER_NAMES['clean']}” (points)")
    axes[0].set_yticks(range(len(names)), [purifier_label(name) for name in names], fontsize=7)
    axes[0].set_title(f"average over draws; {seeds_note(records)}")
    axes[1].set_title("right in all draws")
    sns.despine(figure)
    return figure


def dp_threats(records: Sequence[dict]) -> Figure:
    """Draws the heat map: threat models in columns, defences in rows, mean accuracy over seeds and draws."""
    some = [n for n in purifiers_under(records[0], "grey")] + ["nothing-0"]
    rows = records[0]["metrics"]["threats"]
    extra = sorted({k.split("/")[1] for k in rows if k.split("/")[0] in some} - {*THREAT_COLUMNS, "fixed"})
    columns = [*THREAT_COLUMNS, "fixed", *extra]
    table = pd.DataFrame([[np.mean([accuracy_left(r, n, t) for r in records]) for t in columns] for n in some]) * 100
    table.index, table.columns = [purifier_label(n) for n in some], columns
    figure, axes = new_figure(width=1.6 + 0.5 * len(columns), height=0.8 + 0.33 * len(some))
    options = {"annot": True, "fmt": ".0f", "cmap": "cividis", "vmin": 0, "vmax": 100, "linewidths": 1}
    sns.heatmap(table, mask=table.isna(), ax=axes, cbar_kws={"label": "accuracy (%)"}, **options)
    axes.set(facecolor="0.9", title=f"average over draws; {len(records)} seed(s); exact: full budget, sweep: small one")
    axes.tick_params(length=0)
    return figure


def dp_inheritance(records: Sequence[dict]) -> Figure:
    """Draws how much of δ survives each purifier, and how much what is left hurts the classifier."""
    found = [r["metrics"]["inheritance"] for r in records]
    names = [n for n in found[0] if purifier_kind(n) != OFF_SCALE]
    names = sorted(names, key=lambda n: (list(PURIFIER_NAMES).index(purifier_kind(n)), int(n.rpartition("-")[2])))[::-1]
    figure, axes = new_figure(1, 3, width=3.0, height=max(3.2, 0.17 * len(names)), sharey=True)
    panels = {
        "projection": "share of δ that survives,\n⟨r, δ⟩ / ⟨δ, δ⟩ (%)",
        "ratio": "size of what differs,\n‖r‖ / ‖δ‖ (%)",
        "damage": "margin lost per unit of ‖r‖\n(logits per pixel unit)",
    }
    for panel, (what, text) in zip(axes, panels.items()):
        scale = 1.0 if what == "damage" else 100.0
        for row, name in enumerate(names):
            for shift, values, face in (
                (0.12, [[f[name][what]] for f in found], PURIFIER_COLOURS[purifier_kind(name)]),
                (-0.12, [[f[name]["own"][what]] for f in found] if "own" in found[0][name] else [], "white"),
            ):
                if values:
                    centre, half = mean_and_half_width(values, scale)
                    style = {"color": PURIFIER_COLOURS[purifier_kind(name)], "markerfacecolor": face, "capsize": 2}
                    panel.errorbar(
                        centre, [row + shift], xerr=half, marker=PURIFIER_MARKS[purifier_kind(name)], **style
                    )
        panel.set(xlabel=text)
    axes[2].axvline(np.mean([f[names[0]]["damage_before"] for f in found]), color="0.4", linestyle=":", linewidth=1)
    axes[0].set_yticks(range(len(names)), [purifier_label(name) for name in names], fontsize=7)
    axes[0].set_title(seeds_note(records), fontsize=7)
    axes[1].set_title("filled: δ of the grey box; open: through itself", fontsize=7)
    axes[2].set_title("dotted: δ itself, no purifier", fontsize=7)
    sns.despine(figure)
    return figure


def dp_certified(records: Sequence[dict]) -> Figure:
    """Draws certified accuracy against the L2 radius: the student as denoiser and the undistilled network."""
    found = [r["metrics"]["certified"] for r in records]
    levels = sorted({float(key.split("/")[1]) for key in found[0]["accuracy"]})
    figure, axes = new_figure(1, len(levels), width=3.3, height=2.8, sharey=True, squeeze=False)
    styles = {"teacher": ("undistilled", COLOURS[1]), "cd": (PURIFIER_NAMES["cd"], PURIFIER_COLOURS["cd"])}
    styles["adaptive"] = (PURIFIER_NAMES["adaptive"], PURIFIER_COLOURS["adaptive"])
    for panel, sigma in zip(axes[0], levels):
        for i, (net, (text, tint)) in enumerate(styles.items()):
            values = [f["accuracy"][f"{net}/{sigma:g}"] for f in found]
            centre, half = mean_and_half_width(values)
            radii = np.array(found[0]["radii"]) + 0.004 * (i - 1)
            panel.errorbar(radii, centre, half, marker="o", markersize=3, capsize=2, color=tint, label=text)
        panel.set(xlabel="L2 radius (pixel units)", title=f"σ = {sigma:g}")
    axes[0, 0].set(ylabel=f"certified accuracy (%)\n{seeds_note(records)}")
    axes[0, -1].legend(frameon=False, fontsize=7)
    sns.despine(figure)
    return figure


def dp_convergence(records: Sequence[dict]) -> Figure:
    """Draws what is left against the attack's steps and against its passes per gradient, one step, adaptive δ."""
    figure, axes = new_figure(1, 2, width=3.0, height=2.6, sharey=True)
    b, rows = records[0]["metrics"]["budget"], records[0]["metrics"]["threats"]
    found = [tuple(map(int, k.split("/")[1].split("x"))) for k in rows if k.split("/")[1].replace("x", "").isdigit()]
    for axis, place, name in ((0, b["eot"], "PGD steps"), (1, b["steps"], "passes per gradient (EOT)")):
        some = sorted(pair[axis] for pair in found if pair[1 - axis] == place)
        keys = [f"{s}x{place}" if axis == 0 else f"{place}x{s}" for s in some]
        for what, tint in (("average", COLOURS[0]), ("worst", COLOURS[3])):
            values = [[accuracy_left(r, "adaptive-1", k, what) for k in [*keys, "exact"]] for r in records]
            centre, half = mean_and_half_width(values)
            label = "average over draws" if what == "average" else "right in all draws"
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
    """Draws images, the attack on them, the difference × 10, and what teacher and students make of it."""
    rows = records[0]["arrays"]["pictures"]
    names = sorted(
        rows, key=lambda n: (n != "image", n != "attacked", n != "δ × 10", not n.startswith(("sde", "ddpm")), n)
    )
    figure, axes = new_figure(len(names), len(rows[names[0]]), width=0.6, height=0.66, squeeze=False)
    for panels, name in zip(axes, names):
        for panel, pixels in zip(panels, rows[name]):
            draw_image(panel, np.asarray(pixels) / 255)
        panels[0].set_title(purifier_label(name) if "-" in name else name, fontsize=6, loc="left", pad=1)
    return figure


def dp_sanity_checks(records: Sequence[dict]) -> Figure:
    """Draws the matrix of `lib.evaluation.sanity_checks` for the defences that claims are about."""
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
