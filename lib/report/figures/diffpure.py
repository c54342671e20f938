"""Figures of experiment 5, distilled DiffPure: each takes records of one seed or of many (`lib.utils.artifacts`).

Here what defences lose and cost; publications' protocols are in `diffpure_protocols`, residuals, certificates, pictures
and diagnosis in `diffpure_mechanism`.
"""

from collections.abc import Sequence
from textwrap import fill

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lib.report.figures import diffpure_mechanism, diffpure_protocols, new_figure
from lib.report.figures.diffpure_defences import (
    ADAPTIVE_STUDENT,
    ALONE,
    CLEAN_STUDENT,
    GROUPS,
    LOOKS,
    NONE,
    ONE_STEP_DDIM,
    defence_group,
    defence_label,
    defence_style,
    defences_of,
    estimate_paired,
    evidence_note,
    method_of,
    point_with_bar,
    steps_of,
)
from lib.report.statistics import interval
from lib.utils.draws import NO_ATTACK, TRANSFERRED
from lib.utils.specs import PurifierSpec

ATTACK_COLUMNS = {
    "grey": "grey box",
    "square": "Square",
    "bpda": "BPDA",
    "fixed": "fixed\nnoise",
    "exact-ce": "PGD-\nEOT,\nCE",
    "exact-margin": "PGD-\nEOT,\nmargin",
    "exact-ten": "PGD-\nEOT,\nten",
    "apgd": "APGD",
}


def teacher_of(records: Sequence[dict]) -> str:
    """Return the name of the purifier that students are compared with."""
    return records[0]["metrics"]["teacher"]


def difference_pairs(records: Sequence[dict]) -> list[tuple[str, str]]:
    """Return the pairs of defences, first minus second, that the questions of experiment 5 are about."""
    teacher, steps = teacher_of(records), records[0]["metrics"]["steps"]
    ode = f"ddim-{PurifierSpec.parse(teacher).steps}"
    pairs = [
        (teacher, NONE),
        *((name, teacher) for name in (ode, ONE_STEP_DDIM, CLEAN_STUDENT, f"clean-{steps}")),
        *((name, teacher) for name in (ADAPTIVE_STUDENT, f"adaptive-{steps}")),
        (CLEAN_STUDENT, ONE_STEP_DDIM),
        (ADAPTIVE_STUDENT, CLEAN_STUDENT),
        (f"adaptive-{steps}", f"clean-{steps}"),
        (ADAPTIVE_STUDENT, "grey-1"),
        ("undistilled-adaptive-1", ADAPTIVE_STUDENT),
        *((ADAPTIVE_STUDENT, name) for name in ALONE),
        ("label-1", "trades"),
        ("label-n0-1", "trades"),
        *((name, "trades") for name in ("adaptive-1 + trades", "trades-adaptive-1 + trades")),
        *(("cd-1", ONE_STEP_DDIM), ("pd-1", "cd-1"), ("cd-1 + purified", "cd-1")),
    ]
    present = set(defences_of(records))
    return list(dict.fromkeys(pair for pair in pairs if present >= {*pair} and pair[0] != pair[1]))


def diffpure_over_seeds(records: Sequence[dict]) -> pd.DataFrame:
    """Return accuracies and attack-induced losses in %, one row per defence, as means over seeds."""
    columns = {"clean": "clean", "control": "ten draws, no attack", "accuracy": "attacked, average"}
    columns |= {"worst_of_10": "attacked, ten draws", "majority_of_10": "attacked, majority"}
    columns |= {"loss": "loss, average", "worst_loss": "loss, ten draws"}
    names = defences_of(records)
    rows = [[100 * np.mean([r["metrics"]["defences"][n][c] for r in records]) for c in columns] for n in names]
    return pd.DataFrame(rows, index=[defence_label(n) for n in names], columns=list(columns.values()))


def label_rows(axes: Axes, names: Sequence[str]) -> dict[str, int]:
    """Write the defences of a column of rows in words, each group under its name in bold; return each one's row."""
    rows, words = {}, []
    for group in GROUPS:
        members = [name for name in names if defence_group(name) == group]
        if members:
            words.append(group)
            rows |= {name: len(words) + i for i, name in enumerate(members)}
            words += [defence_label(name) for name in members]
    axes.set_yticks(range(len(words)), words, fontsize=7)
    for tick in axes.get_yticklabels():
        if tick.get_text() in GROUPS:
            tick.set_fontweight("bold")
    axes.set_ylim(len(words) - 0.4, -0.6)
    return rows


def dp_headline(records: Sequence[dict]) -> Figure:
    """Draw attack-induced loss of every defence, and what ten draws cost without and with an attack."""
    names = defences_of(records)
    figure, axes = new_figure(1, 2, width=3.6, height=1.1 + 0.19 * (len(names) + len(GROUPS)), sharey=True)
    rows = label_rows(axes[0], names)
    for name, row in rows.items():
        style = defence_style(name)
        point_with_bar(axes[0], estimate_paired(records, name, "loss"), row, **style)
        control = estimate_paired(records, name, "worst_of_10", NO_ATTACK)
        attacked = estimate_paired(records, name, "worst_of_10")
        ends = [row - 0.13, row + 0.13]  # so that their bars do not hide each other
        axes[1].plot([control.value, attacked.value], ends, color=style["color"], linewidth=0.8, alpha=0.6, zorder=1)
        point_with_bar(axes[1], control, ends[0], limits=(0, 100), markerfacecolor="white", zorder=3, **style)
        point_with_bar(axes[1], attacked, ends[1], limits=(0, 100), zorder=2, **style)
    for panel in axes:
        for group in GROUPS[1:]:
            some = [row for name, row in rows.items() if defence_group(name) == group]
            if some:
                panel.axhspan(min(some) - 1.45, max(some) + 0.5, color="0.94", zorder=-1, linewidth=0)
        panel.grid(axis="x", color="0.9", linewidth=0.5)
        panel.set_axisbelow(True)
        panel.tick_params(axis="y", length=0)
    axes[0].axvline(0, color="0.4", linestyle="--", linewidth=1)
    axes[0].set_xlabel("accuracy without minus with attack (points)", fontsize=8)
    axes[0].set_title("attack-induced loss, average over draws\nless is better", fontsize=8)
    axes[1].set_xlabel("right in ten of ten draws (%)", fontsize=8)
    axes[1].set_title("worst of ten draws\nopen: no attack (control); filled: attacked", fontsize=8)
    axes[1].set_xlim(-3, 103)
    figure.supxlabel(evidence_note(records), fontsize=7)
    sns.despine(figure, left=True)
    return figure


def dp_differences(records: Sequence[dict]) -> Figure:
    """Draw paired differences between defences: of attack-induced loss, and of accuracy under attack."""
    pairs = difference_pairs(records)
    figure, axes = new_figure(1, 2, width=3.5, height=1.0 + 0.27 * len(pairs), sharey=True)
    for panel, measure in zip(axes, ("loss", "accuracy")):
        for row, (name, minus) in enumerate(pairs):
            estimate, style = estimate_paired(records, name, measure, minus=minus), defence_style(name)
            panel.plot(estimate.per_seed, [row + 0.28] * len(records), ".", color=style["color"], markersize=3)
            point_with_bar(panel, estimate, row, **style)
        panel.axvline(0, color="0.4", linestyle="--", linewidth=1)
        panel.grid(axis="x", color="0.9", linewidth=0.5)
        panel.set_axisbelow(True)
    words = [f"{defence_label(a)}\n− {defence_label(b)}" for a, b in pairs]
    axes[0].set_yticks(range(len(words)), words, fontsize=6)
    axes[0].set_ylim(len(pairs) - 0.4, -0.6)
    axes[0].set_xlabel("attack-induced loss,\ndifference (points); ← first better")
    axes[1].set_xlabel("accuracy under attack,\ndifference (points); first better →")
    figure.supxlabel(f"{evidence_note(records)}, paired; small dots: each seed", fontsize=7)
    sns.despine(figure)
    return figure


def attack_accuracies(records: Sequence[dict]) -> pd.DataFrame:
    """Return the mean accuracy in %, defences in rows, attacks in columns.

    The last but one is the worst per image of all before it, the last the smooth attack outside the ball.
    """
    names = defences_of(records)
    columns = [*dict.fromkeys(a for r in records for d in r["metrics"]["defences"].values() for a in d["attacks"])]
    own = sorted((c for c in columns if not c.startswith(TRANSFERRED)), key=lambda c: [*ATTACK_COLUMNS, c].index(c))
    table = {}
    for name in names:
        results = [r["metrics"]["defences"][name] for r in records]
        means = {c: np.mean([r["attacks"].get(c, np.nan) for r in results]) for c in columns}
        others = [v for c, v in means.items() if c.startswith(TRANSFERRED) and np.isfinite(v)]
        row = {"no attack": np.mean([r["clean"] for r in results])}
        row |= {ATTACK_COLUMNS.get(c, c): means[c] for c in own}
        row |= {"worst\ntransferred": min(others, default=np.nan)}
        row |= {"worst per\nimage": np.mean([r["accuracy"] for r in results])}
        table[defence_label(name)] = row | {"outside,\n2 ε": np.mean([r["outside"] for r in results])}
    return 100 * pd.DataFrame(table, dtype=float).T


def dp_attacks(records: Sequence[dict]) -> Figure:
    """Draw the heat map of attacks in columns and defences in rows, and last, apart, the attack outside the ball."""
    table = attack_accuracies(records)
    figure, axes = new_figure(width=min(7.2, 2.4 + 0.48 * table.shape[1]), height=max(2.6, 0.9 + 0.21 * len(table)))
    floor = 10 * np.floor(np.nanmin(table.to_numpy()) / 10)
    options = {"annot": True, "fmt": ".0f", "cmap": "cividis", "vmin": floor, "vmax": 100, "linewidths": 0.5}
    options |= {"annot_kws": {"fontsize": 7}}
    sns.heatmap(
        table,
        mask=table.isna(),
        ax=axes,
        cbar_kws={"label": "accuracy (%), average over draws", "pad": 0.02},
        **options,
    )
    for edge in (1, 2):
        axes.axvline(table.shape[1] - edge, color="white", linewidth=4)
    axes.set(facecolor="0.9")
    axes.set_title(evidence_note(records).partition(";")[0] + "; grey: not measured", fontsize=8)
    axes.set_xticklabels([fill(column, 7, break_long_words=False) for column in table])  # side by side in 7.2 inches
    axes.tick_params(length=0, labelsize=7)
    axes.tick_params(axis="x", rotation=0, labelsize=6)
    return figure


def dp_cost(records: Sequence[dict]) -> Figure:
    """Draw attack-induced loss against multiply-adds per image of the whole defence."""
    defences, names = records[0]["metrics"]["defences"], defences_of(records)
    costs = sorted({defences[name]["multiply_adds"] for name in names})
    figure, axes = new_figure(width=7.0, height=3.9)
    start, middles = 0.0, []
    for band, cost in enumerate(costs):
        same = [name for name in names if defences[name]["multiply_adds"] == cost]
        width = max(len(same), 2)  # a number needs as much
        for i, name in enumerate(same):
            at, estimate = start + (width - len(same)) / 2 + i + 0.5, estimate_paired(records, name, "loss")
            point_with_bar(axes, estimate, at, across=False, **defence_style(name))
            if steps_of(name) > 1:
                note = {"textcoords": "offset points", "fontsize": 6, "ha": "center"}
                axes.annotate(f"{steps_of(name)}", (at, interval(estimate)[1]), (0, 3), **note)
        if band % 2:
            axes.axvspan(start, start + width, color="0.94", zorder=-1, linewidth=0)
        middles.append(start + width / 2)
        start += width
    axes.set_xticks(middles, [f"{cost / 1e6:.2g}" for cost in costs])
    axes.tick_params(axis="x", length=0)
    axes.axhline(0, color="0.4", linestyle="--", linewidth=1)
    axes.set(xlim=(0, start), ylabel="attack-induced loss (points)")
    axes.set_xlabel("multiply-adds per image, purifier and classifier (10⁶): one band for each cost")
    axes.set_title(f"{evidence_note(records)}\nnumbers: steps, where more than one", fontsize=7)
    methods = dict.fromkeys(map(method_of, names))
    options = {"linestyle": "none", "markersize": 5}
    handles = [Line2D([], [], **options, **look_of(m), label=words_of(m)) for m in methods]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=6)
    sns.despine(figure)
    return figure


def look_of(method: str) -> dict:
    """Return a method's marker and colour."""
    return {"marker": LOOKS[method].marker, "color": LOOKS[method].colour} if method in LOOKS else {"marker": "."}


def words_of(method: str) -> str:
    """Return a method in words, with the classifier behind it."""
    words, classifier = LOOKS[method].words if method in LOOKS else method, method.partition(" + ")[2]
    return f"{words} → {LOOKS[classifier].words}" if classifier else words


def outcome_captions(records: Sequence[dict]) -> dict[str, str]:
    """Return what each figure of outcomes per image shows, computed from the records that it draws."""
    first, note = records[0]["metrics"], evidence_note(records)
    effort, draws = first["effort"], first["draws"]
    ball = f"Linf, ε = {first['eps']:g} in pixel units"
    matched = (
        f"the worst attack per image of one matched set ({ball}; {effort['steps']} steps, gradients averaged over "
        f"{effort['eot']} draws; Square with {effort['queries']} queries; images made for other defences; from the "
        f"worst {effort['last_steps']} more steps over {effort['last_eot']} draws, fewer for many-step purifiers), "
        f"chosen on other draws than the {draws['fresh']} that measure"
    )
    return {
        "dp_headline": "Left: attack-induced loss of every defence (points), its accuracy without minus under "
        f"{matched}. Right: images that are right in ten of ten draws (%), open without attack (control), filled "
        f"under attack. {note}; bars are cut at 0 and 100 %; open and filled stand one above the other.",
        "dp_differences": "Paired differences between defences, first minus second on the same images, in points, "
        f"under {matched}: left of attack-induced loss, right of accuracy under attack. {note}, not corrected for the "
        "number of pairs; small dots: each seed.",
        "dp_attacks": "Accuracy (%), average over draws, of every defence (row) without and under each attack "
        f"(column; {ball}); last column but one: {matched}, with intervals in dp_headline; last column: smooth "
        f"perturbations outside the ball, in no worst case. {note.partition(';')[0]}; grey: not measured.",
        "dp_cost": f"Attack-induced loss (points), accuracy without minus under {matched}, against multiply-adds per "
        "image of purifier and classifier together (in 10⁶, rising; one band for each cost, with all defences of "
        f"that cost side by side). Numbers: steps, where more than one. {note}.",
        **diffpure_protocols.protocol_captions(records),
    }


def diffpure_captions(records: Sequence[dict]) -> dict[str, str]:
    """Return what each figure of experiment 5 shows, computed from the records that it draws."""
    return outcome_captions(records) | diffpure_mechanism.mechanism_captions(records)


FIGURES = {
    "dp_headline": dp_headline,
    "dp_differences": dp_differences,
    "dp_attacks": dp_attacks,
    "dp_inflation": diffpure_protocols.dp_inflation,
    "dp_queries": diffpure_protocols.dp_queries,
    "dp_noise": diffpure_protocols.dp_noise,
    "dp_cost": dp_cost,
    "dp_inheritance": diffpure_mechanism.dp_inheritance,
    "dp_certified": diffpure_mechanism.dp_certified,
    "dp_pictures": diffpure_mechanism.dp_pictures,
    "dp_diagnosis": diffpure_mechanism.dp_diagnosis,
}
