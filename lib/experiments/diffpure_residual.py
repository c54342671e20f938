"""Experiment 5: how much of the adversary's perturbation δ each purifier leaves, and what that looks like."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lib import purify
from lib.attacks.eot_pgd import eot_pgd
from lib.data import Split
from lib.distillation.few_step import mse
from lib.evaluation import threat_models
from lib.experiments.diffpure import DENOISER, build_purifier, step_count
from lib.purify import PurifiedClassifier
from lib.utils import parallel
from lib.utils.device import to_model_device
from lib.utils.seeds import derive_seed


class GreyBoxAttack(NamedTuple):
    """Images attacked through the classifier alone, what `DENOISER` makes of them, and how they were attacked."""

    x: Tensor
    y: Tensor
    x_adv: Tensor
    denoised: Tensor
    eps: float
    steps: int
    seed: int


def grey_box_images(classifier: nn.Module, test: Split, eps: float, steps: int, seed: int) -> Tensor:
    """Return images attacked through the classifier alone."""
    return eot_pgd(classifier, *test, eps, seed=derive_seed(seed, "inherited"), steps=steps)


def residual_of(name: str, models: Path, classifier: nn.Module, grey: GreyBoxAttack) -> dict[str, Any]:
    """Return one purifier's entry of `residual_perturbations`."""
    purifier = build_purifier(models, name, clamp=False)
    x, y, seed = grey.x, grey.y, grey.seed
    result: dict[str, Any] = threat_models.residual_perturbation(purifier, classifier, x, grey.x_adv, y, seed)
    if step_count(name) <= 4:
        purified = purify.purify(purifier, grey.x_adv, seed, progress=False)
        result["to_denoiser"] = mse(purified, grey.denoised)
        fixed, own_seed = PurifiedClassifier(purifier, classifier, fixed=seed), derive_seed(seed, "own")
        own = eot_pgd(fixed, x, y, grey.eps, seed=own_seed, steps=grey.steps)
        result["own"] = threat_models.residual_perturbation(purifier, classifier, x, own, y, seed)
    return result


def residual_perturbations(
    names: Sequence[str],
    models: Path,
    classifier: nn.Module,
    test: Split,
    seed: int,
    *,
    eps: float,
    steps: int,
    jobs: int = 1,
) -> dict[str, dict]:
    """Return `lib.evaluation.threat_models.residual_perturbation` of every purifier for the grey box's δ.

    δ is the same for all of them. Under "own" the same for δ found through a student itself, with one draw of noise
    that the attacker knows, and under "to_denoiser" how far what it makes of x + δ is from what `DENOISER` makes of it:
    mean square, same noise.
    """
    few = Split(*to_model_device(classifier, *test))
    x_adv = grey_box_images(classifier, few, eps, steps, seed)
    denoised = purify.purify(build_purifier(models, DENOISER), x_adv, seed, progress=False)
    grey = GreyBoxAttack(*few, x_adv, denoised, eps, steps, seed)
    tasks = [(name, models, classifier, grey) for name in names]
    return dict(zip(names, parallel.parallel_map(residual_of, tasks, jobs, "residual perturbation"), strict=True))


def purified_images(
    names: Sequence[str], models: Path, classifier: nn.Module, test: Split, seed: int, *, eps: float, count: int = 6
) -> dict[str, list]:
    """Return images, their grey-box attack, the difference × 10 about grey, and what purifiers make of the attack.

    One row each, as bytes 0 to 255.
    """
    x, y = to_model_device(classifier, *(t[:count] for t in test))
    x_adv = grey_box_images(classifier, Split(x, y), eps, 20, seed)
    images = {"image": x, "attacked": x_adv, "δ × 10": (0.5 + 10 * (x_adv - x)).clamp(0, 1)}
    for name in names:
        images[name] = purify.purify(build_purifier(models, name), x_adv, seed, progress=False)
    return {name: (255 * pixels).round().to(torch.uint8).tolist() for name, pixels in images.items()}
