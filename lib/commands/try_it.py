"""What notebooks 01 to 05 show by hand alone: the verdicts of their abstracts, and sliders on what they have computed.

Each `explore_…` returns sliders over a picture that is drawn at once and whenever a slider moves.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ipywidgets
import numpy as np
import torch
from IPython.display import Markdown
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor, nn

from lib.attacks.api import attack
from lib.attacks.common import cross_entropy, loss_and_grad, margin
from lib.attacks.gate import NoGradientWarning
from lib.commands.quick_look import CONTROL, PROFILE, SLIDER, draw_probabilities, live_panel
from lib.data import Split
from lib.diffusion.network import load_network
from lib.diffusion.schedule import add_noise, t_to_sigma, to_pixel_range
from lib.distillation.few_step import load_config, solver_sampler
from lib.purify import load_purifier
from lib.report.claim_tables import format_estimate
from lib.report.claims import count_verdicts, load_results
from lib.report.figures import draw_image, new_figure
from lib.utils.device import default_device
from lib.utils.random_state import randn_like
from lib.utils.seeds import seeded_generator

Panels = Sequence[tuple[str, Any]]  # titles and images (c h w) or, per class, probabilities (k,)


def abstract_verdicts(*ids: str) -> Markdown:
    """Return what the committed run decided on claims: how many verdicts of each kind, then each with its interval.

    Raises KeyError for a claim that is not among them.
    """
    results = {row["id"]: row for row in load_results(PROFILE)}
    rows = [results[name] for name in ids]
    lines = [f"- **{row['verdict']}**: {row['statement']}: {format_estimate(row)}" for row in rows]
    head = f"**Verdict**, computed from the committed run on {PROFILE}: {count_verdicts(rows)}."
    return Markdown("\n".join([head, "", *lines]))


def draw_row(panels: Panels, label: int) -> Figure:
    """Draw images and distributions over classes side by side, the label's bar in blue."""
    wide = {"width_ratios": [1.0 if np.ndim(value) == 3 else 1.5 for _, value in panels]}
    figure, axes = new_figure(1, len(panels), width=1.4, height=1.5, squeeze=False, gridspec_kw=wide)
    for panel, (title, value) in zip(axes[0], panels, strict=True):
        if np.ndim(value) == 3:
            draw_image(panel, value)
        else:
            draw_probabilities(panel, np.asarray(value)[None], label)
            panel.set_xlabel(f"class (label: {label})")
        panel.set_title(title)
    return figure


def image_slider(points: Split, image: int = 0) -> ipywidgets.IntSlider:
    """Return a slider over the numbers of the images."""
    return ipywidgets.IntSlider(image, min=0, max=len(points.y) - 1, description="image", **SLIDER)


def radius_slider(eps: float) -> ipywidgets.FloatSlider:
    """Return a slider for the radius, in pixel units."""
    return ipywidgets.FloatSlider(eps, min=0.0, max=0.3, step=0.01, description="ε (pixel units)", **SLIDER)


def steps_slider(steps: int, most: int = 64) -> ipywidgets.IntSlider:
    """Return a slider for a number of steps."""
    return ipywidgets.IntSlider(steps, min=1, max=most, description="steps", **SLIDER)


def softened(z: Float[Tensor, "1 k"], T: float) -> Float[np.ndarray, " k"]:
    """Return softmax(z / T) of the logits of one image."""
    return (z / T).softmax(1)[0].detach().cpu().numpy()


def explore_temperature(
    teacher: nn.Module, student: nn.Module, points: Split, T: float = 4.0, image: int = 0
) -> ipywidgets.VBox:
    """Return sliders for temperature and image, over the soft labels of teacher and student.

    Args:
        teacher: maps images (n, c, h, w) to logits (n, k).
        student: likewise.
        points: images and labels to choose from.
        T: temperature to begin with, 1 to 100.
        image: number of the first image.
    """
    heat = ipywidgets.FloatLogSlider(T, min=0, max=2, step=0.05, description="T", **SLIDER)
    number = image_slider(points, image)

    def draw() -> tuple[Figure, str]:
        x, y = points.x[number.value][None], int(points.y[number.value])
        z_t, z_s = (network.to(x.device)(x) for network in (teacher, student))
        p, q = softened(z_t, heat.value), softened(z_s, heat.value)
        bits = float(-(p * np.log2(p.clip(1e-30))).sum())
        line = f"T = {heat.value:.3g}: the teacher's soft label has an entropy of {bits:.2f} bits, "
        line += f"{100 * (1 - p[y]):.2g} % of it on other classes than the label"
        return draw_row([("x", x[0].cpu()), ("teacher", p), ("student", q)], y), line

    return live_panel([heat, number], draw)


def explore_masking(
    models: Mapping[str, nn.Module], tau: Mapping[str, float], points: Split, eps: float, steps: int = 20
) -> ipywidgets.VBox:
    """Return a choice of network and sliders for radius, steps and image, over two attacks by PGD.

    One follows the cross-entropy of the network as it is used, the other that of its logits divided by T.

    Args:
        models: networks by name.
        tau: of each, T, by which the second attack divides the logits.
        points: images and labels to choose from.
        eps: radius to begin with, in pixel units.
        steps: to begin with.
    """
    chosen = ipywidgets.Dropdown(options=list(models), value=max(models, key=tau.__getitem__), **CONTROL)
    chosen.description = "network"
    radius, climb, number = radius_slider(eps), steps_slider(steps), image_slider(points)

    def draw() -> tuple[Figure, str]:
        name = str(chosen.value)
        model, x, y = models[name], points.x[number.value][None], points.y[number.value][None]
        largest = float(loss_and_grad(model, x, y, cross_entropy)[2].abs().max())
        budget = {"steps": climb.value, "progress": False}
        with warnings.catch_warnings(action="ignore", category=NoGradientWarning):  # shown in the line below
            plain = attack("pgd", model, x, y, radius.value, **budget)
            scaled = attack("pgd", model, x, y, radius.value, loss="ce/tau", tau=tau[name], **budget)
        answers = [int(model(images).argmax()) for images in (x, plain, scaled)]
        titles = ("x", "by CE(z)", "by CE(z / T)")
        panels = [(f"{t}: {k}", image[0].cpu()) for t, k, image in zip(titles, answers, (x, plain, scaled))]
        lead = float(margin(model(x), y).detach())
        line = f"answers above the images; margin of x: {lead:.1f}, largest |gradient| of CE in float32: {largest:.2g}"
        return draw_row([*panels, ("softmax(z) at x", softened(model(x), 1.0))], int(y)), line

    return live_panel([chosen, radius, climb, number], draw)


def explore_students(models: Mapping[str, nn.Module], points: Split, eps: float, steps: int = 20) -> ipywidgets.VBox:
    """Return a choice of two networks and sliders for radius, steps and image, each attacked by PGD for itself.

    Args:
        models: networks by name.
        points: images and labels to choose from.
        eps: radius to begin with, in pixel units.
        steps: to begin with.
    """
    names = list(models)
    one, other = (
        ipywidgets.Dropdown(options=names, value=name, description="network", **CONTROL)
        for name in (names[0], names[-1])
    )
    radius, climb, number = radius_slider(eps), steps_slider(steps), image_slider(points)

    def draw() -> tuple[Figure, str]:
        x, y = points.x[number.value][None], points.y[number.value][None]
        panels: list[tuple[str, Any]] = [("x", x[0].cpu())]
        answers = []
        for name in (str(one.value), str(other.value)):
            x_adv = attack("pgd", models[name], x, y, radius.value, steps=climb.value, progress=False)
            panels += [("x + δ", x_adv[0].cpu()), (name, softened(models[name](x_adv), 1.0))]
            answers.append(f"{name} answers {int(models[name](x_adv).argmax())}")
        return draw_row(panels, int(y)), f"label {int(y)}; " + ", ".join(answers)

    return live_panel([one, other, radius, climb, number], draw)


def explore_reverse(models: Path, classifier: nn.Module, points: Split, student: str = "cd-1") -> ipywidgets.VBox:
    """Return sliders for t*, the teacher's steps, the noise and the image, over what comes of one noisy image.

    Args:
        models: folder of networks that `lib.distillation.few_step.publish` wrote.
        classifier: of the purified images.
        points: images and labels to choose from.
        student: name of a purifier in the folder, shown at its own t*.
    """
    recipe, _ = load_config(models)
    teacher = load_network(models / "teacher").to(default_device())
    distilled = load_purifier(models, student).to(default_device())
    level = ipywidgets.FloatSlider(recipe.t, min=0, max=recipe.t_max, step=1, description="t*", **SLIDER)
    climb, number = steps_slider(4, 100), image_slider(points)
    seed = ipywidgets.IntSlider(0, min=0, max=20, description="seed of the noise", **SLIDER)

    def draw() -> tuple[Figure, str]:
        x, y = points.x[number.value][None].to(default_device()), int(points.y[number.value])

        def noise() -> Any:
            return randn_like(seeded_generator(seed.value, "try it", x.device))

        here = replace(recipe, t=level.value)
        z = add_noise(x, level.value, noise())
        with torch.no_grad():
            ends = {
                f"{kind}-{climb.value}": solver_sampler(teacher, climb.value, here, kind)(z, noise())
                for kind in ("ddim", "sde")
            }
            ends[f"{student}, {recipe.t:g}"] = distilled(x, noise())
            sure = {name: float(classifier(image).softmax(1)[0, y]) for name, image in {"x": x, **ends}.items()}
        panels = {"x": x, "noisy": to_pixel_range(z), **ends}
        line = f"σ* = {t_to_sigma(level.value):.2f}; probability of the label {y}: "
        line += ", ".join(f"{name.split(',')[0]} {value:.2f}" for name, value in sure.items())
        return draw_row([(name, image[0].cpu()) for name, image in panels.items()], y), line

    return live_panel([level, climb, number, seed], draw)
