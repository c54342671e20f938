"""Solvers of the reverse process: DDIM, DDPM, DiffPure's SDE and Heun's method."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lib.diffusion.schedule import (
    CLEAN,
    EpsModel,
    Level,
    NoisyImages,
    add_noise,
    alpha_sigma,
    time_grid,
    to_pixel_range,
)
from lib.utils.random_state import RandnLike


def ddim_step(z: Tensor, eps: Tensor, now: Level, then: Level, noise: Tensor | None = None) -> Tensor:
    """Returns the deterministic step of DDIM between two levels (Song et al. 2021, equation 12 with σ = 0)."""
    return then[0] * (z - now[1] * eps) / now[0] + then[1] * eps


def ddpm_step(z: Tensor, eps: Tensor, now: Level, then: Level, noise: Tensor) -> Tensor:
    """Returns a draw of DDPM's posterior q(z_then | z_now, x) at the predicted x (Ho et al. 2020, equation 7)."""
    x, ratio = (z - now[1] * eps) / now[0], now[0] / then[0]
    beta = 1 - ratio**2
    mean = then[0] * beta / now[1] ** 2 * x + ratio * then[1] ** 2 / now[1] ** 2 * z
    return mean + math.sqrt(beta) * then[1] / now[1] * noise


def sde_step(z: Tensor, eps: Tensor, now: Level, then: Level, noise: Tensor) -> Tensor:
    """Returns DiffPure's step of the reverse-time VP SDE, dz = −β (z / 2 + score) dt + √β dw (Nie et al. 2022, eq. 4).

    The score is −ε / s at the level now; β dt is what has passed of −log α² between the levels.
    """
    beta = 2 * math.log(then[0] / now[0])
    return z + beta * (z / 2 - eps / now[1]) + math.sqrt(beta) * noise


SOLVERS: dict[str, tuple[Callable, bool]] = {  # one step, and whether it draws noise
    "sde": (sde_step, True),
    "ddpm": (ddpm_step, True),
    "ddim": (ddim_step, False),
}


def heun_step(predict: EpsModel, z: Tensor, now: float, then: float) -> Tensor:
    """Returns Heun's step of the probability-flow ODE d(z/α)/dσ = ε(z, σ) (Karras et al. 2022, algorithm 1).

    The step to CLEAN is Euler's, as theirs.
    """
    (a, s), (a2, s2) = alpha_sigma(now), alpha_sigma(then)
    eps = predict(z, now)
    euler = ddim_step(z, eps, (a, s), (a2, s2))
    if then == CLEAN:
        return euler
    return a2 * (z / a + (s2 / a2 - s / a) * (eps + predict(euler, then)) / 2)


def reverse_process(
    predict: EpsModel,
    z: NoisyImages,
    times: Sequence[float],
    solver: str = "sde",
    randn_like: RandnLike | None = None,
    *,
    save_memory: bool = False,
) -> NoisyImages:
    """Returns what `solver` ("sde", "ddpm", "ddim", "heun") makes of z at times[0] on its way to times[-1].

    Gradients go through every step. `save_memory`: keep only the images between steps and compute each step's inside
    again for the backward pass, with the same noise, which is drawn outside: exact gradients, memory of one step.
    Raises ValueError for an unknown solver and for a stochastic one without `randn_like`.
    """
    if solver not in (*SOLVERS, "heun"):
        raise ValueError(f"unknown solver {solver!r}: choose one of {', '.join((*SOLVERS, 'heun'))}")
    move, random = SOLVERS.get(solver, (None, False))
    if random and randn_like is None:
        raise ValueError(f"{solver} draws noise: expected randn_like, got None")

    def step(z: Tensor, now: float, then: float, noise: Tensor | None) -> Tensor:
        if move is None:
            return heun_step(predict, z, now, then)
        return move(z, predict(z, now), alpha_sigma(now), alpha_sigma(then), noise)

    for now, then in pairwise(times):
        noise = randn_like(z) if random else None
        if save_memory and torch.is_grad_enabled():
            z = checkpoint(step, z, now, then, noise, use_reentrant=False)
        else:
            z = step(z, now, then, noise)
    return z


def diffpure(
    predict: EpsModel, x: NoisyImages, randn_like: RandnLike, *, t: float = 99, steps: int = 100, **options: Any
) -> NoisyImages:
    """Returns DiffPure's purification of images in [0, 1]: noise up to level t, then back (Nie et al. 2022, eq. 3, 4).

    `options`: those of `reverse_process`. Not clamped: pixels may leave [0, 1] by a little.
    """
    return to_pixel_range(
        reverse_process(predict, add_noise(x, t, randn_like), time_grid(t, steps), randn_like=randn_like, **options)
    )
