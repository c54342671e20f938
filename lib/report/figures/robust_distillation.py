"""Figures of experiment 3, robust distillation: each takes the records of one or more seeds."""

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from lib.report.figures import COLOURS, draw_bars, mean_and_half_width, new_figure, seeds_note
from lib.report.figures.sanity_checks import check_matrix
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
WITHOUT_TEACHER = ("natural", "pgd-at", "trades", "trades-at", "mart")  # no teacher


def method_colour(method: str):
    """Return one colour for the students alone, one for the distilled ones, one for ours."""
    return COLOURS[1] if method == "guided" else COLOURS[0] if method in WITHOUT_TEACHER else COLOURS[2]


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
    figure, axes = new_figure(width=5.6, height=4.0)
    first = records[0]["metrics"]
    methods = [m for m in METHOD_NAMES if m in first["methods"] and first["methods"][m]["robust"] > 0.1]
    places = {m: lambda r, m=m: r["methods"][m] for m in methods} | {"teacher": lambda r: r["teachers"]["trades"]}
    for i, (name, row) in enumerate(places.items()):
        x, dx = mean_and_half_width(method_values(records, lambda r, row=row: row(r)["clean"]))
        y, dy = mean_and_half_width(method_values(records, lambda r, row=row: row(r)["robust"]))
        look = "s" if name in WITHOUT_TEACHER else "D" if name == "teacher" else "o"
        tint = "0.3" if name == "teacher" else method_colour(name)
        axes.errorbar(x, y, dy, dx, marker=look, color=tint, capsize=2, alpha=0.85)
        offset = (5, 4) if i % 2 else (5, -9)
        axes.annotate(METHOD_NAMES.get(name, name), (x[0], y[0]), offset, textcoords="offset points", fontsize=7)
    title = f"Linf, ε = {first['eps']:g}; {seeds_note(records)}"
    axes.set(xlabel="clean accuracy (%)", ylabel="worst-case accuracy over all attacks (%)", title=title)
    sns.despine(figure)
    return figure


def rd_gain(records: Sequence[dict]) -> Figure:
    """Draw each method's paired difference to three baselines of the same student, seed by seed."""
    figure, axes = new_figure(1, 3, width=3.0, height=3.2, sharey=True)
    first = records[0]["metrics"]["methods"]
    methods = [m for m in METHOD_NAMES if m in first and m not in ("natural", "kd")][::-1]
    for panel, base in zip(axes, ("pgd-at", "trades", "trades-at")):
        for row, m in enumerate(methods):
            if m == base:
                continue
            each = method_values(records, lambda r, a=m, b=base: r["methods"][a]["robust"] - r["methods"][b]["robust"])
            centre, half = mean_and_half_width(each)
            panel.errorbar(centre, [row], xerr=half, marker="o", capsize=3, color=method_colour(m))
            panel.plot(
                [100 * v[0] for v in each], [row] * len(each), ".", color=method_colour(m), alpha=0.3, markersize=4
            )
        panel.axvline(0, color="0.4", linestyle="--", linewidth=1)
        panel.set(xlabel=f"worst case minus that of\n{METHOD_NAMES[base]} (points)")
    axes[0].set_yticks(range(len(methods)), [METHOD_NAMES[m] for m in methods])
    axes[0].set_title(seeds_note(records))
    sns.despine(figure)
    return figure


def rd_curves(records: Sequence[dict]) -> Figure:
    """Draw worst-case accuracy over PGD on two losses against the radius."""
    figure, axes = new_figure(width=4.8, height=3.2)
    radii = np.array(records[0]["arrays"]["radii"])
    step = 0.008 * radii.max()
    for i, name in enumerate(n for n in CURVE_METHODS if n in records[0]["arrays"]["curves"]):
        values = [r["arrays"]["curves"][name] for r in records]
        draw_bars(axes, radii + (i - 2) * step, values, label=METHOD_NAMES[name], color=COLOURS[i])
    trained = records[0]["metrics"]["eps"]
    axes.axvline(trained, color="0.4", linestyle="--", linewidth=1)
    title = f"dashed: ε of training; {seeds_note(records)}"
    axes.set(xlabel="Linf radius ε (pixel units)", ylabel="worst-case accuracy (%)", title=title, ylim=(-3, 103))
    axes.legend(frameon=False)
    sns.despine(figure)
    return figure


def rd_when(records: Sequence[dict]) -> Figure:
    """Draw the ablations: teacher's robustness, ARD's temperature, few labels, transfer to the teacher."""
    figure, axes = new_figure(1, 4, width=3.1, height=3.1)
    first = records[0]["metrics"]
    teachers = [n for n in ("natural", "weak", "middle") if run_key("teacher", "rslad", n) in first["others"]] + [
        "trades"
    ]
    strength, _ = mean_and_half_width([[r["metrics"]["teachers"][t]["robust"] for t in teachers] for r in records])
    for m, tint in (("kd", COLOURS[4]), ("rslad", COLOURS[2]), ("guided", COLOURS[1])):
        students = [
            [
                r["methods"][m]["quick"] if t == "trades" else r["others"][run_key("teacher", m, t)]["robust"]
                for t in teachers
            ]
            for r in (record["metrics"] for record in records)
        ]
        draw_bars(axes[0], strength, students, color=tint, label=METHOD_NAMES[m])
    for base, style in (("pgd-at", ":"), ("trades", "--")):
        level, _ = mean_and_half_width(method_values(records, lambda r, base=base: r["methods"][base]["quick"]))
        axes[0].axhline(
            level[0], color=COLOURS[0], linestyle=style, linewidth=1, label=f"{METHOD_NAMES[base]}, no teacher"
        )
    axes[0].set(xlabel="teacher's robust accuracy (%)", ylabel="student's robust accuracy (%)")
    axes[0].set_title(f"teachers: {', '.join([*teachers[:-1], 'strong'])}")
    axes[0].legend(frameon=False, fontsize=6, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2)
    taus = sorted((float(run_parts(k)[1]), k) for k in first["others"] if run_parts(k)[0] == "tau")
    places = [tau for tau, _ in taus]
    draw_bars(
        axes[1], places, [[r["metrics"]["others"][k]["robust"] for _, k in taus] for r in records], color=COLOURS[2]
    )
    axes[1].set_xscale("log")
    axes[1].set_xticks(places, [f"{p:g}" for p in places])
    axes[1].minorticks_off()
    axes[1].set(xlabel="temperature τ of ARD's soft labels")
    few = [m for m in ("pgd-at", "trades", "trades-at", "teach", "guided") if run_key("few", m) in first["others"]]
    for shift, (kind, tint) in enumerate((("few", COLOURS[0]), ("transfer", COLOURS[1]))):
        present = [i for i, m in enumerate(few) if run_key(kind, m) in first["others"]]
        values = [[r["metrics"]["others"][run_key(kind, few[i])]["robust"] for i in present] for r in records]
        label = "labelled images only" if kind == "few" else "with images labelled by the teacher"
        if present:
            draw_bars(axes[2], np.array(present) + 0.2 * shift - 0.1, values, color=tint, label=label, linestyle="none")
    axes[2].set_xticks(range(len(few)), [METHOD_NAMES[m].removesuffix(" (ours)") for m in few], rotation=20, fontsize=7)
    axes[2].set(title=f"{first['few_labels']} labelled images" if few else "")
    if few:
        axes[2].legend(frameon=False, fontsize=6)
    for m in (m for m in METHOD_NAMES if m in first["methods"] and m not in ("natural", "kd")):
        x, dx = mean_and_half_width(method_values(records, lambda r, m=m: r["methods"][m]["transfer"]))
        y, dy = mean_and_half_width(method_values(records, lambda r, m=m: r["methods"][m]["robust"]))
        axes[3].errorbar(x, y, dy, dx, marker="o", color=method_colour(m), capsize=2)
        axes[3].annotate(
            METHOD_NAMES[m].removesuffix(" (ours)"), (x[0], y[0]), (3, 3), textcoords="offset points", fontsize=6
        )
    axes[3].set(xlabel="teacher's accuracy on the\nstudent's adversarial images (%)", ylabel="worst-case accuracy (%)")
    axes[1].set_title(seeds_note(records))
    sns.despine(figure)
    return figure


def rd_overfitting(records: Sequence[dict]) -> Figure:
    """Draw validation robust accuracy during training, and the best minus the last checkpoint on the test split."""
    figure, axes = new_figure(1, 2, width=3.6, height=3.0)
    for i, m in enumerate(n for n in CURVE_METHODS if n in records[0]["arrays"]["history"] and n != "natural"):
        scores = [np.array(r["arrays"]["history"][m])[:, 1] for r in records]
        axes[0].plot(100 * np.mean(scores, axis=0), color=COLOURS[i + 1], label=METHOD_NAMES[m])
    axes[0].set(xlabel="epoch", ylabel="validation accuracy under PGD (%)", title="mean over seeds")
    axes[0].legend(frameon=False)
    methods = [m for m in METHOD_NAMES if m in records[0]["metrics"]["methods"] and m not in ("natural", "kd")][::-1]
    for row, m in enumerate(methods):
        centre, half = mean_and_half_width(method_values(records, lambda r, m=m: r["methods"][m]["overfit"]))
        axes[1].errorbar(centre, [row], xerr=half, marker="o", capsize=3, color=method_colour(m))
    axes[1].axvline(0, color="0.4", linestyle="--", linewidth=1)
    axes[1].set_yticks(range(len(methods)), [METHOD_NAMES[m] for m in methods])
    axes[1].set(xlabel="robust accuracy, best minus last (points)", title=seeds_note(records))
    sns.despine(figure)
    return figure


def rd_dark_knowledge(records: Sequence[dict]) -> Figure:
    """Draw class relations in a natural and a robust teacher's soft labels, and every teacher's entropy."""
    figure, axes = new_figure(1, 3, width=3.2, height=2.9)
    classes = records[0]["arrays"]["classes"]
    for panel, name, title in ((axes[0], "natural", "natural teacher"), (axes[1], "trades", "robust teacher")):
        relation = np.mean([r["arrays"]["relations"][name] for r in records], axis=0)
        sns.heatmap(100 * relation, ax=panel, cmap="mako", cbar=name != "natural", vmin=0, vmax=60, square=True)
        ticks = np.arange(len(classes)) + 0.5
        panel.set_xticks(ticks, classes, rotation=90, fontsize=6)
        panel.set_yticks(ticks, classes, rotation=0, fontsize=6)
        panel.set(xlabel="other class", ylabel="true class", title=f"{title}\nshare among other classes (%), T = 1")
    names = [n for n in ("natural", "weak", "middle", "trades", "pgd-at") if n in records[0]["metrics"]["teachers"]]
    for shift, kind in enumerate(("clean", "attacked")):
        values = [[r["metrics"]["teachers"][n][f"entropy_{kind}"] / 100 for n in names] for r in records]
        places = np.arange(len(names)) + 0.2 * shift - 0.1
        draw_bars(axes[2], places, values, label=f"{kind} images", color=COLOURS[shift], linestyle="none")
    axes[2].set_xticks(range(len(names)), [{"trades": "strong", "pgd-at": "PGD-AT"}.get(n, n) for n in names])
    axes[2].set(ylabel="entropy of the soft label (nats)", xlabel="teacher", title=seeds_note(records))
    axes[2].legend(frameon=False)
    sns.despine(figure)
    return figure


def rd_sanity_checks(records: Sequence[dict]) -> Figure:
    """Draw the checks for gradient masking on our student and its controls."""
    names = list(records[0]["arrays"]["diagnosis"])
    tables = [r["arrays"]["diagnosis"] for r in records]
    return check_matrix({METHOD_NAMES[name]: [pd.DataFrame(table[name]) for table in tables] for name in names})


FIGURES = {
    "rd_scatter": rd_scatter,
    "rd_gain": rd_gain,
    "rd_curves": rd_curves,
    "rd_when": rd_when,
    "rd_overfitting": rd_overfitting,
    "rd_dark_knowledge": rd_dark_knowledge,
    "rd_diagnosis": rd_sanity_checks,
}
