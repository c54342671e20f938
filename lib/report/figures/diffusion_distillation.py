"""Figures of experiment 4, diffusion distillation; each takes the records of one seed or of many."""

from collections.abc import Mapping, Sequence
from functools import reduce

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lib.report.figures import (
    SAMPLER_LOOKS,
    bars_over_seeds,
    count_seeds,
    draw_image,
    evidence_over_seeds,
    mean_and_half_width,
    new_figure,
    seeds_note,
)
from lib.utils.specs import PurifierSpec

SAMPLER_NAMES = {
    "ddim": "DDIM, undistilled",
    "sde": "reverse SDE, undistilled",
    "pd": "progressive distillation",
    "cd": "consistency distillation",
}
SAMPLER_COLOURS = {kind: SAMPLER_LOOKS[kind][1] for kind in SAMPLER_NAMES}
SAMPLER_MARKERS = {kind: SAMPLER_LOOKS[kind][0] for kind in SAMPLER_NAMES}
SDE_AGAIN = "sde-100 again"  # the reference compared with itself
SAMPLER_MEASURES = {  # in the order of the panels: scale and axis
    "distance": (1e3, "distance to the 100-step ODE\n(10⁻³ squared pixel units)"),
    "accuracy": (100.0, "classifier's accuracy, minus that\non the images themselves (points)"),
    "frechet": (1.0, "Fréchet distance of the\nclassifier's features to images"),
}


ACCURACY_MARGIN = -1  # points, of the claim diff.accuracy_4
IMAGES = ("image", "images", "noisy")  # columns that are no samplers
REFERENCES = ("sde-100", SDE_AGAIN, "ode-100")
KINDS = ("ddim", "pd", "cd", "sde")


def sampler_order(name: str) -> tuple[int, int, int]:
    """Return the place of a sampler: images first, then references, teacher and students, many steps first.

    Records are read from JSON with their names in alphabetical order.
    """
    for group, names in enumerate((IMAGES, REFERENCES)):
        if name in names:
            return group, names.index(name), 0
    spec = PurifierSpec.parse(name)
    return 2, KINDS.index(spec.kind), -spec.steps


def sampler_label(name: str) -> str:
    """Return a sampler as it is called in text: "cd-2" is "CD, 2 steps"."""
    spec = PurifierSpec.parse(name)
    return f"{spec.kind.upper()}, {spec.steps} step{'s' if spec.steps != 1 else ''}"


def sampler_table(metrics: Mapping[str, dict], scale: Mapping[str, float] | None = None) -> pd.DataFrame:
    """Return one row per sampler; accuracies in %."""
    table = pd.DataFrame({name: metrics[name] for name in sorted(metrics, key=sampler_order)}, dtype=float).T
    scales = {"accuracy": 100.0} | dict(scale or {})
    return table.mul([scales.get(measure, 1.0) for measure in table.columns])


def few_step_over_seeds(records: Sequence[dict]) -> pd.DataFrame:
    """Return means over seeds, one row per sampler; accuracy in %, distance in 10⁻³ squared pixel units."""
    each = [sampler_table(r["metrics"]["sweep"], {"distance": 1e3}).astype(float) for r in records]
    return reduce(pd.DataFrame.add, each) / len(each)


def sampler_steps(record: dict, kind: str) -> list[int]:
    """Return the numbers of steps in which a kind was measured."""
    return [row["steps"] for name, row in record["metrics"]["sweep"].items() if name.startswith(f"{kind}-")]


def sampler_values(axes: Axes, records: Sequence[dict], measure: str, kinds: Sequence[str]) -> None:
    """Draw one measure against the number of steps, with intervals over seeds."""
    scale, name = SAMPLER_MEASURES[measure]
    for i, kind in enumerate(kinds):
        steps = sorted({n for n in sampler_steps(records[0], kind) if n != 100})
        sweeps = [r["metrics"]["sweep"] for r in records]
        base = [r["images"][measure] if measure == "accuracy" else 0.0 for r in sweeps]  # paired within each seed
        values = [[r[f"{kind}-{n}"][measure] - b for n in steps] for r, b in zip(sweeps, base)]
        centre, half = mean_and_half_width(values, scale)
        places = np.array(steps) * 1.08 ** (i - 1.5)
        axes.errorbar(
            places,
            centre,
            half,
            marker=SAMPLER_MARKERS[kind],
            markersize=4,
            capsize=2,
            color=SAMPLER_COLOURS[kind],
            label=SAMPLER_NAMES[kind],
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks([1, 2, 4, 8, 16, 32, 64], ["1", "2", "4", "8", "16", "32", "64"])
    axes.set(xlabel="steps (network evaluations)", ylabel=name)


def diff_steps(records: Sequence[dict]) -> Figure:
    """Draw three measures of quality against the number of steps, for teacher and students."""
    figure, axes = new_figure(1, 3, width=2.4, height=2.7)
    for panel, measure in zip(axes, SAMPLER_MEASURES):
        sampler_values(panel, records, measure, ("ddim", "pd", "cd") if measure == "distance" else tuple(SAMPLER_NAMES))
    axes[0].set_yscale("log")
    axes[1].axhline(0, color="0.3", linestyle=":", linewidth=1)
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    level, _ = mean_and_half_width(
        [[r["metrics"]["sweep"]["images"]["frechet"]] for r in records], SAMPLER_MEASURES["frechet"][0]
    )
    axes[2].axhline(level[0], color="0.3", linestyle=":", linewidth=1)
    axes[2].set_yscale("log")
    axes[1].set_title("dotted: the images themselves")
    axes[0].set_title(seeds_note(records))
    sns.despine(figure)
    return figure


def diff_gain(records: Sequence[dict]) -> Figure:
    """Draws, paired within each seed, what each student wins over DDIM and loses in accuracy to the 100-step SDE."""
    figure, axes = new_figure(1, 2, width=3.4, height=2.8)
    for i, kind in enumerate(("pd", "cd")):
        for panel, what, scale in ((axes[0], "gain", 1e3), (axes[1], "accuracy", 100.0)):
            values = [[r["metrics"]["summary"][f"{kind}_{n}_{what}"] for n in (1, 2, 4)] for r in records]
            centre, half = mean_and_half_width(values, scale)
            places = np.arange(3) + 0.2 * i - 0.1
            panel.errorbar(
                places,
                centre,
                half,
                fmt=SAMPLER_MARKERS[kind],
                capsize=3,
                markersize=5,
                color=SAMPLER_COLOURS[kind],
                label=SAMPLER_NAMES[kind],
            )
            for row in values:
                panel.plot(
                    places, np.array(row) * scale, ".", color=SAMPLER_COLOURS[kind], alpha=0.3, markersize=4, zorder=0
                )
    axes[0].set(ylabel="distance: DDIM minus student\n(10⁻³ squared pixel units)", title=seeds_note(records))
    axes[0].set_yscale("symlog", linthresh=0.1)
    axes[1].set(ylabel="accuracy on purified clean images,\nstudent minus 100-step SDE (points)")
    axes[1].axhline(ACCURACY_MARGIN, color="0.6", linestyle=":", linewidth=1)
    axes[1].set_title("dotted: margin of the claim")
    for panel in axes:
        panel.axhline(0, color="0.4", linestyle="--", linewidth=1)
        panel.set_xticks(range(3), ["1", "2", "4"])
        panel.set(xlabel="steps")
    axes[0].legend(fontsize=7)
    sns.despine(figure)
    return figure


def diff_draws(records: Sequence[dict]) -> Figure:
    """Draw how the outputs differ between draws of the noise, and how far they are from the SDE's as a whole."""
    figure, axes = new_figure(1, 3, width=2.4, height=2.7, sharey=True)
    names = sorted(set(records[0]["metrics"]["spread"]) - {"sde-100", SDE_AGAIN}, key=sampler_order)[::-1]
    panels = {
        "diversity": (1e3, "variance between draws\n(10⁻³ squared pixel units)"),
        "posterior": (100.0, "classifier's mean probabilities: total\nvariation to the SDE's (%)"),
        "frechet_sde": (1.0, "Fréchet distance of the\nfeatures to the SDE's"),
    }
    for panel, (measure, (scale, label)) in zip(axes, panels.items()):
        for row, name in enumerate(names):
            centre, half = mean_and_half_width([[r["metrics"]["spread"][name][measure]] for r in records], scale)
            marker, colour = SAMPLER_LOOKS[PurifierSpec.parse(name).kind]
            panel.errorbar(centre, [row], xerr=half, marker=marker, markersize=5, capsize=3, color=colour)
        reference = "sde-100" if measure == "diversity" else SDE_AGAIN
        level, _ = mean_and_half_width([[r["metrics"]["spread"][reference][measure]] for r in records], scale)
        panel.axvline(level[0], color="0.3", linestyle=":", linewidth=1)
        panel.set(xlabel=label)
    axes[0].set_yticks(range(len(names)), [sampler_label(name) for name in names])
    axes[0].set_title(seeds_note(records))
    axes[1].set_title("dotted: the SDE itself, other noise")
    sns.despine(figure)
    return figure


def diff_progressive(records: Sequence[dict]) -> Figure:
    """Draw the errors of progressive distillation student by student, and the cost of training both families."""
    figure, axes = new_figure(1, 2, width=3.5, height=2.8)
    counts = sorted((int(n) for n in records[0]["metrics"]["progressive"]), reverse=True)
    places = np.arange(len(counts))
    series = {
        "student to its own teacher": [
            [r["metrics"]["progressive"][str(n)]["to_teacher"] for n in counts] for r in records
        ],
        "student to the 100-step ODE": [
            [r["metrics"]["sweep"][f"pd-{n}"]["distance"] for n in counts] for r in records
        ],
        "undistilled DDIM to the ODE": [
            [r["metrics"]["sweep"][f"ddim-{n}"]["distance"] for n in counts] for r in records
        ],
    }
    for (name, values), tint in zip(series.items(), ("#882255", SAMPLER_COLOURS["pd"], SAMPLER_COLOURS["ddim"])):
        centre, half = mean_and_half_width(values, 1e3)
        axes[0].errorbar(places, centre, half, marker="o", capsize=3, color=tint, label=name)
    axes[0].set_xticks(places, counts)
    axes[0].set_yscale("log")
    axes[0].set(xlabel="steps of the student", ylabel="distance (10⁻³ squared pixel units)")
    axes[0].set_title(seeds_note(records))
    axes[0].legend(fontsize=7)
    for i, record in enumerate(records):
        for kind in ("pd", "cd"):
            curve = np.array(record["arrays"]["cost"][kind], dtype=float)
            one = curve[curve[:, 2] == 1]
            axes[1].plot(one[:, 0] / 1e6, 1e3 * one[:, 1], color=SAMPLER_COLOURS[kind], alpha=0.8, linewidth=1)
            axes[1].plot(
                one[-1:, 0] / 1e6,
                1e3 * one[-1:, 1],
                "o",
                color=SAMPLER_COLOURS[kind],
                label=None if i else SAMPLER_NAMES[kind],
            )
    axes[1].set_yscale("log")
    axes[1].set(xlabel="forward passes spent on training (10⁶ images)", title="one step, validation images, each seed")
    axes[1].set_ylabel("distance to the ODE\n(10⁻³ squared pixel units)")
    axes[1].legend(fontsize=7)
    sns.despine(figure)
    return figure


def diff_pictures(records: Sequence[dict]) -> Figure:
    """Draw images, the same with the noise of t*, and the images of each sampler."""
    pictures = records[0]["arrays"]["pictures"]
    columns = sorted(pictures, key=sampler_order)
    figure, axes = new_figure(len(pictures[columns[0]]), len(columns), width=0.55, height=0.62, squeeze=False)
    for column, name in enumerate(columns):
        for row, pixels in enumerate(pictures[name]):
            draw_image(axes[row, column], (np.asarray(pixels) / 255).tolist())
        title = sampler_label(name).replace(", ", "\n") if name not in IMAGES else name
        axes[0, column].set_title(title, fontsize=6)
    return figure


def diff_samples(records: Sequence[dict]) -> Figure:
    """Draw images from pure noise, the same noise in every row, in fewer and fewer undistilled DDIM steps."""
    samples = records[0]["arrays"]["samples"]
    figure, axes = new_figure(len(samples), len(next(iter(samples.values()))), width=0.45, height=0.5, squeeze=False)
    for row, n in zip(axes, sorted(samples, key=int, reverse=True)):
        for panel, pixels in zip(row, samples[n]):
            draw_image(panel, (np.asarray(pixels) / 255).tolist())
        row[0].set_title(f"{n} step{'s' if n != '1' else ''}", fontsize=6, loc="left", pad=1)
    return figure


def diffusion_captions(records: Sequence[dict]) -> dict[str, str]:
    """Return what each figure shows, computed from the records that it draws."""
    first, arrays, seed = records[0]["metrics"], records[0]["arrays"], records[0]["seed"]
    images, bars, dotted = evidence_over_seeds(records), bars_over_seeds(records, dots=False), bars_over_seeds(records)
    ode, sde = (PurifierSpec.parse(REFERENCES[i]).steps for i in (2, 0))
    return {
        "diff_steps": "Samplers from the noisy image at t*, against their number of steps: squared distance to the "
        f"{ode}-step ODE of the teacher (10⁻³ squared pixel units), a classifier's accuracy minus that on the images "
        "themselves (points, paired within each seed), and Fréchet distance of the classifier's features to those of "
        f"training images; dotted: the images themselves. {images}; {bars}; values of one number of steps stand side "
        "by side.",
        "diff_gain": "Students minus references, paired within each seed, by number of steps. Left: squared distance "
        f"to the {ode}-step ODE (10⁻³ squared pixel units; symmetric logarithmic axis), DDIM of as many steps minus "
        "student: above 0 the student is nearer. Right: classifier's accuracy on purified clean images, student "
        f"minus {sde}-step SDE, in points; dotted: {ACCURACY_MARGIN} points. {images}; {dotted}.",
        "diff_draws": f"Samplers from t* over {first['draws']} draws of all noise: variance between draws (10⁻³ "
        "squared pixel units), total variation between the classifier's mean probabilities and those of the "
        f"{sde}-step SDE (%), and Fréchet distance of the classifier's features to the SDE's; dotted: the SDE itself "
        f"with other noise. {images}; {bars}.",
        "diff_progressive": "Left: squared distance (10⁻³ squared pixel units) of each student of progressive "
        f"distillation to its own teacher and to the {ode}-step ODE, and of undistilled DDIM in as many steps to that "
        f"ODE. {images}; {bars}. Right: distance to the ODE of one-step students on validation images during "
        f"training, against the forward passes spent (10⁶ images), one line for each of {count_seeds(records)}, no "
        "intervals.",
        "diff_pictures": f"{len(arrays['pictures']['image'])} test images, the same with the noise of t*, and what "
        f"each sampler makes of the noisy ones (seed {seed}, of {evidence_over_seeds(records[:1])}). Examples, no "
        "intervals.",
        "diff_samples": "Images from pure noise by undistilled DDIM in fewer and fewer steps, "
        f"{len(arrays['samples']['1'])} draws of the noise, the same in every row (seed {seed} of "
        f"{count_seeds(records)}; no test images). Examples, no intervals.",
    }


FIGURES = {
    "diff_steps": diff_steps,
    "diff_gain": diff_gain,
    "diff_draws": diff_draws,
    "diff_progressive": diff_progressive,
    "diff_pictures": diff_pictures,
    "diff_samples": diff_samples,
}
