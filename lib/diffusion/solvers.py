"""Solvers of the reverse process: DDIM, DDPM, DiffPure's SDE and Heun's method.

All are differentiable end to end: nothing is clipped, rounded or detached between input and output. Steps go between
two levels (α, s), `now` and `then`.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lib.diffusion.schedule import (
    ABAR,
    CLEAN,
    EpsModel,
    IndexOrClean,
    Level,
    NoisyImages,
    add_noise,
    alpha_sigma,
    time_grid,
    to_pixel_range,
)
from lib.utils.random_state import RandnLike
from lib.utils.validation import check_value


def ddim_step(z: Tensor, eps_hat: Tensor, now: Level, then: Level, noise: Tensor | None = None) -> Tensor:
    """Take the deterministic step of DDIM between two levels (Song et al. 2021, equation 12 with σ = 0)."""
    return then[0] * (z - now[1] * eps_hat) / now[0] + then[1] * eps_hat


def ddpm_step(z: Tensor, eps_hat: Tensor, now: Level, then: Level, noise: Tensor) -> Tensor:
    """Draw from DDPM's posterior q(z_then | z_now, x) at the predicted x (Ho et al. 2020, equation 7)."""
    x, ratio = (z - now[1] * eps_hat) / now[0], now[0] / then[0]
    beta = 1 - ratio**2
    mean = then[0] * beta / now[1] ** 2 * x + ratio * then[1] ** 2 / now[1] ** 2 * z
    return mean + math.sqrt(beta) * then[1] / now[1] * noise


def sde_step(z: Tensor, eps_hat: Tensor, now: Level, then: Level, noise: Tensor) -> Tensor:
    """Take DiffPure's step of the reverse-time VP SDE, dz = −β (z / 2 + score) dt + √β dw (Nie et al. 2022, eq. 4).

    The score is −ε / s at the level `now`; β dt is the decrease of −log α² between the levels.
    """
    beta = 2 * math.log(then[0] / now[0])
    return z + beta * (z / 2 - eps_hat / now[1]) + math.sqrt(beta) * noise


SOLVERS: dict[str, tuple[Callable[..., Tensor], bool]] = {  # one step, and whether it draws noise
    "sde": (sde_step, True),
    "ddpm": (ddpm_step, True),
    "ddim": (ddim_step, False),
}


def heun_step(model: EpsModel, z: Tensor, now: float, then: float) -> Tensor:
    """Take Heun's step of the probability-flow ODE d(z/α)/dσ = ε(z, σ) (Karras et al. 2022, algorithm 1).

    The step to CLEAN is Euler's, as theirs.
    """
    (a, s), (a2, s2) = alpha_sigma(now), alpha_sigma(then)
    eps_hat = model(z, now)
    euler = ddim_step(z, eps_hat, (a, s), (a2, s2))
    if then == CLEAN:
        return euler
    return a2 * (z / a + (s2 / a2 - s / a) * (eps_hat + model(euler, then)) / 2)


def reverse_process(
    model: EpsModel,
    z: NoisyImages,
    times: Sequence[float] | Tensor,
    solver: str = "sde",
    randn_like: RandnLike | None = None,
    *,
    save_memory: bool = False,
) -> NoisyImages:
    """Run the reverse process from z at the level times[0] down to times[-1].

    Args:
        model: the noise that it predicts in z at index t, see `lib.diffusion.network.eps_model`.
        z: noisy images (n, c, h, w) at times[0].
        times: two or more falling indices of the schedule, numbers or a tensor (k,), see
            `lib.diffusion.schedule.time_grid`.
        solver: "sde" (Nie et al. 2022), "ddpm" (Ho et al. 2020), "ddim" (Song et al. 2021) or "heun" (Karras et al.
            2022).
        randn_like: the noise of "sde" and "ddpm".
        save_memory: keep only the images between steps and compute each step's inside again for the backward pass,
            with the same noise, which is drawn outside: exact gradients, memory of one step.

    Returns:
        Images (n, c, h, w) at times[-1], in [-1, 1] at CLEAN, not clamped. Gradients go through every step.

    Raises:
        ValueError: for an unknown solver, for a stochastic one without `randn_like`, and for other times.
    """
    indices: list[Any] = list(times)
    if any(type(t) not in (int, float) or not CLEAN <= t < len(ABAR) for t in indices):
        indices = [check_value("each of times", t, IndexOrClean) for t in times]
    if len(indices) < 2 or any(now <= then for now, then in pairwise(indices)):
        raise ValueError(f"expected two or more falling times, got {len(indices)}: {str(indices)[:80]}")
    if solver not in (*SOLVERS, "heun"):
        raise ValueError(f"expected a solver among {', '.join((*SOLVERS, 'heun'))}, got {solver!r}")
    solver_step, stochastic = SOLVERS.get(solver, (None, False))
    if stochastic and randn_like is None:
        raise ValueError(f"{solver} draws noise: expected randn_like, got None")

    def step(z: Tensor, now: float, then: float, noise: Tensor | None) -> Tensor:
        if solver_step is None:
            return heun_step(model, z, now, then)
        return solver_step(z, model(z, now), alpha_sigma(now), alpha_sigma(then), noise)

    for now, then in pairwise(indices):
        noise = randn_like(z) if stochastic and randn_like else None
        if save_memory and torch.is_grad_enabled():
            z = checkpoint(step, z, now, then, noise, use_reentrant=False)
        else:
            z = step(z, now, then, noise)
    return z


def diffpure(
    model: EpsModel, x: NoisyImages, randn_like: RandnLike, *, t: float = 99, steps: int = 100, **options: Any
) -> NoisyImages:
    """Purify images as DiffPure does: noise up to level t, then the reverse process (Nie et al. 2022, eq. 3, 4).

    Args:
        model: the noise that it predicts in z at index t.
        x: images (n, c, h, w) in [0, 1].
        randn_like: all noise.
        t: t*, index in [0, 999].
        steps: of the reverse process.
        **options: those of `reverse_process`.

    Returns:
        Images (n, c, h, w), not clamped: pixels may leave [0, 1] by a little.
    """
    z = add_noise(x, t, randn_like)
    return to_pixel_range(reverse_process(model, z, time_grid(t, steps), randn_like=randn_like, **options))
