"""Figures of experiment 1, classic KD: each takes the records of one or more seeds (`lib.utils.artifacts`)."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, PercentFormatter

from lib.report.figures import (
    COLOURS,
    bars_over_seeds,
    draw_bars,
    draw_image,
    evidence_over_seeds,
    mean_and_half_width,
    new_figure,
    seeds_note,
)
from lib.utils.record_keys import temperature_of

HARD_COLOUR, SOFT_COLOUR, TEACHER_COLOUR = COLOURS[1], COLOURS[0], "0.4"
SOFT_SHADES = (COLOURS[9], SOFT_COLOUR, "#003f66")  # of the weights α, the same for more than three in turn
COST_COLOURS = {"student": SOFT_COLOUR, "teacher": TEACHER_COLOUR}
SHOWN_TEMPERATURES = ("T1", "T4")  # of one image, in kd_soft_label
ENSEMBLE_LOOKS = ((COLOURS[2], "s"), (COLOURS[4], "D"))


def kd_gain(records: Sequence[dict]) -> Figure:
    """Draw the test accuracy of the same student on hard labels and on soft targets, against the number of labels."""
    figure, axes = new_figure(width=4.2, height=3.0)
    first = records[0]["metrics"]["students"]
    keys = sorted(first, key=lambda k: first[k]["labels"])
    counts = [first[k]["labels"] for k in keys]
    for name, key, colour, shift in (
        ("hard labels", "hard", HARD_COLOUR, 0.98),
        ("soft targets", "soft", SOFT_COLOUR, 1.02),
    ):
        values = [[r["metrics"]["students"][k][key] for k in keys] for r in records]
        draw_bars(axes, np.array(counts) * shift, values, label=f"student, {name}", color=colour)
    teacher = mean_and_half_width([[r["metrics"]["teacher"]["test"]] for r in records])[0][0]
    axes.axhline(teacher, color=TEACHER_COLOUR, linestyle="--", linewidth=1, label="teacher, all labels")
    axes.set_xscale("log")
    axes.set_xticks(counts, [f"{c:,}" for c in counts])
    axes.minorticks_off()
    axes.set(xlabel="labelled training images of the student", ylabel="test accuracy (%)", title=seeds_note(records))
    axes.legend()
    sns.despine(figure)
    return figure


def kd_temperature(records: Sequence[dict]) -> Figure:
    """Draw test accuracy against T for each α: the grid from which validation chooses."""
    figure, axes = new_figure(width=4.2, height=3.0)
    grid = np.array([r["arrays"]["sweep"]["soft"]["grid"] for r in records])  # seed × trial × (T, α, val, test)
    for i, alpha in enumerate(sorted(set(grid[0, :, 1]))):
        rows = grid[0, :, 1] == alpha
        places = grid[0, rows, 0] * 1.04**i  # side by side
        draw_bars(axes, places, grid[:, rows, 3], label=f"α = {alpha:g}", color=SOFT_SHADES[i % len(SOFT_SHADES)])
    hard = mean_and_half_width([[r["metrics"]["tuned"]["hard"]] for r in records])[0][0]
    axes.axhline(hard, color=HARD_COLOUR, linestyle="--", linewidth=1, label="hard labels, same number of trials")
    axes.set_xscale("log", base=2)
    ticks = sorted(set(grid[0, :, 0]))
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.set(xlabel="temperature T", ylabel="test accuracy (%)", title=seeds_note(records))
    axes.legend()
    sns.despine(figure)
    return figure


def kd_dark_knowledge(records: Sequence[dict]) -> Figure:
    """Draw the class relations in the teacher's soft labels and the similarity of the classes' mean images."""
    classes = records[0]["arrays"]["classes"]
    figure, axes = new_figure(1, 3, width=2.4, height=2.3)
    chosen = records[0]["metrics"]["tuned"]["T"]
    panels = [("T1", "teacher, T = 1"), ("chosen", f"teacher, T = {chosen:g}")]
    if len({r["metrics"]["tuned"]["T"] for r in records}) > 1:
        panels[1] = ("chosen", "teacher, T chosen on validation")
    options = {"cmap": "viridis", "square": True, "xticklabels": classes, "yticklabels": classes}
    for panel, (key, title) in zip(axes, panels):
        relations = np.mean([r["arrays"]["relations"][key] for r in records], axis=0)
        rho = np.mean([r["metrics"]["relations"][f"rho_{key}"] for r in records])
        np.fill_diagonal(relations, np.nan)
        sns.heatmap(100 * relations, ax=panel, **options, cbar_kws={"shrink": 0.6, "label": "share (%)"})
        panel.set(title=f"{title}\nρ = {rho:.2f} with similarity", xlabel="other class")
    axes[0].set_ylabel("true class")
    similarity = np.array(records[0]["arrays"]["similarity"])
    np.fill_diagonal(similarity, np.nan)
    sns.heatmap(similarity, ax=axes[2], **options, cbar_kws={"shrink": 0.6, "label": "− L2 (pixel units)"})
    axes[2].set(title="similarity of the classes'\nmean training images", xlabel="other class")
    return figure


def kd_soft_label(record: dict) -> Figure:
    """Draw one image with its hard label and the teacher's soft labels at T = 1 and T = 4."""
    image, classes = record["arrays"]["telling"][0], record["arrays"]["classes"]
    figure, axes = new_figure(1, 4, width=1.75, height=1.7, width_ratios=[0.8, 1, 1, 1])
    draw_image(axes[0], image["pixels"])
    hard = [float(c == image["label"]) for c in range(len(classes))]
    labels = {"hard label": hard} | {f"teacher, T = {temperature_of(key):g}": image[key] for key in SHOWN_TEMPERATURES}
    for panel, (title, p) in zip(axes[1:], labels.items()):
        panel.bar(classes, p, color=HARD_COLOUR if title == "hard label" else SOFT_COLOUR)
        panel.yaxis.set_major_formatter(PercentFormatter(1))
        panel.set_xticks(range(len(classes)), classes, fontsize=6)
        panel.set(title=title, ylim=(0, 1), xlabel="class")
        panel.tick_params(axis="x", labelrotation=90 if len(max(classes, key=len)) > 2 else 0)
    axes[1].set_ylabel("probability")
    sns.despine(figure)
    return figure


def kd_ambiguous_images(record: dict) -> Figure:
    """Draw the correctly classified test images with the most probable second class."""
    images, classes = record["arrays"]["telling"], record["arrays"]["classes"]
    figure, axes = new_figure(1, len(images), width=0.9, height=1.2)
    for panel, image in zip(axes, images):
        draw_image(panel, image["pixels"])
        words = f"class {classes[image['label']]}\n{100 * image['p']:.0f} %: {classes[image['second']]}"
        panel.set_title(words, fontsize=7)
    return figure


def kd_omitted_class(records: Sequence[dict]) -> Figure:
    """Draw recall of the class missing from training, and accuracy, before and after bias correction."""
    figure, axes = new_figure(1, 2, width=3.4, height=2.8)
    corrections = ("none", "prior", "test-tuned")
    for colour, key, name, shift in (
        (HARD_COLOUR, "hard", "hard labels", -0.08),
        (SOFT_COLOUR, "soft", "soft targets", 0.08),
    ):
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
    axes[0].legend(loc="center right", bbox_to_anchor=(1, 0.6))
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
    figure, axes = new_figure(1, 2, width=3.4, height=2.8, sharey=True)
    for panel, column in zip(axes, ("parameters", "activations (KiB/image)")):
        same = [name for name in table.index if name not in COST_COLOURS]  # ensembles, of one cost
        for name, row in zip(map(str, table.index), table.to_dict("records")):
            i = same.index(name) if name in same else 0
            colour, marker = (COST_COLOURS[name], "o") if name in COST_COLOURS else ENSEMBLE_LOOKS[i % 2]
            place = row[column] * 1.25 ** (i - (len(same) - 1) / 2 if name in same else 0)
            values = [[r["metrics"]["cost"][name]["test"]] for r in records]
            look = {"label": name, "color": colour, "marker": marker, "linestyle": "none"}
            draw_bars(panel, np.array([place]), values, **look)
        panel.set(xscale="log", xlabel=column)
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.margins(x=0.2)
    axes[0].set(ylabel="test accuracy (%)", title=seeds_note(records))
    axes[1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
    sns.despine(figure)
    return figure


def kd_captions(records: Sequence[dict]) -> dict[str, str]:
    """Return what each figure shows, computed from the records that it draws."""
    first, arrays = records[0]["metrics"], records[0]["arrays"]
    counts = ", ".join(f"{n:,}" for n in sorted(row["labels"] for row in first["students"].values()))
    chosen = ", ".join(f"{t:g}" for t in sorted({r["metrics"]["tuned"]["T"] for r in records}))
    shown = ", ".join(f"{temperature_of(key):g}" for key in SHOWN_TEMPERATURES)
    images = evidence_over_seeds(records[:1])
    evidence = f"{evidence_over_seeds(records)}; {bars_over_seeds(records)}"
    return {
        "kd_gain": "Test accuracy of the same student on hard labels and on the teacher's soft targets, against its "
        f"number of labelled training images ({counts}). Dashed: mean of the teacher, which has all labels. "
        f"{evidence}; the two students of one number of labels stand side by side.",
        "kd_temperature": "Test accuracy of the student on soft targets in each of the "
        f"{len(arrays['sweep']['soft']['grid'])} trials of temperature T and weight α from which validation chooses. "
        f"Dashed: mean of the student on hard labels that validation chose from as many trials. {evidence}; values of "
        "one T stand side by side.",
        "kd_dark_knowledge": "Share of each other class (column) in the teacher's soft labels of a true class (row), "
        f"in %, at T = 1 and at the temperature that validation chose (T = {chosen}), beside the similarity of the "
        "classes' mean training images: minus their L2 distance, pixel units. ρ: Spearman's rank correlation of the "
        f"two over pairs of classes. {evidence_over_seeds(records)}; means over seeds, no intervals.",
        "kd_soft_label": f"One test image, its hard label, and the teacher's soft labels at temperatures T = {shown}: "
        f"the correctly classified image whose second class is most probable, of {images} (seed "
        f"{records[0]['seed']}). A chosen image, no intervals.",
        "kd_telling_images": f"The {len(arrays['telling'])} correctly classified test images whose second class is "
        f"most probable to the teacher at T = 1, of {images} (seed {records[0]['seed']}). Above each: its class, then "
        "probability and name of the second one. Chosen images, no intervals.",
        "kd_omitted_class": "Students on hard labels and on soft targets that never saw an image of class "
        f"{arrays['classes'][first['omitted']['class']]}: recall of that class and accuracy over all, without a "
        "correction of the bias, with the one that the training split gives, and with one tuned on the test split as "
        f"in the publication. {evidence}; bars are cut at 0 and 100 %.",
        "kd_cost": "Test accuracy against number of parameters and memory of the activations (KiB per image) of "
        f"student, teacher and ensembles of teachers. {evidence}; the ensembles, of equal cost, stand side by side.",
    }


FIGURES = {
    "kd_gain": kd_gain,
    "kd_temperature": kd_temperature,
    "kd_dark_knowledge": kd_dark_knowledge,
    "kd_soft_label": lambda records: kd_soft_label(records[0]),
    "kd_telling_images": lambda records: kd_ambiguous_images(records[0]),
    "kd_omitted_class": kd_omitted_class,
    "kd_cost": kd_cost,
}
