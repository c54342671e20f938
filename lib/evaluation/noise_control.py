"""Noise of the same radius as the control of every attack: one that leaves more than it is named in the record.

An attack that works lowers the logit margin of the images that survive it by far more than a random point of the ball
does: a point of noise moves it by eps |g|_2, the gradient's sign by eps |g|_1. So one pass of noise tells which attacks
may be no better than noise, and only for these is noise itself run, as the attack of that name with its 100 draws.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lib.attacks.api import BALLS, attack
from lib.attacks.common import margin, random_start
from lib.evaluation.attack_plan import EvaluationSettings
from lib.utils import per_image_rng
from lib.utils.seeds import derive_seed

CLEAR_GAIN = 4.0  # times noise's root mean square: digits have 9 to 12, attacks that leave more than noise at most 2.6


def has_noise(at: EvaluationSettings) -> bool:
    """Say whether noise of the same radius exists: the ball has one above 0, in Linf or L2."""
    return bool(at.eps) and at.norm in BALLS


def noise_attack(
    model: Callable,
    x: Float[Tensor, "n c h w"],
    y: Int[Tensor, " n"],
    eps: float,
    norm: str,
    generator: torch.Generator,
) -> Float[Tensor, "n c h w"]:
    """Attack by noise as the registry does, in the flags that the evaluation has set.

    Args:
        model: answers logits for images in [0, 1].
        x: images (n, c, h, w), in [0, 1].
        y: labels (n,).
        eps: radius of the ball, in pixel units.
        norm: "Linf" or "L2".
        generator: one number drawn from it is the seed.

    Returns:
        Images of the same shape, in the ball.
    """
    return attack("noise", model, x, y, eps, norm, generator, batch_size=len(x), mode="keep", progress=False)


@torch.no_grad()
def noise_margins(
    model: Callable, x: Float[Tensor, "n c h w"], y: Int[Tensor, " n"], at: EvaluationSettings
) -> Float[Tensor, " n"]:
    """Measure logit margins at one random point of each image's ball.

    Args:
        model: answers logits for images in [0, 1].
        x: images (n, c, h, w), in [0, 1].
        y: labels (n,).
        at: ball and seed; the ball has a radius, in Linf or L2.

    Returns:
        Margins (n,).
    """
    keys = per_image_rng.image_keys(x, derive_seed(at.seed, "noise margins"))
    point = random_start(x, float(at.eps or 0), at.norm, keys, 0, 1 / x[0].numel())
    return margin(model(point), y).to(x.dtype)


def works(clean: Float[Tensor, " n"], attacked: Float[Tensor, " n"], noisy: Float[Tensor, " n"]) -> bool:
    """Say whether an attack lowers the margins of its survivors by far more than noise does.

    Args:
        clean: logit margins of the survivors without an attack.
        attacked: those of their attacked images.
        noisy: those at a random point of the ball.

    Returns:
        Whether the mean gain is at least `CLEAR_GAIN` times noise's, False if a margin is not finite.
    """
    return bool((clean - attacked).mean() >= CLEAR_GAIN * (clean - noisy).square().mean().sqrt())


def leaves_more_than_noise(table: Mapping[str, dict[str, Any]], noise: float, label: str) -> list[str]:
    """Return a sentence for each attack that leaves more than noise of the same radius.

    Args:
        table: rows of the record by attack, with their `accuracy`.
        noise: accuracy that noise leaves, in [0, 1].
        label: what sentences call the noise.

    Returns:
        One sentence per attack.
    """
    rows = {name: row["accuracy"] for name, row in table.items() if row["accuracy"] > noise}
    return [f"{name} leaves {accuracy:.2%}, {label} only {noise:.2%}" for name, accuracy in rows.items()]
