"""Quality of the images that few steps give: measures and tables of experiment 4."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lib.data import Data, Split
from lib.diffusion.network import load_network
from lib.diffusion.schedule import add_noise, alpha_sigma, to_pixel_range
from lib.distillation.few_step import STEP_COUNTS, FewStepRecipe, Samplers, mse, run_sampler, solver_sampler
from lib.distillation.progressive import student_steps
from lib.models import logit_accuracy, predict_logits
from lib.utils import parallel
from lib.utils.device import default_device
from lib.utils.random_state import randn_like
from lib.utils.seeds import seeded_generator
from lib.utils.specs import PurifierSpec

FORWARD_PASSES = {"pd": 5, "heun": 6, "ddim": 5}  # forward passes per training image; a backward pass counts as two
PICTURE_STEPS = (100, 16, 8, 4, 2, 1)  # of the sampler of images from pure noise


def noisy_images(
    x: Float[Tensor, "n c h w"], recipe: FewStepRecipe, seed: int, purpose: str
) -> Float[Tensor, "n c h w"]:
    """Return images in [0, 1] as z at level t*, with the noise of one purpose."""
    return add_noise(x, recipe.t, randn_like(seeded_generator(seed, purpose)))


def classifier_features(
    model: nn.Sequential, x: Float[Tensor, "n c h w"], batch_size: int = 256
) -> Float[Tensor, "n d"]:
    """Return the features of a classifier's last convolution for images in [0, 1], averaged over places, in float64."""
    flat = next(i for i, layer in enumerate(model) if isinstance(layer, nn.Flatten))
    pooled = nn.Sequential(*list(model)[:flat], nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return predict_logits(pooled, x, batch_size, "the classifier").double()


def frechet_distance(a: Float[Tensor, "n d"], b: Float[Tensor, "m d"]) -> float:
    """Return the Fréchet distance of two Gaussians with the moments of `a` and `b`: |μ − μ′|² + tr(C + C′ − 2 √(CC′)).

    On a classifier's features: the formula of FID (Heusel et al. 2017) without Inception, so no FID. The estimate is
    biased upwards for few images; compare it with that between two sets of real images.
    """
    mean = (a.mean(0) - b.mean(0)).square().sum()
    first, second = a.T.cov(), b.T.cov()
    values, vectors = torch.linalg.eigh(first)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ second @ root).clamp(min=0).sqrt().sum()
    return (mean + first.trace() + second.trace() - 2 * cross).item()


def sampler_metrics(
    samplers: Samplers, data: Data, test: Split, model: nn.Sequential, recipe: FewStepRecipe, seed: int, jobs: int = 1
) -> tuple[dict[str, dict[str, Any]], dict[str, Tensor]]:
    """Return the metrics of each sampler, from the same noisy test images, and its images.

    `distance`: mse to "ode-100"; `accuracy` of the classifier `model`, in [0, 1]; `frechet`: the Fréchet distance of
    its features to those of the training images; `steps`: network evaluations per image. The row "images" is that of
    the test images themselves.
    """
    z = noisy_images(test.x, recipe, seed, "sweep")
    tasks = [(sampler, z, seed, f"sweep/{name}") for name, (_, sampler) in samplers.items()]
    images = dict(zip(samplers, parallel.parallel_map(run_sampler, tasks, jobs, "samplers"), strict=True))
    training_features = classifier_features(model, data.train.x)
    rows = {}
    for name, x in {"images": test.x, **images}.items():
        rows[name] = {
            "steps": samplers[name][0] if name in samplers else 0,
            "distance": mse(x, images["ode-100"]) if name in samplers else None,
            "accuracy": logit_accuracy(predict_logits(model, x), test.y),
            "frechet": frechet_distance(classifier_features(model, x), training_features),
        }
    return rows, images


def metrics_over_draws(
    samplers: Samplers, test: Split, model: nn.Sequential, recipe: FewStepRecipe, seed: int, draws: int, jobs: int = 1
) -> dict[str, dict[str, float]]:
    """Return how each sampler's images differ between `draws` draws of all noise, and how they compare with the SDE's.

    `accuracy`: mean over draws; `diversity`: variance of a pixel over draws, mean over pixels and images;
    `posterior`: total variation between the classifier's mean probabilities and those of "sde-100"; `frechet_sde`:
    between the features of all draws and those of "sde-100". The row "sde-100 again" shows how much of that is chance.
    """
    students = [f"{kind}-{n}" for kind in ("ddim", "pd", "cd") for n in STEP_COUNTS]
    compared = {name: samplers[name] for name in ("sde-100", "ode-100")} | {"sde-100 again": samplers["sde-100"]}
    compared |= {name: samplers[name] for name in students if name in samplers}
    tasks = []
    for name, (_, sampler) in compared.items():
        purposes = [f"draws/{name}/{k}" for k in range(draws)]
        tasks += [(sampler, noisy_images(test.x, recipe, seed, f"{p}/z"), seed, p) for p in purposes]
    images = parallel.parallel_map(run_sampler, tasks, jobs, "draws")
    each = {name: images[k * draws : (k + 1) * draws] for k, name in enumerate(compared)}
    logits = {name: torch.stack([predict_logits(model, x).double() for x in xs]) for name, xs in each.items()}
    probabilities = {name: z.softmax(-1).mean(0) for name, z in logits.items()}
    features = {name: classifier_features(model, torch.cat(xs)) for name, xs in each.items()}
    return {
        name: {
            "accuracy": logit_accuracy(logits[name], test.y),
            "diversity": torch.stack(each[name]).var(0).mean().item(),
            "posterior": (probabilities[name] - probabilities["sde-100"]).abs().sum(1).mean().item() / 2,
            "frechet_sde": frechet_distance(features[name], features["sde-100"]),
        }
        for name in compared
    }


def progressive_errors(images: Mapping[str, Tensor], recipe: FewStepRecipe) -> dict[str, dict[str, float]]:
    """Return the mse of each progressive student to its own teacher, in twice its steps, where both have images."""
    students = student_steps(recipe.first)
    pairs = {n: (f"pd-{n}", f"{'pd' if 2 * n in students else 'ddim'}-{2 * n}") for n in students}
    return {
        str(n): {"to_teacher": mse(images[student], images[teacher])}
        for n, (student, teacher) in pairs.items()
        if {student, teacher} <= images.keys()
    }


def training_costs(histories: dict[str, list[dict]], recipe: FewStepRecipe, images: int) -> dict[str, Any]:
    """Return what training costs in forward passes, and when consistency equals progressive distillation.

    `curve`: for "pd" and "cd" the passes spent after each epoch, the validation mse to the teacher's path and the
    student's steps; progressive students one after the other. `cd_equals_pd`: the share of progressive distillation's
    passes after which the consistency student's one step was first as close as its last student; None if it never was.
    """
    curve: dict[str, list] = {"pd": [], "cd": []}
    for name, history in histories.items():
        if name in ("teacher", "sampler"):
            continue
        kind, steps = ("cd", 1) if name == "cd" else ("pd", PurifierSpec.parse(name).steps)
        passes = FORWARD_PASSES["pd" if kind == "pd" else recipe.solver] * images
        spent = curve[kind][-1][0] if curve[kind] else 0
        curve[kind] += [[spent + passes * (i + 1), -row["score"], steps] for i, row in enumerate(history)]
    best = min(error for _, error, steps in curve["pd"] if steps == 1)
    equal = next((passes for passes, error, _ in curve["cd"] if error <= best), None)
    total = {kind: points[-1][0] for kind, points in curve.items()}
    return {"passes": total, "curve": curve, "cd_equals_pd": equal / total["pd"] if equal else None}


def training_log(histories: dict[str, list[dict]]) -> pd.DataFrame:
    """Return each training's number of epochs, the chosen one, its score, and the loss at the end."""
    rows = {}
    for name, history in histories.items():
        best = max(history, key=lambda row: row["score"])
        rows[name] = {"epochs": len(history), "chosen": best["epoch"] + 1, "score": best["score"]}
        rows[name] |= {"last loss": history[-1]["loss"]}
    return pd.DataFrame(rows).T.astype({"epochs": int, "chosen": int})


def better_student(samplers: Samplers, data: Data, recipe: FewStepRecipe) -> dict[int, str]:
    """Return "pd" or "cd" per number of `STEP_COUNTS`: which is closer to the ODE's end, on 500 validation images."""
    z = noisy_images(data.val.x[:500], recipe, 0, "validation")
    names = ["ode-100", *(f"{kind}-{n}" for kind in ("pd", "cd") for n in STEP_COUNTS)]
    images = {name: run_sampler(samplers[name][1], z, 0, f"validation/{name}") for name in names}
    return {n: min(("pd", "cd"), key=lambda kind: mse(images[f"{kind}-{n}"], images["ode-100"])) for n in STEP_COUNTS}


def few_step_summary(
    metrics: Mapping[str, dict], over_draws: Mapping[str, dict], better: Mapping[int, str]
) -> dict[str, float]:
    """Return the numbers that claims are about, paired within one seed, for both students and the `better` ones.

    The gains are the distance to the ODE's end of undistilled DDIM in as many steps minus the student's; the accuracies
    are those on purified clean images, mean over draws, minus that of the teacher in 100 steps of its SDE.
    """
    summary = {}
    for n in STEP_COUNTS:
        for name, kind in (("pd", "pd"), ("cd", "cd"), ("better", better[n])):
            summary[f"{name}_{n}_gain"] = metrics[f"ddim-{n}"]["distance"] - metrics[f"{kind}-{n}"]["distance"]
            summary[f"{name}_{n}_accuracy"] = over_draws[f"{kind}-{n}"]["accuracy"] - over_draws["sde-100"]["accuracy"]
    return summary


def to_uint8(x: Tensor) -> Int[Tensor, "n c h w"]:
    """Return images in [0, 1] as whole numbers from 0 to 255, which take little room; what lies outside is cut."""
    return (x.clamp(0, 1) * 255).round().int()


def sampler_images(
    samplers: Samplers, images: Mapping[str, Tensor], test: Split, recipe: FewStepRecipe, seed: int, count: int = 6
) -> dict[str, Tensor]:
    """Return the first test images, the same noisy, and those of the samplers; pixels from 0 to 255."""
    noisy = to_pixel_range(noisy_images(test.x, recipe, seed, "sweep") / alpha_sigma(recipe.t)[0])
    names = ["sde-100", "ode-100", *(f"{kind}-{n}" for kind in ("ddim", "pd", "cd") for n in STEP_COUNTS)]
    pictures = {"image": test.x, "noisy": noisy} | {name: images[name] for name in names if name in samplers}
    return {name: to_uint8(x[:count]) for name, x in pictures.items()}


def sampled_images(work: Path, recipe: FewStepRecipe, data: Data, seed: int, count: int) -> dict[str, Tensor]:
    """Return images from pure noise by undistilled DDIM in `PICTURE_STEPS` of the sampler, same noise; 0 to 255."""
    all_levels, net = replace(recipe, t=999.0), load_network(work / "sampler").to(default_device())
    z = torch.randn(count, *data.test.x.shape[1:], generator=seeded_generator(seed, "samples"))
    images = {n: run_sampler(solver_sampler(net, n, all_levels), z) for n in PICTURE_STEPS}
    return {str(n): to_uint8(x) for n, x in images.items()}
