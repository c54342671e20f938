"""Figures of pieces of GPU minutes: those of experiment 5, of classifiers, and of the teacher's training."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lib.report.figures import new_figure
from lib.report.figures.diffpure import dp_attacks, dp_differences, dp_headline, outcome_captions
from lib.report.figures.diffpure_defences import defence_label, estimate_paired, evidence_note, point_with_bar
from lib.report.figures.diffpure_protocols import dp_inflation
from lib.report.figures.robust_distillation import METHOD_NAMES, method_style
from lib.report.piece_files import Entry, Pieces, autoattack_record
from lib.report.statistics import Estimate, estimate_images, interval, scale_estimate

WORST_CASE = "worst"  # the condition of the worst case per image over AutoAttack's attacks
MATCHED_FIGURES = {
    "dp_headline": dp_headline,
    "dp_differences": dp_differences,
    "dp_attacks": dp_attacks,
    "dp_inflation": dp_inflation,
}
Drawn = tuple[str, Figure, str]  # name, figure, caption


def clip_interval(estimate: Estimate, limits: tuple[float, float]) -> tuple[float, float]:
    """Return the ends of an estimate's 95 % interval, cut where no value lies."""
    low, high = np.clip(interval(estimate), *limits)
    return float(low), float(high)


def share_estimate(share: float, n: int) -> Estimate:
    """Return the estimate, in %, of a share in [0, 1] of so many images of which nothing else is known."""
    right = np.arange(n) < round(share * n)
    return scale_estimate(estimate_images([right], resamples=0), 100)


def clean_estimate(card: Entry) -> Estimate:
    """Return a classifier's accuracy on all test images, in %."""
    return share_estimate(card["metrics"]["clean"], card["metrics"]["n"])


def purified_by(card: Entry) -> str:
    """Return the purifier on whose images a classifier was fine-tuned, an empty string for none."""
    return card["recipe"].get("images purified by", "")


def classifier_label(card: Entry) -> str:
    """Return a classifier in words: "TRADES, ResNet-18"."""
    method, purifier = card["recipe"]["method"], purified_by(card)
    words = f"{METHOD_NAMES.get(method, method)}, {card['network']['arch'].replace('resnet', 'ResNet-')}"
    return f"{words}, fine-tuned on images of {defence_label(purifier)}" if purifier else words


def classifier_style(pieces: Pieces, name: str) -> dict[str, Any]:
    """Return a classifier's marker and colour: its method's, or that of teachers for one that others learn from."""
    teachers = {card["recipe"].get("teacher") for card in pieces.classifiers.values()}
    return method_style("teacher" if name in teachers else pieces.classifiers[name]["recipe"]["method"])


def baseline_of(pieces: Pieces, name: str) -> str | None:
    """Return the attacked TRADES classifier of the same architecture, None where it is missing or `name` itself."""
    arch = pieces.classifiers[name]["network"]["arch"]
    for other, card in pieces.classifiers.items():
        same = card["recipe"]["method"] == "trades" and card["network"]["arch"] == arch
        if same and other != name and other in pieces.autoattack:
            return other
    return None


def draw_classifiers(pieces: Pieces) -> Figure:
    """Draw AutoAttack accuracy against clean accuracy of all attacked classifiers, and differences to TRADES."""
    record = autoattack_record(pieces)
    names = [name for name in pieces.classifiers if name in pieces.autoattack]
    figure, axes = new_figure(1, 2, width=3.5, height=2.9)
    for name in names:
        card, style = pieces.classifiers[name], classifier_style(pieces, name)
        x, y = clean_estimate(card), estimate_paired([record], name, "accuracy", WORST_CASE)
        ends = [np.abs(np.array([clip_interval(e, (0, 100))]).T - e.value) for e in (x, y)]
        look = style | {"capsize": 2, "markersize": 5, "elinewidth": 0.8, "linestyle": "none"}
        axes[0].errorbar([x.value], [y.value], ends[1], ends[0], **look)
    compared = [(name, base) for name in names if (base := baseline_of(pieces, name))]
    for row, (name, base) in enumerate(compared):
        difference = estimate_paired([record], name, "accuracy", WORST_CASE, base)
        point_with_bar(axes[1], difference, row, **classifier_style(pieces, name))
    axes[1].axvline(0, color="0.4", linestyle="--", linewidth=1)
    axes[1].set_yticks(range(len(compared)), [classifier_label(pieces.classifiers[name]) for name, _ in compared])
    axes[1].set_ylim(len(compared) - 0.4, -0.6)
    axes[1].set_xlabel("AutoAttack accuracy, minus TRADES\nof this architecture (points)")
    axes[0].set(xlabel="clean accuracy (%)", ylabel="accuracy under AutoAttack (%)")
    shown = [(classifier_label(pieces.classifiers[name]), classifier_style(pieces, name)) for name in names]
    handles = [Line2D([], [], linestyle="none", markersize=5, label=label, **style) for label, style in shown]
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    figure.suptitle(f"under AutoAttack: {evidence_note([record])}", fontsize=8)
    sns.despine(figure)
    return figure


def draw_training(card: Entry) -> Figure:
    """Draw the diffusion model's validation error against minutes of training."""
    curve = card["metrics"]["curve"]
    figure, axes = new_figure(width=3.4, height=2.4)
    axes.plot([row["minutes"] for row in curve], [1000 * row["error"] for row in curve], color="0.1", linewidth=1.2)
    axes.set(xlabel="minutes of training", ylabel="validation error (10⁻³ px²)", xlim=(0, None))
    axes.set_title(f"{len(curve)} epochs, one seed, no interval", fontsize=8)
    sns.despine(figure)
    return figure


def classifiers_caption(pieces: Pieces) -> str:
    """Return what the figure of classifiers shows."""
    record = autoattack_record(pieces)
    first = next(iter(pieces.autoattack.values()))
    recipe = first["recipe"]
    images = {card["metrics"]["n"] for name, card in pieces.classifiers.items() if name in pieces.autoattack}
    alone = {name: card for name, card in pieces.classifiers.items() if not purified_by(card)}
    others = [classifier_label(card) for name, card in alone.items() if name not in pieces.autoattack]
    left_out = f" Not attacked: {', '.join(others)}." if others else ""
    return (
        f"Left: accuracy under AutoAttack (Linf, ε = {recipe['eps']:g} in pixel units; worst case per image of "
        f"{', '.join(first['metrics']['attacks'])}; {recipe['steps']} steps, {recipe['targets']} targets, "
        f"Square with {recipe['queries']:,} queries) against accuracy without attack on "
        f"{', '.join(f'{n:,}' for n in sorted(images))} test images. Right: "
        "difference under AutoAttack to TRADES of the same architecture, paired image by image. "
        f"{evidence_note([record])}.{left_out}"
    )


def training_caption(card: Entry) -> str:
    """Return what the figure of the teacher's training shows."""
    curve, recipe = card["metrics"]["curve"], card["recipe"]
    return (
        "Validation error of the diffusion model, the mean squared error per pixel of denoising in one step over "
        f"five levels up to {recipe['t']}, against minutes of training ({card['device']}; {len(curve)} epochs). One "
        "seed, no interval."
    )


def piece_figures(pieces: Pieces, records: Mapping[str, dict[str, Any]]) -> Iterator[Drawn]:
    """Yield the figures of all finished pieces, each with its name and caption.

    `records`: of the matched set, from `lib.report.piece_files.matched_record`.
    """
    if any(name in pieces.classifiers for name in pieces.autoattack):
        yield "classifiers", draw_classifiers(pieces), classifiers_caption(pieces)
    teacher = pieces.networks.get("teacher")
    if teacher and len(teacher["metrics"]["curve"]) > 1:
        yield "diffusion_training", draw_training(teacher), training_caption(teacher)
    for part, record in records.items():
        captions = outcome_captions([record])
        for name, draw in MATCHED_FIGURES.items():
            yield f"{part.replace('/', '_')}_{name.removeprefix('dp_')}", draw([record]), captions[name]
