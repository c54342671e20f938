"""Figures of experiment 1, classic KD: each takes the records of one or more seeds (`lib.utils.artifacts`)."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, PercentFormatter

from lib.report.figures import COLOURS, draw_bars, draw_image, mean_and_half_width, new_figure, seeds_note

HARD_COLOUR, SOFT_COLOUR = "hard labels", "soft targets"


def kd_gain(records: Sequence[dict]) -> Figure:
    """Draw the test accuracy of the same student on hard labels and on soft targets, against the number of labels."""
    figure, axes = new_figure(width=4.2, height=3.0)
    first = records[0]["metrics"]["students"]
    keys = sorted(first, key=lambda k: first[k]["labels"])
    counts = [first[k]["labels"] for k in keys]
    for name, key, colour, shift in ((HARD_COLOUR, "hard", COLOURS[1], 0.98), (SOFT_COLOUR, "soft", COLOURS[0], 1.02)):
        values = [[r["metrics"]["students"][k][key] for k in keys] for r in records]
        draw_bars(axes, np.array(counts) * shift, values, label=f"student, {name}", color=colour)
    teacher = mean_and_half_width([[r["metrics"]["teacher"]["test"]] for r in records])[0][0]
    axes.axhline(teacher, color="0.4", linestyle="--", linewidth=1, label="teacher, all labels")
    axes.set_xscale("log")
    axes.set_xticks(counts, [f"{c:,}" for c in counts])
    axes.minorticks_off()
    axes.set(xlabel="labelled training images of the student", ylabel="test accuracy (%)", title=seeds_note(records))
    axes.legend(frameon=False)
    sns.despine(figure)
    return figure


def kd_temperature(records: Sequence[dict]) -> Figure:
    """Draw test accuracy against T for each α: the grid from which validation chooses."""
    figure, axes = new_figure(width=4.2, height=3.0)
    grid = np.array([r["arrays"]["sweep"]["soft"]["grid"] for r in records])  # seed × trial × (T, α, val, test)
    for colour, alpha in zip(COLOURS, sorted(set(grid[0, :, 1]))):
        rows = grid[0, :, 1] == alpha
        draw_bars(axes, grid[0, rows, 0], grid[:, rows, 3], label=f"α = {alpha:g}", color=colour)
    hard = mean_and_half_width([[r["metrics"]["tuned"]["hard"]] for r in records])[0][0]
    axes.axhline(hard, color="0.4", linestyle="--", linewidth=1, label="hard labels, same number of trials")
    axes.set_xscale("log", base=2)
    ticks = sorted(set(grid[0, :, 0]))
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.set(xlabel="temperature T", ylabel="test accuracy (%)", title=seeds_note(records))
    axes.legend(frameon=False)
    sns.despine(figure)
    return figure


def kd_dark_knowledge(records: Sequence[dict]) -> Figure:
    """Draw the class relations in the teacher's soft labels and the similarity of the classes' mean images."""
    classes = records[0]["arrays"]["classes"]
    figure, axes = new_figure(1, 3, width=3.1, height=3.0)
    chosen = records[0]["metrics"]["tuned"]["T"]
    panels = [("T1", "teacher's other classes, T = 1"), ("chosen", f"the same, T = {chosen:g}")]
    if len({r["metrics"]["tuned"]["T"] for r in records}) > 1:
        panels[1] = ("chosen", "the same, T chosen on validation")
    for panel, (key, title) in zip(axes, panels):
        relations = np.mean([r["arrays"]["relations"][key] for r in records], axis=0)
        rho = np.mean([r["metrics"]["relations"][f"rho_{key}"] for r in records])
        sns.heatmap(
            relations,
            ax=panel,
            cmap="viridis",
            square=True,
            xticklabels=classes,
            yticklabels=classes,
            cbar_kws={"shrink": 0.6},
        )
        panel.set(title=f"{title}\nρ = {rho:.2f} with similarity", xlabel="other class")
    axes[0].set_ylabel("true class")
    similarity = np.array(records[0]["arrays"]["similarity"])
    np.fill_diagonal(similarity, np.nan)
    sns.heatmap(
        similarity,
        ax=axes[2],
        cmap="viridis",
        square=True,
        xticklabels=classes,
        yticklabels=classes,
        cbar_kws={"shrink": 0.6},
    )
    axes[2].set(title="similarity of mean images\n(minus L2 distance, pixels)", xlabel="other class")
    return figure


def kd_soft_label(record: dict) -> Figure:
    """Draw one image with its hard label and the teacher's soft labels at T = 1 and T = 4."""
    image, classes = record["arrays"]["telling"][0], record["arrays"]["classes"]
    figure, axes = new_figure(1, 4, width=2.0, height=1.9, width_ratios=[0.8, 1, 1, 1])
    draw_image(axes[0], image["pixels"])
    hard = [float(c == image["label"]) for c in range(len(classes))]
    for panel, title, p in zip(
        axes[1:], ("hard label", "teacher, T = 1", "teacher, T = 4"), (hard, image["T1"], image["T4"])
    ):
        panel.bar(classes, p, color=COLOURS[0])
        panel.yaxis.set_major_formatter(PercentFormatter(1))
        panel.set(title=title, ylim=(0, 1), xlabel="class")
        panel.tick_params(axis="x", labelrotation=90 if len(max(classes, key=len)) > 2 else 0)
    axes[1].set_ylabel("probability")
    sns.despine(figure)
    return figure


def kd_ambiguous_images(record: dict) -> Figure:
    """Draw the correctly classified test images with the most probable second class."""
    images, classes = record["arrays"]["telling"], record["arrays"]["classes"]
    figure, axes = new_figure(1, len(images), width=1.1, height=1.4)
    for panel, image in zip(axes, images):
        draw_image(panel, image["pixels"])
        panel.set_title(f"{classes[image['label']]}, {100 * image['p']:.0f} % {classes[image['second']]}", fontsize=7)
    return figure


def kd_omitted_class(records: Sequence[dict]) -> Figure:
    """Draw recall of the class missing from training, and accuracy, before and after bias correction."""
    figure, axes = new_figure(1, 2, width=3.4, height=2.8)
    corrections = ("none", "prior", "test-tuned")
    for colour, key, name, shift in ((COLOURS[1], "hard", HARD_COLOUR, -0.08), (COLOURS[0], "soft", SOFT_COLOUR, 0.08)):
        values = {
            field: [[r["metrics"]["omitted"][key][c][field] for c in corrections] for r in records]
            for field in ("recall", "accuracy")
        }
        for panel, field in zip(axes, values):
            draw_bars(panel, np.arange(3) + shift, values[field], label=name, color=colour, linestyle="none")
    left_out = records[0]["arrays"]["classes"][records[0]["metrics"]["omitted"]["class"]]
    for panel, title in zip(
        axes, (f"recall of class {left_out}, not in training (%)", "test accuracy, all classes (%)")
    ):
        panel.set_xticks(range(3), ["no bias", "prior\n(train)", "tuned on\ntest (paper)"])
        panel.set(ylabel=title, xlabel="bias correction")
    axes[0].set_title(seeds_note(records))
    axes[0].legend(frameon=False)
    sns.despine(figure)
    return figure


def kd_cost_table(records: Sequence[dict]) -> pd.DataFrame:
    """Return accuracy (mean over seeds), parameters and memory of teacher, ensembles and student."""
    rows = []
    for name in records[0]["metrics"]["cost"]:
        row = {
            "network": name,
            "test accuracy (%)": 100 * np.mean([r["metrics"]["cost"][name]["test"] for r in records]),
        }
        for field, title in (
            ("parameters", "parameters"),
            ("weights_kib", "weights (KiB)"),
            ("activations_kib", "activations (KiB/image)"),
        ):
            row[title] = records[0]["metrics"]["cost"][name][field]
        rows.append(row)
    return pd.DataFrame(rows).set_index("network")


def kd_cost(records: Sequence[dict]) -> Figure:
    """Draw test accuracy against parameters and against memory."""
    table = kd_cost_table(records)
    figure, axes = new_figure(1, 2, width=3.2, height=2.8, sharey=True)
    for panel, column in zip(axes, ("parameters", "activations (KiB/image)")):
        for colour, (name, row) in zip(COLOURS, table.iterrows()):
            values = [[r["metrics"]["cost"][name]["test"]] for r in records]
            draw_bars(panel, [row[column]], values, label=name, color=colour, linestyle="none")
        panel.set(xscale="log", xlabel=column)
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.margins(x=0.2)
    axes[0].set(ylabel="test accuracy (%)", title=seeds_note(records))
    axes[1].legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    sns.despine(figure)
    return figure


FIGURES = {
    "kd_gain": kd_gain,
    "kd_temperature": kd_temperature,
    "kd_dark_knowledge": kd_dark_knowledge,
    "kd_soft_label": lambda records: kd_soft_label(records[0]),
    "kd_telling_images": lambda records: kd_ambiguous_images(records[0]),
    "kd_omitted_class": kd_omitted_class,
    "kd_cost": kd_cost,
}
