"""What `notebooks/00_quickstart.ipynb` shows: a few images under a short attack, as pictures, a table and sliders."""

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ipywidgets
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from lib.attacks.eot_pgd import annealed_pgd
from lib.commands.arguments import Effort
from lib.commands.evaluate import evaluate_defence
from lib.commands.measures import percent_interval
from lib.data import Split
from lib.evaluation.attack_plan import EvaluationSettings
from lib.evaluation.matched_attacks import AttackEffort, MeasuringDraws
from lib.evaluation.outcomes import passes_per_batch
from lib.experiments.diffpure import NO_PURIFIER, build_defence
from lib.pretrained import pretrained_folder
from lib.purified_classifier import PurifiedClassifier
from lib.report import statistics
from lib.report.answers import answer_values
from lib.report.claim_tables import format_estimate
from lib.report.claims import load_results
from lib.report.figures import COLOURS, draw_image, new_figure
from lib.utils.draws import MATCHED, N_DRAWS
from lib.utils.random_state import seeded_noise

NETWORKS, PROFILE = "digits/diffusion", "digits"  # of the purifiers, and of the claims that decide
CHOICES = {  # of the sliders: in words → name of a purifier
    "adaptive-1: student + constraint": "adaptive-1",
    "clean-1: student of clean pairs": "clean-1",
    "label-1: constraint + labels": "label-1",
    "label-n0-1: constraint + labels, no noise": "label-n0-1",
    "ddim-1: undistilled": "ddim-1",
    "none": NO_PURIFIER,
}
COLUMNS = {  # of the quick table, and the measure of `lib.commands.measures` in each
    "no attack": "clean",
    "control: ten of ten, no attack": "control",
    "under attack": "robust",
    "ten of ten, under attack": "worst_of_10",
    "attack-induced loss": "attack_induced_loss",
}
HINT = "Move a slider: the attack runs anew."
CONTROL: dict[str, Any] = {"style": {"description_width": "9em"}, "layout": {"width": "30em"}}
SLIDER: dict[str, Any] = CONTROL | {"continuous_update": False}  # a slider that acts when it is released


class DefenceView(NamedTuple):
    """One image and what is made of it: pixels (c h w), probabilities (k,) and, one row per draw, (draws, k)."""

    title: str
    image: Float[np.ndarray, "c h w"]
    delta: Float[np.ndarray, "c h w"]
    purified: Float[np.ndarray, "c h w"]
    alone: Float[np.ndarray, " k"]
    draws: Float[np.ndarray, "draws k"]


def attack_through(
    defence: PurifiedClassifier, x: Tensor, y: Tensor, eps: float, steps: int, eot: int, seed: int = 0
) -> Tensor:
    """Attack a whole defence by exact gradients, each averaged over `eot` draws of its noise, from the seed."""
    eot = eot if defence.random else 1
    with seeded_noise(defence, seed, x.device):
        at_once = passes_per_batch(defence, x, eot, graph=True)
        return annealed_pgd(defence, x, y, eps, seed=seed, steps=steps, draws=eot, at_once=at_once)


def view_image(
    title: str, defence: PurifiedClassifier, x: Tensor, x_adv: Tensor, draws: int = N_DRAWS, seed: int = 0
) -> DefenceView:
    """Return what a defence makes of one image (1 c h w) in several draws, the same noise for every image."""
    with seeded_noise(defence, seed, x.device):
        purified = defence.purifier(x_adv.repeat(draws, 1, 1, 1))
    alone, behind = (defence.classifier(images).softmax(-1) for images in (x_adv, purified))
    image, delta, shown, own, answers = (
        t.detach().cpu().numpy() for t in (x_adv[0], (x_adv - x)[0], purified[0], alone[0], behind)
    )
    return DefenceView(title, image, delta, shown, own, answers)


def draw_probabilities(axes: Axes, probabilities: Float[np.ndarray, "draws k"], label: int) -> None:
    """Draw the mean probability of each class as a bar, the label's in blue, and each draw as a dot."""
    classes = np.arange(probabilities.shape[1])
    colours = [COLOURS[0] if k == label else "0.75" for k in classes]
    axes.bar(classes, probabilities.mean(0), color=colours, width=0.8)
    if len(probabilities) > 1:
        axes.plot(classes, probabilities.T, ".", color="0.15", markersize=2.5, clip_on=False)
    axes.set(xticks=classes, yticks=(0, 0.5, 1), ylim=(0, 1.02))
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def draw_views(views: Sequence[DefenceView], label: int, eps: float) -> Figure:
    """Draw one row for each view: attacked image, perturbation, purified image, probabilities without and with it."""
    widths = {"width_ratios": (1, 1, 1, 1.4, 1.4)}
    figure, axes = new_figure(len(views), 5, width=1.44, height=1.25, squeeze=False, gridspec_kw=widths)
    titles = ("x + δ", "δ", "g(x + δ)", "f alone", f"f behind g, {len(views[0].draws)} draws")
    for panel, title in zip(axes[0], titles, strict=True):
        panel.set_title(title)
    for row, view in zip(axes, views, strict=True):
        draw_image(row[0], view.image)
        place = {"va": "center", "ha": "center", "transform": row[0].transAxes}
        row[0].text(-0.25, 0.5, view.title, rotation=90, **place)
        shown = row[1].imshow(view.delta.mean(0), cmap="PuOr", vmin=-eps, vmax=eps)
        row[1].set_axis_off()
        draw_image(row[2], view.purified)
        draw_probabilities(row[3], view.alone[None], label)
        draw_probabilities(row[4], view.draws, label)
    for panel in axes[-1, 3:]:
        panel.set_xlabel(f"class (label: {label})")
    scale = axes[-1, 1].inset_axes((0.05, -0.16, 0.9, 0.07))
    figure.colorbar(shown, cax=scale, orientation="horizontal", ticks=(-eps, 0, eps))
    return figure


def quick_effort(steps: int, eot: int, draws: int) -> Effort:
    """Return the efforts of a quick look: `steps` x `eot` gradients for each attack, `draws` that measure."""
    return Effort(AttackEffort(steps, eot, 50, steps, eot), MeasuringDraws(2, 2, 4, draws), draws, steps, 50, 3)


def quick_look(
    defences: Mapping[str, PurifiedClassifier],
    points: Split,
    numbers: list[int],
    eps: float,
    effort: Effort,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Return what `lib.commands.evaluate` finds of each defence, by name, all under the matched set of attacks."""
    results = {}
    for name, defence in defences.items():
        at = EvaluationSettings(eps=eps, seed=seed, draws=effort.each if defence.random else 1)
        results[name] = evaluate_defence(defence, None, points, numbers, at, effort, autoattack=False)[0]
    return results


def quick_table(results: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """Return every measure in % (losses: points) with its 95 % interval over images; blank where draws are alike."""
    rows = {}
    for name, result in results.items():
        rows[name] = {column: percent_interval(result["measures"][key]) for column, key in COLUMNS.items()}
        if not result["random"]:
            rows[name] |= {column: "" for column in COLUMNS if "ten" in column}
    return pd.DataFrame(rows).T


def loss_difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[float, float, float]:
    """Return by how many points one defence loses more to the attack than another, with its paired interval."""
    losses = [100 * answer_values(result["outcomes"]["correct"], MATCHED, "loss") for result in (one, other)]
    difference = losses[0] - losses[1]
    estimate = statistics.estimate_images([difference], [np.asarray(one["outcomes"]["images"])], resamples=0)
    return float(difference.mean()), *statistics.interval(estimate)


def compare_losses(name: str, other: str, results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return which of two defences loses more to the attack, or that so few images do not tell."""
    value, low, high = loss_difference(results[name], results[other])
    words = "more" if low > 0 else "less" if high < 0 else None
    shown = f"{value:+.1f} points [{low:.1f}, {high:.1f}]"
    if words is None:
        return f"{name} against {other}: {shown}. {results[name]['n']} images do not tell which loses more."
    return f"{name} loses {words} to the attack than {other}: {shown}."


def quick_conclusions(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return in sentences what the attack takes, what noise alone takes, and what an attack on a part overlooks."""
    lines = []
    for name, result in results.items():
        value = {key: 100 * result["measures"][key]["value"] for key in COLUMNS.values()}
        text = f"{name}: right on {value['clean']:.1f} % without an attack, on {value['robust']:.1f} % under it; the "
        lines.append(text + f"attack takes {percent_interval(result['measures']['attack_induced_loss'])} points.")
        if result["random"]:
            text = f"{name}: ten draws are all right for {value['control']:.1f} % of images without an attack, for "
            text += f"{value['worst_of_10']:.1f} % under it; noise alone takes {value['clean'] - value['control']:.1f} "
            lines.append(f"{text}points, the attack {value['control'] - value['worst_of_10']:.1f} more.")
            grey = 100 * result["attacks"]["grey"]["accuracy"]
            text = f"{name}: images made against the classifier alone leave {grey:.1f} %, the worst of all attacks "
            more = grey - value["robust"]
            verdict = (
                f"the first alone overstates it by {more:.1f} points" if more > 0 else "the first overstates nothing"
            )
            lines.append(f"{text}{value['robust']:.1f} %: {verdict} here.")
    first, *others = results
    return lines + [compare_losses(name, other, results) for name, other in zip(others, [first, *others])]


def committed_claims(ids: Sequence[str]) -> list[str]:
    """Return what the committed run says of claims, each with verdict, statement and interval over seeds and images."""
    rows = {row["id"]: row for row in load_results(PROFILE)}
    return [
        f"{name} ({rows[name]['verdict']}): {rows[name]['statement']}: {format_estimate(rows[name])}" for name in ids
    ]


def live_panel(
    controls: Sequence[ipywidgets.DOMWidget], draw: Callable[[], tuple[Figure, str]], hint: str = ""
) -> ipywidgets.VBox:
    """Return controls over a line of text and a picture, which every change of a control draws anew.

    Args:
        controls: widgets with a value.
        draw: the figure and the line for the controls' values.
        hint: the line before the first change, with an empty picture; "": draw at once.

    Returns:
        The controls, the line and the picture.
    """
    text, picture = ipywidgets.Label(hint), ipywidgets.Image(format="png", layout={"max_width": "58em"})

    def show(_: Any = None) -> None:
        figure, text.value = draw()
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
        plt.close(figure)
        picture.value = buffer.getvalue()

    for control in controls:
        control.observe(show, "value")
    if not hint:
        show()
    return ipywidgets.VBox([*controls, text, picture])


def explore(
    classifier: nn.Module,
    points: Split,
    eps: float = 0.1,
    steps: int = 16,
    seed: int = 0,
    image: int = 0,
    networks: Path | None = None,
    choices: Mapping[str, str] = CHOICES,
) -> ipywidgets.VBox:
    """Return sliders for the radius, draws per gradient, purifier and image; each change attacks that image anew.

    Args:
        classifier: behind the purifier, on the CPU.
        points: images and labels to choose from.
        eps: radius to begin with, in pixel units.
        steps: gradient steps of the attack.
        seed: of the noise.
        image: number of the first image.
        networks: folder of the purifiers; None: those that come with the repository.
        choices: the purifiers: in words → name.

    Returns:
        The sliders and an empty picture, which the first change fills.
    """
    folder = networks or pretrained_folder(NETWORKS)
    radius = ipywidgets.FloatSlider(eps, min=0.01, max=0.3, step=0.01, description="ε (pixel units)", **SLIDER)
    eot = ipywidgets.IntSlider(4, min=1, max=16, description="draws per gradient", **SLIDER)
    number = ipywidgets.IntSlider(image, min=0, max=len(points.y) - 1, description="image", **SLIDER)
    chosen = ipywidgets.Dropdown(options=choices, description="purifier", **CONTROL)

    def draw() -> tuple[Figure, str]:
        defence = build_defence(folder, str(chosen.value), classifier).to(points.x.device)
        x, y = points.x[number.value][None], points.y[number.value][None]
        x_adv = attack_through(defence, x, y, radius.value, steps, eot.value, seed)
        views = [view_image(title, defence, x, images) for title, images in (("no attack", x), ("attacked", x_adv))]
        right = [int((view.draws.argmax(1) == int(y)).sum()) for view in views]
        line = f"right answers of {N_DRAWS}: {right[0]} without, {right[1]} under attack"
        return draw_views(views, int(y), radius.value), line

    return live_panel([radius, eot, number, chosen], draw, HINT)
