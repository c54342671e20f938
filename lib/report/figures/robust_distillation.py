"""Figures of experiment 3, robust distillation: each takes the records of one or more seeds."""

from collections.abc import Callable, Sequence
from textwrap import fill

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lib.report.figures import (
    COLOURS,
    bars_over_seeds,
    count_seeds,
    cut_bars,
    draw_bars,
    evidence_over_seeds,
    mean_and_half_width,
    new_figure,
    seeds_note,
)
from lib.report.figures.sanity_checks import check_matrix, checks_caption
from lib.utils.record_keys import CURVE_METHODS, run_key, run_parts

METHOD_NAMES = {
    "natural": "natural",
    "kd": "KD, clean images",
    "pgd-at": "PGD-AT",
    "trades": "TRADES",
    "trades-at": "TRADES + PGD-AT",
    "mart": "MART",
    "ard": "ARD",
    "rslad": "RSLAD",
    "iad": "IAD",
    "adaad": "AdaAD",
    "igdm": "IGDM",
    "teach": "TRADES, soft labels",
    "guided": "guided TRADES (ours)",
}
NOT_HARDENED = ("natural", "kd")  # trained on clean images
TEACHER_LOOK = ("X", "0.1")
METHOD_LOOKS = {  # marker and colour in all figures; squares and their kin: without a teacher
    "natural": ("s", "0.5"),
    "kd": ("v", COLOURS[4]),
    "pgd-at": ("s", COLOURS[5]),
    "trades": ("D", "#6b3d00"),
    "trades-at": ("d", "#b8a800"),
    "mart": ("p", COLOURS[7]),
    "ard": ("<", COLOURS[9]),
    "rslad": (">", COLOURS[2]),
    "iad": ("h", "#44aa99"),
    "adaad": ("8", "#882255"),
    "igdm": ("P", COLOURS[1]),
    "teach": ("^", COLOURS[0]),
    "guided": ("o", COLOURS[3]),
}
TEACHER_NAMES = {"trades": "strong", "pgd-at": "PGD-AT"}


def method_style(method: str) -> dict:
    """Return the marker and the colour of a method, or of "teacher"."""
    marker, colour = METHOD_LOOKS.get(method, TEACHER_LOOK)
    return {"marker": marker, "color": colour}


def method_values(records: Sequence[dict], get: Callable[[dict], float]) -> list[list[float]]:
    """Return one number per seed in the shape that `draw_bars` takes."""
    return [[get(r["metrics"])] for r in records]


def method_table(results: dict[str, dict]) -> pd.DataFrame:
    """Return clean and worst-case accuracy (%) and that under each attack, one row per model."""
    rows = {n: {"clean": r["clean"], "worst case": r["robust"]} | r["attacks"] for n, r in results.items()}
    return 100 * pd.DataFrame(rows).T.rename(index=METHOD_NAMES)


def robust_over_seeds(records: Sequence[dict]) -> pd.DataFrame:
    """Return means over seeds (%) of clean, worst-case, best and last accuracy, one row per method, and the trials."""
    rows = {}
    for m in (m for m in METHOD_NAMES if m in records[0]["metrics"]["methods"]):
        each = [r["metrics"]["methods"][m] for r in records]
        rows[METHOD_NAMES[m]] = {
            "clean": 100 * np.mean([row["clean"] for row in each]),
            "worst case": 100 * np.mean([row["robust"] for row in each]),
            "two APGDs, best": 100 * np.mean([row["quick"] for row in each]),
            "two APGDs, last": 100 * np.mean([row["last"] for row in each]),
            "chosen trials": "; ".join(
                sorted({", ".join(f"{k} {v:.3g}" for k, v in r["trial"].items()) for r in each})
            ),
        }
    return pd.DataFrame.from_dict(rows, orient="index")


def rd_scatter(records: Sequence[dict]) -> Figure:
    """Draw worst-case against clean accuracy of all students and their teacher, with intervals over seeds."""
    figure, axes = new_figure(1, 2, width=2.9, height=2.9)
    first = records[0]["metrics"]
    methods = [m for m in METHOD_NAMES if m in first["methods"]]
    places = {m: lambda r, m=m: r["methods"][m] for m in methods} | {"teacher": lambda r: r["teachers"]["trades"]}
    for name, row in places.items():
        x, dx = mean_and_half_width(method_values(records, lambda r, row=row: row(r)["clean"]))
        y, dy = mean_and_half_width(method_values(records, lambda r, row=row: row(r)["robust"]))
        look = method_style(name) | {"capsize": 2, "markersize": 5, "elinewidth": 0.8, "linestyle": "none"}
        for panel in axes[: 1 if name in NOT_HARDENED else 2]:
            panel.errorbar(x, y, cut_bars(y, dy), cut_bars(x, dx), label=METHOD_NAMES.get(name, name), **look)
    for panel, title in zip(
        axes, (f"Linf, ε = {first['eps']:g}; {seeds_note(records)}", "adversarial training, larger")
    ):
        panel.set(xlabel="clean accuracy (%)", title=title)
    axes[0].set(ylabel="worst-case accuracy over all attacks (%)", ylim=(-3, 100))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    sns.despine(figure)
    return figure


def rd_gain(records: Sequence[dict]) -> Figure:
    """Draw each method's paired difference to three baselines of the same student, seed by seed."""
    figure, axes = new_figure(1, 3, width=2.4, height=2.8, sharey=True)
    first = records[0]["metrics"]["methods"]
    methods = [m for m in METHOD_NAMES if m in first and m not in NOT_HARDENED][::-1]
    for panel, base in zip(axes, ("pgd-at", "trades", "trades-at")):
        for row, m in enumerate(methods):
            if m == base:
                continue
            each = method_values(records, lambda r, a=m, b=base: r["methods"][a]["robust"] - r["methods"][b]["robust"])
            centre, half = mean_and_half_width(each)
            style = method_style(m)
            panel.errorbar(centre, [row], xerr=half, capsize=3, markersize=5, **style)
            seeds = [100 * v[0] for v in each]
            panel.plot(seeds, [row - 0.25] * len(each), ".", color=style["color"], alpha=0.5, markersize=4)
        panel.axvline(0, color="0.4", linestyle="--", linewidth=1)
        panel.set(xlabel=f"worst case minus that of\n{METHOD_NAMES[base]} (points)")
    axes[0].set_yticks(range(len(methods)), [METHOD_NAMES[m] for m in methods])
    axes[0].set_title(seeds_note(records))
    sns.despine(figure)
    return figure


def rd_curves(records: Sequence[dict]) -> Figure:
    """Draw worst-case accuracy over PGD on two losses against the radius."""
    figure, axes = new_figure(width=4.8, height=3.0)
    radii = np.array(records[0]["arrays"]["radii"])
    step = 0.008 * radii.max()
    for i, name in enumerate(n for n in CURVE_METHODS if n in records[0]["arrays"]["curves"]):
        values = [r["arrays"]["curves"][name] for r in records]
        draw_bars(axes, radii + (i - 2) * step, values, label=METHOD_NAMES[name], markersize=4, **method_style(name))
    trained = records[0]["metrics"]["eps"]
    axes.axvline(trained, color="0.4", linestyle="--", linewidth=1)
    title = f"dashed: ε of training; {seeds_note(records)}"
    axes.set(xlabel="Linf radius ε (pixel units)", ylabel="worst-case accuracy (%)", title=title, ylim=(-3, 103))
    axes.legend()
    sns.despine(figure)
    return figure


def rd_when(records: Sequence[dict]) -> Figure:
    """Draw the ablations: teacher's robustness, ARD's temperature, few labels, transfer to the teacher."""
    figure, panels = new_figure(2, 2, width=3.5, height=2.7)
    axes = panels.ravel()
    first = records[0]["metrics"]
    teachers = [n for n in ("natural", "weak", "middle") if run_key("teacher", "rslad", n) in first["others"]] + [
        "trades"
    ]
    strength, _ = mean_and_half_width([[r["metrics"]["teachers"][t]["robust"] for t in teachers] for r in records])
    for m in ("kd", "rslad", "guided"):
        students = [
            [
                r["methods"][m]["quick"] if t == "trades" else r["others"][run_key("teacher", m, t)]["robust"]
                for t in teachers
            ]
            for r in (record["metrics"] for record in records)
        ]
        draw_bars(axes[0], strength, students, label=METHOD_NAMES[m], markersize=5, **method_style(m))
    for base, style in (("pgd-at", ":"), ("trades", "--")):
        level, _ = mean_and_half_width(method_values(records, lambda r, base=base: r["methods"][base]["quick"]))
        look = {"color": method_style(base)["color"], "linestyle": style, "linewidth": 1}
        axes[0].axhline(level[0], label=f"{METHOD_NAMES[base]}, no teacher", **look)
    axes[0].set(xlabel="teacher's robust accuracy (%)", ylabel="student's robust accuracy (%)")
    axes[0].set_title(f"teachers: {', '.join([*teachers[:-1], 'strong'])}")
    axes[0].legend(loc="center left", bbox_to_anchor=(0.05, 0.5))
    taus = sorted((float(run_parts(k)[1]), k) for k in first["others"] if run_parts(k)[0] == "tau")
    places = [tau for tau, _ in taus]
    warm = [[r["metrics"]["others"][k]["robust"] for _, k in taus] for r in records]
    draw_bars(axes[1], places, warm, markersize=5, **method_style("ard"))
    axes[1].set_xscale("log")
    axes[1].set_xticks(places, [f"{p:g}" for p in places])
    axes[1].minorticks_off()
    axes[1].set(xlabel="temperature τ of ARD's soft labels", ylabel="student's robust accuracy (%)")
    few = [m for m in ("pgd-at", "trades", "trades-at", "teach", "guided") if run_key("few", m) in first["others"]]
    for shift, (kind, tint) in enumerate((("few", "0.6"), ("transfer", "0.1"))):
        present = [i for i, m in enumerate(few) if run_key(kind, m) in first["others"]]
        values = [[r["metrics"]["others"][run_key(kind, few[i])]["robust"] for i in present] for r in records]
        label = "labelled images only" if kind == "few" else "with images labelled by the teacher"
        if present:
            draw_bars(axes[2], np.array(present) + 0.2 * shift - 0.1, values, color=tint, label=label, linestyle="none")
    axes[2].set_xticks(range(len(few)), [fill(METHOD_NAMES[m].removesuffix(" (ours)"), 8) for m in few])
    axes[2].set(title=f"{first['few_labels']} labelled images" if few else "", ylabel="student's robust accuracy (%)")
    if few:
        axes[2].legend(loc="lower right")
    for m in (m for m in METHOD_NAMES if m in first["methods"] and m not in NOT_HARDENED):
        x, dx = mean_and_half_width(method_values(records, lambda r, m=m: r["methods"][m]["transfer"]))
        y, dy = mean_and_half_width(method_values(records, lambda r, m=m: r["methods"][m]["robust"]))
        look = method_style(m) | {"capsize": 2, "markersize": 5, "elinewidth": 0.8, "linestyle": "none"}
        axes[3].errorbar(x, y, cut_bars(y, dy), cut_bars(x, dx), label=METHOD_NAMES[m].removesuffix(" (ours)"), **look)
    axes[3].legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=6)
    axes[3].set(xlabel="teacher's accuracy on the\nstudent's adversarial images (%)", ylabel="worst-case accuracy (%)")
    axes[1].set_title(seeds_note(records))
    sns.despine(figure)
    return figure


def rd_overfitting(records: Sequence[dict]) -> Figure:
    """Draw validation robust accuracy during training, and the best minus the last checkpoint on the test split."""
    figure, axes = new_figure(1, 2, width=3.5, height=2.7)
    for m in (n for n in CURVE_METHODS if n in records[0]["arrays"]["history"] and n != "natural"):
        scores = [np.array(r["arrays"]["history"][m])[:, 1] for r in records]
        axes[0].plot(100 * np.mean(scores, axis=0), color=method_style(m)["color"], label=METHOD_NAMES[m])
    axes[0].set(
        xlabel="epoch",
        ylabel="validation accuracy under PGD (%)",
        title="mean over seeds" if len(records) > 1 else "one seed",
    )
    axes[0].xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0].legend()
    methods = [m for m in METHOD_NAMES if m in records[0]["metrics"]["methods"] and m not in NOT_HARDENED][::-1]
    for row, m in enumerate(methods):
        centre, half = mean_and_half_width(method_values(records, lambda r, m=m: r["methods"][m]["overfit"]))
        axes[1].errorbar(centre, [row], xerr=half, capsize=3, markersize=5, **method_style(m))
    axes[1].axvline(0, color="0.4", linestyle="--", linewidth=1)
    axes[1].set_yticks(range(len(methods)), [METHOD_NAMES[m] for m in methods])
    axes[1].set(xlabel="robust accuracy, best minus last (points)", title=seeds_note(records))
    sns.despine(figure)
    return figure


def rd_dark_knowledge(records: Sequence[dict]) -> Figure:
    """Draw class relations in a natural and a robust teacher's soft labels, and every teacher's entropy."""
    figure, axes = new_figure(1, 3, width=2.4, height=2.4, width_ratios=[1, 1.15, 1.1])
    classes = records[0]["arrays"]["classes"]
    most = 100 * max(np.max(np.mean([r["arrays"]["relations"][n] for r in records], 0)) for n in ("natural", "trades"))
    for panel, name, title in ((axes[0], "natural", "natural teacher"), (axes[1], "trades", "robust teacher")):
        relation = np.mean([r["arrays"]["relations"][name] for r in records], axis=0)
        options = {"cmap": "viridis", "square": True, "cbar_kws": {"shrink": 0.6, "label": "share (%)"}}
        np.fill_diagonal(relation, np.nan)
        sns.heatmap(100 * relation, ax=panel, vmin=0, vmax=most, cbar=name != "natural", **options)
        ticks = np.arange(len(classes)) + 0.5
        panel.set_xticks(ticks, classes, rotation=90, fontsize=6)
        panel.set_yticks(ticks, classes, rotation=0, fontsize=6)
        panel.set(xlabel="other class", ylabel="true class", title=title)
    names = [n for n in ("natural", "weak", "middle", "trades", "pgd-at") if n in records[0]["metrics"]["teachers"]]
    for shift, kind in enumerate(("clean", "attacked")):
        values = [[r["metrics"]["teachers"][n][f"entropy_{kind}"] / 100 for n in names] for r in records]
        places = np.arange(len(names)) + 0.2 * shift - 0.1
        look = {"color": ("0.6", "0.1")[shift], "linestyle": "none", "limits": (0, np.inf)}
        draw_bars(axes[2], places, values, label=f"{kind} images", **look)
    axes[2].set_xticks(range(len(names)), [TEACHER_NAMES.get(n, n) for n in names])
    axes[2].set(ylabel="entropy of the soft label (nats)", xlabel="teacher", title=seeds_note(records))
    axes[2].legend()
    sns.despine(figure)
    return figure


def rd_sanity_checks(records: Sequence[dict]) -> Figure:
    """Draw the checks for gradient masking on our student and its controls."""
    names = list(records[0]["arrays"]["diagnosis"])
    tables = [r["arrays"]["diagnosis"] for r in records]
    return check_matrix({METHOD_NAMES[name]: [pd.DataFrame(table[name]) for table in tables] for name in names})


def robust_captions(records: Sequence[dict]) -> dict[str, str]:
    """Return what each figure shows, computed from the records that it draws."""
    first = records[0]["metrics"]
    ball = f"Linf, ε = {first['eps']:g} in pixel units"
    attacks = ", ".join(dict.fromkeys(a for row in first["methods"].values() for a in row["attacks"]))
    images, bars = evidence_over_seeds(records), bars_over_seeds(records, dots=False)
    dotted, radii = bars_over_seeds(records), records[0]["arrays"]["radii"]
    few = f"of {first['few_labels']} labelled images" if first["few_labels"] else "of few labels (not in this profile)"
    return {
        "rd_scatter": f"Worst-case accuracy per image over {attacks} ({ball}) against clean accuracy of the same "
        f"student by each method, and of the strong teacher; right: those trained on adversarial images. {images}; "
        f"{bars}; bars are cut at 0 and 100 %.",
        "rd_gain": f"Worst-case accuracy over {attacks} ({ball}) of each method minus that of three baselines of the "
        f"same student, paired within each seed, in points. {images}; {dotted}, below their mean.",
        "rd_curves": "Worst-case accuracy per image over PGD on two losses, cross-entropy and margin, against the "
        f"Linf radius ε = {min(radii):g} to {max(radii):g} (pixel units); dashed: ε = {first['eps']:g}, that of "
        f"training. {images}; {dotted}; bars are cut at 0 and 100 %; values of one radius stand side by side.",
        "rd_when": f"Robust accuracy of students ({ball}) in the worst case over two APGDs: against the robust "
        f"accuracy of their teacher, against the temperature of ARD's soft labels, {few}; and, below right, in the "
        f"worst case over {attacks}, against the teacher's accuracy on the student's adversarial images. {images}; "
        f"{dotted} but below right; bars are cut at 0 and 100 %.",
        "rd_overfitting": f"Left: accuracy on validation images under PGD ({ball}) after each epoch, mean over "
        f"{count_seeds(records)}, no intervals. Right: worst-case accuracy over two APGDs of the best epoch by "
        f"validation minus that of the last, in points. {images}; {bars}.",
        "rd_dark_knowledge": "Share of each other class (column) in a teacher's soft labels of a true class (row) at "
        "T = 1, in %, mean over seeds, natural and strong teacher; entropy of the soft labels (nats) of each teacher "
        f"on clean and attacked images ({ball}). {count_seeds(records)}, each with all test images; {dotted}; bars "
        "are cut at 0.",
        "rd_diagnosis": checks_caption(f"students, {ball}", records),
    }


FIGURES = {
    "rd_scatter": rd_scatter,
    "rd_gain": rd_gain,
    "rd_curves": rd_curves,
    "rd_when": rd_when,
    "rd_overfitting": rd_overfitting,
    "rd_dark_knowledge": rd_dark_knowledge,
    "rd_diagnosis": rd_sanity_checks,
}
