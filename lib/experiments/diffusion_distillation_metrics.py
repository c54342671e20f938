"""How good the images are that few steps bring back: measures and tables of experiment 4."""

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

FORWARD_PASSES = {"pd": 5, "heun": 6, "ddim": 5}  # forward passes per training image; a backward pass counts as two


def classifier_features(
    model: nn.Sequential, x: Float[Tensor, "n c h w"], batch_size: int = 256
) -> Float[Tensor, "n d"]:
    """Returns what a classifier's last convolution says about images in [0, 1], averaged over places, in float64."""
    flat = next(i for i, layer in enumerate(model) if isinstance(layer, nn.Flatten))
    pooled = nn.Sequential(*model[:flat], nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return predict_logits(pooled, x, batch_size, "the classifier").double()


def frechet_distance(a: Float[Tensor, "n d"], b: Float[Tensor, "m d"]) -> float:
    """Returns the Fréchet distance of two Gaussians with the moments of `a` and `b`: |μ − μ′|² + tr(C + C′ − 2 √(CC′)).

    On a classifier's features: the formula of FID (Heusel et al. 2017) without Inception, so no FID. The estimate is
    biased upwards for few images; compare it with what two sets of real images give.
    """
    mean = (a.mean(0) - b.mean(0)).square().sum()
    first, second = a.T.cov(), b.T.cov()
    values, vectors = torch.linalg.eigh(first)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ second @ root).clamp(min=0).sqrt().sum()
    return (mean + first.trace() + second.trace() - 2 * cross).item()


def sampler_metrics(
    found: Samplers, data: Data, test: Split, model: nn.Sequential, recipe: FewStepRecipe, seed: int, jobs: int = 1
) -> tuple[dict[str, dict[str, float]], dict[str, Tensor]]:
    """Returns one row per way back, from the same noisy test images, and the images of each.

    `distance`: mean squared difference to "ode-100"; `accuracy` of the classifier `model`, in [0, 1]; `frechet_distance`: the
    distance of its features to those of the training images; `steps`: network evaluations per image. The row "images"
    is that of the test images themselves.
    """
    z = add_noise(test.x, recipe.t, randn_like(seeded_generator(seed, "sweep")))
    asked = [(restore, z, seed, f"sweep/{name}") for name, (_, restore) in found.items()]
    images = dict(zip(found, parallel.parallel_map(run_sampler, asked, jobs, "ways back"), strict=True))
    real = classifier_features(model, data.train.x)
    rows = {}
    for name, x in {"images": test.x, **images}.items():
        rows[name] = {
            "steps": found[name][0] if name in found else 0,
            "distance": mse(x, images["ode-100"]) if name in found else None,
            "accuracy": logit_accuracy(predict_logits(model, x), test.y),
            "frechet": frechet_distance(classifier_features(model, x), real),
        }
    return rows, images


def metrics_over_draws(
    found: Samplers, test: Split, model: nn.Module, recipe: FewStepRecipe, seed: int, draws: int, jobs: int = 1
) -> dict[str, dict[str, float]]:
    """Returns what differs between `draws` draws of all noise, and how it compares with the SDE's, per way back.

    `accuracy`: mean over draws; `diversity`: variance of a pixel over draws, mean over pixels and images;
    `posterior`: total variation between the classifier's mean probabilities and those of "sde-100"; `frechet_sde`:
    between the features of all draws and those of "sde-100". The row "sde-100 again" says what is noise.
    """
    few = {f"{kind}-{n}": found.get(f"{kind}-{n}") for kind in ("ddim", "pd", "cd") for n in STEP_COUNTS}
    asked = {name: found[name] for name in ("sde-100", "ode-100")} | {"sde-100 again": found["sde-100"]}
    asked |= {name: way for name, way in few.items() if way}
    rows: dict[str, dict[str, float]] = {}
    work = []
    for name, (_, restore) in asked.items():
        purposes = [f"draws/{name}/{k}" for k in range(draws)]
        work += [
            (restore, add_noise(test.x, recipe.t, randn_like(seeded_generator(seed, f"{p}/z"))), seed, p)
            for p in purposes
        ]
    images = iter(parallel.parallel_map(run_sampler, work, jobs, "draws"))
    for name in asked:
        each = [next(images) for _ in range(draws)]
        logits = torch.stack([predict_logits(model, x).double() for x in each])
        belief, seen = logits.softmax(-1).mean(0), classifier_features(model, torch.cat(each))
        if name == "sde-100":
            their_belief, theirs = belief, seen
        rows[name] = {
            "accuracy": (logits.argmax(-1) == test.y).double().mean().item(),
            "diversity": torch.stack(each).var(0).mean().item(),
            "posterior": (belief - their_belief).abs().sum(1).mean().item() / 2,
            "frechet_sde": frechet_distance(seen, theirs),
        }
    return rows


def progressive_errors(images: dict[str, Tensor], recipe: FewStepRecipe) -> dict[str, dict[str, float]]:
    """Returns for each round the distance of the student to its own teacher, in twice its steps, if both are there."""
    above = {
        n: f"pd-{2 * n}" if 2 * n in student_steps(recipe.first) else f"ddim-{2 * n}"
        for n in student_steps(recipe.first)
    }
    seen = {n: (f"pd-{n}", name) for n, name in above.items() if {f"pd-{n}", name} <= images.keys()}
    return {str(n): {"to_teacher": mse(images[own], images[name])} for n, (own, name) in seen.items()}


def training_costs(histories: dict[str, list[dict]], recipe: FewStepRecipe, images: int) -> dict[str, Any]:
    """Returns what training costs in forward passes per network evaluation counted, and when CD equals the ladder.

    `curve`: for "pd" and "cd" the passes spent after each epoch and the validation distance to the teacher's path; the
    ladder's rows are those of its rounds, one after the other. `cd_equals_pd`: the share of the ladder's passes after
    which the consistency student's one step was first as close as the ladder's last student; None if it never was.
    """
    curve: dict[str, list] = {"pd": [], "cd": []}
    for name, rows in histories.items():
        kind = name.split("-")[0]
        if kind in curve:
            each = FORWARD_PASSES["pd" if kind == "pd" else recipe.solver] * images
            spent = curve[kind][-1][0] if curve[kind] else 0
            steps = int(name.split("-")[1]) if kind == "pd" else 1
            curve[kind] += [[spent + each * (i + 1), -row["score"], steps] for i, row in enumerate(rows)]
    best = min(error for _, error, steps in curve["pd"] if steps == 1)
    equal = next((passes for passes, error, _ in curve["cd"] if error <= best), None)
    total = {kind: rows[-1][0] for kind, rows in curve.items()}
    return {"passes": total, "curve": curve, "cd_equals_pd": equal / total["pd"] if equal else None}


def training_log(histories: dict[str, list[dict]]) -> pd.DataFrame:
    """Returns what each training came to: epochs, the chosen one, its score, and the loss at the end."""
    rows = {}
    for name, history in histories.items():
        best = max(history, key=lambda row: row["score"])
        rows[name] = {"epochs": len(history), "chosen": best["epoch"] + 1, "score": best["score"]}
        rows[name] |= {"last loss": history[-1]["loss"]}
    return pd.DataFrame(rows).T.astype({"epochs": int, "chosen": int})


def better_student(ways: Samplers, data: Data, recipe: FewStepRecipe) -> dict[int, str]:
    """Returns "pd" or "cd" for each number of steps in `FEW`: who is closer to the ODE's end, 500 validation images."""
    z = add_noise(data.val.x[:500], recipe.t, randn_like(seeded_generator(0, "validation")))
    asked = ["ode-100", *(f"{kind}-{n}" for kind in ("pd", "cd") for n in STEP_COUNTS)]
    found = {name: run_sampler(ways[name][1], z, 0, f"validation/{name}") for name in asked}
    return {n: min(("pd", "cd"), key=lambda kind: mse(found[f"{kind}-{n}"], found["ode-100"])) for n in STEP_COUNTS}


def few_step_summary(rows: dict[str, dict], spread: dict[str, dict], chosen: dict[int, str]) -> dict[str, float]:
    """Returns the numbers that claims are about, paired within one seed, for both students and the `chosen` ones.

    The gains are the distance to the ODE's end of undistilled DDIM in as many steps minus the student's; the accuracies
    are those on purified clean images, mean over draws, minus that of the teacher in 100 steps of its SDE.
    """
    out = {}
    for n in STEP_COUNTS:
        for name, kind in (("pd", "pd"), ("cd", "cd"), ("better", chosen[n])):
            out[f"{name}_{n}_gain"] = rows[f"ddim-{n}"]["distance"] - rows[f"{kind}-{n}"]["distance"]
            out[f"{name}_{n}_accuracy"] = spread[f"{kind}-{n}"]["accuracy"] - spread["sde-100"]["accuracy"]
    return out


def to_uint8(x: Tensor) -> Int[Tensor, "n c h w"]:
    """Returns images in [0, 1] as whole numbers from 0 to 255, which take little room; what lies outside is cut."""
    return (x.clamp(0, 1) * 255).round().int()


def sampler_images(
    ways: Samplers, images: dict[str, Tensor], test: Split, recipe: FewStepRecipe, seed: int, count: int = 6
) -> dict:
    """Returns the first test images, the same noisy, and what the ways back made of them; pixels from 0 to 255."""
    noisy = to_pixel_range(
        add_noise(test.x, recipe.t, randn_like(seeded_generator(seed, "sweep"))) / alpha_sigma(recipe.t)[0]
    )
    asked = ["sde-100", "ode-100", *(f"{kind}-{n}" for kind in ("ddim", "pd", "cd") for n in STEP_COUNTS)]
    found = {"image": test.x, "noisy": noisy} | {name: images[name] for name in asked if name in ways}
    return {name: to_uint8(x[:count]) for name, x in found.items()}


def sampled_images(work: Path, recipe: FewStepRecipe, data: Data, seed: int, count: int) -> dict[str, Tensor]:
    """Returns images from pure noise by DDIM in 100, 16, 8, 4, 2 and 1 steps of the sampler, same noise; 0 to 255."""
    everything, net = replace(recipe, t=999.0), load_network(work / "sampler").to(default_device())
    z = torch.randn(count, *data.test.x.shape[1:], generator=seeded_generator(seed, "samples"))
    found = {n: run_sampler(solver_sampler(net, n, everything), z) for n in (100, 16, 8, 4, 2, 1)}
    return {str(n): to_uint8(x) for n, x in found.items()}
