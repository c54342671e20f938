"""Figures of experiment 2, defensive distillation: each takes the records of one or more seeds."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lib.report.figures import (
    COLOURS,
    bars_over_seeds,
    draw_bars,
    draw_image,
    evidence_over_seeds,
    new_figure,
    seeds_note,
)
from lib.report.figures.sanity_checks import check_matrix, checks_caption
from lib.utils.record_keys import temperature_key, temperature_of

DEFENSIVE_NAMES = {
    "fgsm": "FGSM",
    "pgd-ce": "PGD, cross-entropy",
    "jsma-f": "JSMA-F (softmax)",
    "jsma-z": "JSMA-Z (logits)",
    "cw": "C&W L2",
    "fgsm/T": "FGSM, logits / T",
    "pgd-ce/T": "PGD, logits / T",
    "pgd-margin": "PGD, margin",
    "apgd-dlr": "APGD-DLR",
    "apgd-t": "APGD-T",
    "square": "Square",
    "transfer": "transfer, undistilled",
    "proxy": "transfer, black-box proxy",
}

ORIGINAL = ("fgsm", "pgd-ce", "jsma-f", "jsma-z")  # attacks of the time
WORST_WORDS, STRONGER_WORDS, CLEAN_WORDS = "worst case over all attacks", "after a stronger attack", "no attack"
DEFENSIVE_COLOURS = {
    DEFENSIVE_NAMES["fgsm"]: COLOURS[1],
    DEFENSIVE_NAMES["pgd-ce"]: COLOURS[2],
    DEFENSIVE_NAMES["jsma-f"]: COLOURS[9],
    DEFENSIVE_NAMES["jsma-z"]: "#882255",
    DEFENSIVE_NAMES["cw"]: COLOURS[4],
    DEFENSIVE_NAMES["fgsm/T"]: COLOURS[3],
    DEFENSIVE_NAMES["pgd-ce/T"]: "#005c43",
    DEFENSIVE_NAMES["pgd-margin"]: "#b8a800",
    DEFENSIVE_NAMES["apgd-dlr"]: COLOURS[5],
    DEFENSIVE_NAMES["apgd-t"]: "#6b3d00",
    DEFENSIVE_NAMES["square"]: "0.6",
    DEFENSIVE_NAMES["transfer"]: COLOURS[6],
    DEFENSIVE_NAMES["proxy"]: "#8fd6c0",
    CLEAN_WORDS: "0.2",
    WORST_WORDS: COLOURS[0],
    STRONGER_WORDS: COLOURS[3],
    "float32": COLOURS[0],
    "float64": COLOURS[1],
}


def network_names(record: dict) -> list[str]:
    """Return the keys of the distilled networks, by rising temperature."""
    return [temperature_key(t) for t in sorted(record["arrays"]["temperatures"])]


def model_values(records: Sequence[dict], get: Callable[[dict], float | None]) -> np.ndarray:
    """Return (seed × temperature) numbers; `get` takes the scalars of one network, None becomes NaN."""
    rows = [[get(r["metrics"]["models"][name]) for name in network_names(r)] for r in records]
    return np.array(rows, dtype=float)


def draw_against_temperature(axes: Axes, record: dict, **options) -> None:
    """Label the horizontal axis of a panel whose places are the temperatures, on a logarithmic scale."""
    ticks = sorted(record["arrays"]["temperatures"])
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.minorticks_off()
    axes.set(xlabel="distillation temperature T", **options)


def draw_lines(axes: Axes, records: Sequence[dict], curves: dict[str, np.ndarray], **options) -> None:
    """Draw one curve per name against temperature, each moved a little sideways so that equal ones are visible."""
    ticks = np.array(sorted(records[0]["arrays"]["temperatures"]))
    for i, (name, curve) in enumerate(curves.items()):
        shift = 1.03 ** (i - (len(curves) - 1) / 2)
        known = ~np.isnan(curve).any(0)
        look = {"label": name, "color": DEFENSIVE_COLOURS[name]} | options
        draw_bars(axes, (ticks[known] * shift).tolist(), curve[:, known].tolist(), **look)


def defensive_table(results: dict[str, dict], ball: str) -> pd.DataFrame:
    """Return the accuracy (%) of each network (columns) under each attack (rows), and the worst case."""
    columns = {name: {"clean": scalars["clean"]} | scalars[ball] for name, scalars in results.items()}
    frame = 100 * pd.DataFrame(columns).drop("eps")
    return frame.rename(index=DEFENSIVE_NAMES | {"worst": "all attacks (worst case)"})


def dd_original_attacks(records: Sequence[dict]) -> Figure:
    """Draw the success of the attacks of the time against T, as the authors of the defence measured it."""
    figure, axes = new_figure(width=5.2, height=2.8)
    first = records[0]["metrics"]["models"][network_names(records[0])[0]]
    names = [n for n in ORIGINAL if n in first["success"]]
    curves = {DEFENSIVE_NAMES[n]: model_values(records, lambda m, n=n: m["success"][n]) for n in names}
    draw_lines(axes, records, curves)
    eps = first["large"]["eps"]
    title = f"FGSM, PGD: Linf, ε = {eps:g}; {seeds_note(records)}"
    draw_against_temperature(axes, records[0], ylabel="success (% of correct images)", title=title, ylim=(-4, 104))
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    sns.despine(figure)
    return figure


def dd_unmasked(records: Sequence[dict]) -> Figure:
    """Draw accuracy under attacks that need no gradient of the cross-entropy, and C&W's success and distance."""
    figure, axes = new_figure(1, 3, width=2.4, height=3.0)
    names = ["pgd-margin", "pgd-ce/T", "apgd-dlr", "apgd-t", "square", "transfer", "proxy"]
    curves = {DEFENSIVE_NAMES[n]: model_values(records, lambda m, n=n: m["small"][n]) for n in names}
    curves[CLEAN_WORDS] = model_values(records, lambda m: m["clean"])
    draw_lines(axes[0], records, curves, capsize=2, markersize=3, linewidth=1)
    eps = records[0]["metrics"]["models"][network_names(records[0])[0]]["small"]["eps"]
    title = f"Linf, ε = {eps:g}"
    draw_against_temperature(axes[0], records[0], ylabel="accuracy under attack (%)", title=title, ylim=(-4, 104))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    cw = DEFENSIVE_NAMES["cw"]
    draw_lines(axes[1], records, {cw: model_values(records, lambda m: m["success"]["cw"])})
    title = seeds_note(records)
    draw_against_temperature(axes[1], records[0], ylabel="C&W L2 success (%)", title=title, ylim=(-4, 104))
    length = model_values(records, lambda m: m["l2"])
    draw_lines(axes[2], records, {cw: length / length[:, :1]}, limits=(0, np.inf))
    axes[2].axhline(100, color="0.4", linestyle="--", linewidth=1)
    draw_against_temperature(axes[2], records[0], ylabel="C&W mean L2 (% of lowest T)", title="distance of C&W")
    axes[2].set_ylim(bottom=0)
    sns.despine(figure)
    return figure


def dd_worst(records: Sequence[dict]) -> Figure:
    """Draw the worst case over all attacks and FGSM alone against T, at both radii; a stronger attack at both ends."""
    figure, axes = new_figure(1, 2, width=3.4, height=2.6, sharey=True)
    ends = (network_names(records[0])[0], network_names(records[0])[-1])
    for panel, ball in zip(axes, ("small", "large")):
        curves = {
            CLEAN_WORDS: model_values(records, lambda m: m["clean"]),
            DEFENSIVE_NAMES["fgsm"]: model_values(records, lambda m, b=ball: m[b]["fgsm"]),
            WORST_WORDS: model_values(records, lambda m, b=ball: m[b]["worst"]),
        }
        draw_lines(panel, records, curves)
        if all("strong" in r["metrics"] for r in records):
            left = [[r["metrics"]["strong"][name][ball]["accuracy"] for name in ends] for r in records]
            places = [temperature_of(name) for name in ends]
            look: dict[str, Any] = {"marker": "D", "markerfacecolor": "white", "linestyle": "none"}
            draw_bars(panel, places, left, label=STRONGER_WORDS, color=DEFENSIVE_COLOURS[STRONGER_WORDS], **look)
        eps = records[0]["metrics"]["models"][network_names(records[0])[0]][ball]["eps"]
        draw_against_temperature(panel, records[0], title=f"Linf, ε = {eps:g}", ylim=(-4, 104))
    axes[0].set_ylabel("accuracy under attack (%)")
    axes[1].set_xlabel(f"distillation temperature T\n{seeds_note(records)}")
    axes[1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
    sns.despine(figure)
    return figure


def dd_why(records: Sequence[dict]) -> Figure:
    """Draw logit size, share of zero gradients and gradient size in float32 and float64 against T."""
    figure, axes = new_figure(1, 3, width=2.4, height=2.4)
    ticks = np.array(sorted(records[0]["arrays"]["temperatures"]))
    for name, label, colour in (
        ("logit_mean", "mean |logit|", COLOURS[2]),
        ("margin_median", "median margin", COLOURS[4]),
    ):
        curve = model_values(records, lambda m, n=name: m["why"][n])
        axes[0].plot(ticks, curve.mean(0), "o-", color=colour, markersize=4, label=label)
        axes[0].plot(ticks, curve.T, ".", color=colour, alpha=0.25, markersize=4)
    axes[0].axhline(104, color="0.4", linestyle="--", linewidth=1, label="float32 limit\nof the gradient")
    axes[0].set_yscale("log")
    axes[0].set_ylim(1, 2000)
    draw_against_temperature(axes[0], records[0], ylabel="logits at T = 1", title="mean and each seed")
    axes[0].legend(fontsize=6)
    curves = {d: model_values(records, lambda m, d=d: m["why"][f"zero_{d}"]) for d in ("float32", "float64")}
    draw_lines(axes[1], records, curves)
    title = seeds_note(records)
    draw_against_temperature(
        axes[1], records[0], ylabel="images with gradient exactly 0 (%)", title=title, ylim=(-4, 104)
    )
    axes[1].legend()
    for dtype, marker in (("float32", "o"), ("float64", "s")):
        colour = DEFENSIVE_COLOURS[dtype]
        curve = model_values(records, lambda m, d=dtype: m["why"][f"norm_{d}"])
        power = np.log10(np.where(curve > 0, curve, np.nan))
        known = ~np.isnan(power).any(0)
        axes[2].plot(ticks[known], power[:, known].mean(0), marker + "-", color=colour, label=dtype)
        axes[2].plot(ticks, power.T, ".", color=colour, alpha=0.25, markersize=4)
        for t in ticks[~known]:
            axes[2].plot(t, -330, marker, color=colour, markerfacecolor="none", clip_on=False)
    axes[2].set_ylim(-330, 10)
    title = "median over images;\nhollow at the bottom: exactly 0"
    draw_against_temperature(axes[2], records[0], ylabel="log10 of largest gradient entry", title=title)
    axes[2].legend()
    sns.despine(figure)
    return figure


def dd_puzzle(records: Sequence[dict]) -> Figure:
    """Draw FGSM and PGD on the cross-entropy with the logits as they are and divided by T, at the large radius."""
    figure, axes = new_figure(width=4.8, height=3.0)
    names = ("fgsm", "fgsm/T", "pgd-ce", "pgd-ce/T")
    curves = {DEFENSIVE_NAMES[n]: model_values(records, lambda m, n=n: m["large"][n]) for n in names}
    draw_lines(axes, records, curves)
    eps = records[0]["metrics"]["models"][network_names(records[0])[0]]["large"]["eps"]
    title = f"Linf, ε = {eps:g}; {seeds_note(records)}"
    draw_against_temperature(axes, records[0], ylabel="accuracy under attack (%)", title=title, ylim=(-4, 104))
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    sns.despine(figure)
    return figure


def dd_sanity_checks(records: Sequence[dict]) -> Figure:
    """Draw the checks side by side for the lowest and highest T."""
    names = list(records[0]["arrays"]["diagnosis"])
    tables = [r["arrays"]["diagnosis"] for r in records]
    return check_matrix(
        {f"T = {temperature_of(name):g}": [pd.DataFrame(table[name]) for table in tables] for name in names}
    )


def dd_pictures(record: dict) -> Figure:
    """Draw one test image clean, after FGSM and after C&W, for the lowest and the highest T."""
    images, classes = record["arrays"]["pictures"], record["arrays"]["classes"]
    names = list(dict.fromkeys(image["model"] for image in images))
    figure, axes = new_figure(len(names), len(images) // len(names), width=1.8, height=1.9)
    for panel, image in zip(np.ravel(axes), images):
        draw_image(panel, image["pixels"])
        right = image["class"] == image["true"]
        distance = f", L2 {image['l2']:.2f}" if image["l2"] else ""
        T = temperature_of(image["model"])
        title = f"T = {T:g}, {image['attack']}{distance}\npredicted {classes[image['class']]}"
        panel.set_title(title, color="0.2" if right else COLOURS[3], fontsize=8)
    return figure


def defensive_captions(records: Sequence[dict]) -> dict[str, str]:
    """Return what each figure shows, computed from the records that it draws."""
    ticks, lowest = records[0]["arrays"]["temperatures"], network_names(records[0])[0]
    against = f"temperature of defensive distillation (T = {min(ticks):g} to {max(ticks):g})"
    first = records[0]["metrics"]["models"][lowest]
    small, large = (f"Linf, ε = {first[ball]['eps']:g} in pixel units" for ball in ("small", "large"))
    images, bars = evidence_over_seeds(records), f"{bars_over_seeds(records)}; bars are cut at 0 and 100 %"
    original = "; ".join(DEFENSIVE_NAMES[n] for n in ORIGINAL if n in first["success"])
    stronger = all("strong" in r["metrics"] for r in records)
    return {
        "dd_seen": f"Success of the attacks of the time ({original}), in % of the images that a network classifies "
        f"correctly, against the {against}. FGSM and PGD: {large}; JSMA: no limit of size. {images}; {bars}.",
        "dd_true": f"Attacks that masked gradients do not stop, against the {against}. Left: accuracy under each, "
        f"{small}. Middle: success of C&W (L2, no limit of size) in % of the correctly classified images. Right: mean "
        f"L2 distance of its images in % of that at T = {min(ticks):g} of the same seed. {images}; {bars}, distances "
        "at 0 alone.",
        "dd_worst": f"Accuracy against the {against}: without an attack, under FGSM, in the worst case per image over "
        f"all attacks{' and, open, after a stronger attack on both ends' if stronger else ''}. Left: {small}; right: "
        f"{large}. {images}; {bars}.",
        "dd_why": f"Why gradients vanish, against the {against}. Left: size of logits and margin, mean over seeds and "
        "each seed. Middle: images whose gradient of the cross-entropy is exactly 0 in every pixel (%), in float32 "
        f"and float64; {bars}. Right: largest entry of the gradient, median over images, mean of its logarithm over "
        f"seeds and each seed; hollow at the bottom: exactly 0 in some seed. {images}.",
        "dd_puzzle": "Accuracy under FGSM and under PGD on the cross-entropy, of the logits as they are and divided "
        f"by T, against the {against}; {large}. {images}; {bars}.",
        "dd_diagnosis": checks_caption(f"networks of the lowest and the highest {against}, {small}", records),
        "dd_pictures": f"One test image, clean, after FGSM ({large}) and after C&W (L2, no limit of size), for the "
        f"lowest and the highest {against}: predicted class, vermilion where it is wrong, and L2 distance (pixel "
        f"units). Of {evidence_over_seeds(records[:1])} (seed {records[0]['seed']}); no intervals.",
    }


FIGURES = {
    "dd_seen": dd_original_attacks,
    "dd_true": dd_unmasked,
    "dd_worst": dd_worst,
    "dd_why": dd_why,
    "dd_puzzle": dd_puzzle,
    "dd_diagnosis": dd_sanity_checks,
    "dd_pictures": lambda records: dd_pictures(records[0]),
}
