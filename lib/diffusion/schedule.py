"""Noise levels of diffusion models: DDPM's schedule, its inverse, time grids and the forward process.

Everything between `to_model_range` and `to_pixel_range` lives in [-1, 1] pixels. A noise level is an index t of the
1000 steps of DDPM's linear betas (Ho et al. 2020): z_t = α_t x + s_t ε with α² + s² = 1; σ = s / α is the same level in
variance-exploding units, the ones to compare schedules in (DiffPure's t* = 0.1 is t = 99, σ* = 0.34). CLEAN stands for
no noise.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, overload

import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from jaxtyping import Float
from torch import Tensor

from lib.utils.random_state import RandnLike

NoisyImages = Float[Tensor, "n c h w"]
Time = float | Float[Tensor, " n"]
EpsModel = Callable[[Tensor, Time], Tensor]  # of (z, t): the noise ε in it
Level = tuple[Any, Any]  # (α, s): floats, or tensors with one entry per image

ABAR: Tensor = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear").alphas_cumprod.double()
LOG_SIGMA = ((1 - ABAR) / ABAR).log() / 2
CLEAN = -1.0


@cache
def log_sigma_table(device: torch.device) -> Tensor:
    """Return `LOG_SIGMA` on a device, copied there once."""
    return LOG_SIGMA.to(device)


@overload
def alpha_sigma(t: float) -> tuple[float, float]: ...
@overload
def alpha_sigma(t: Tensor) -> tuple[Tensor, Tensor]: ...
def alpha_sigma(t: Time) -> Level:
    """Return (α, s) at an index t of the schedule, between two indices by interpolating log σ; (1, 0) at CLEAN.

    Between CLEAN and 0, where grids finer than the schedule end, σ² rises linearly, as it does in the continuous SDE.
    Computed in float64 on the device of `t`; nothing is copied to the host.

    Args:
        t: index in [0, 999], or down to CLEAN = -1: one number for a whole batch, or one per image (n,).

    Returns:
        Two numbers, or two tensors (n, 1, 1, 1) of the dtype of `t`.

    Raises:
        ValueError: for an index outside; tensors are checked on the CPU only, where that forces no synchronisation.
    """
    times = torch.as_tensor(t, dtype=torch.float64)
    table = log_sigma_table(times.device)
    if times.device.type == "cpu" and not ((times >= CLEAN) & (times <= len(table) - 1)).all():
        raise ValueError(f"expected t in [0, {len(table) - 1}], or down to {CLEAN} for a clean image, got {t}")
    low = times.long().clamp(0, len(table) - 2)
    sigma = torch.lerp(table[low], table[low + 1], (times - low).clamp(min=0)).exp()
    sigma = sigma * (times - CLEAN).clamp(max=1).sqrt()
    alpha_t = (1 + sigma**2).rsqrt()
    s_t = sigma * alpha_t
    if isinstance(t, Tensor):
        return alpha_t.to(t)[:, None, None, None], s_t.to(t)[:, None, None, None]
    return alpha_t.item(), s_t.item()


def t_to_sigma(t: float) -> float:
    """Return σ = s / α of an index t: 0.34 at t = 99."""
    alpha_t, s_t = alpha_sigma(t)
    return s_t / alpha_t


@overload
def sigma_to_t(sigma: float) -> float: ...
@overload
def sigma_to_t(sigma: Tensor) -> Tensor: ...
def sigma_to_t(sigma: Time) -> Time:
    """Return the index t, not rounded, of a level σ: the inverse of `t_to_sigma`.

    Computed in float64 on the device of `sigma`; nothing is copied to the host.

    Args:
        sigma: level from 0 to the schedule's last: one number, or one per image (n,).

    Returns:
        A number, or a tensor (n,) of the dtype of `sigma`.

    Raises:
        ValueError: for a level outside; tensors are checked on the CPU only.
    """
    value = torch.as_tensor(sigma, dtype=torch.float64)
    table, log_sigma = log_sigma_table(value.device), value.log()
    if value.device.type == "cpu" and not ((value >= 0) & (log_sigma < table[-1] + 1e-6)).all():
        raise ValueError(f"expected σ in [0, {table[-1].exp():.3g}], got {sigma}")
    low = (torch.searchsorted(table, log_sigma) - 1).clamp(0, len(table) - 2)
    part = (log_sigma - table[low]) / (table[low + 1] - table[low])
    below = CLEAN + (value / table[0].exp()).clamp(max=1) ** 2  # 0 above the first index
    t = low + part.clamp(0, 1) + below
    return t.to(sigma) if isinstance(sigma, Tensor) else t.item()


def to_model_range(x: NoisyImages) -> NoisyImages:
    """Return images in [0, 1] as the network takes them, in [-1, 1]."""
    return 2 * x - 1


def to_pixel_range(u: NoisyImages) -> NoisyImages:
    """Return images in [-1, 1] as pixels in [0, 1]; what lies outside stays outside (a clamp would stop gradients)."""
    return (u + 1) / 2


def time_grid(t: float, steps: int) -> list[float]:
    """Return the levels of a run of `steps` steps, equally far apart in time.

    Args:
        t: index in [0, 999] where the run begins.
        steps: number of steps, at least 1.

    Returns:
        `steps` + 1 indices: t first, CLEAN last.

    Raises:
        ValueError: for another index or number of steps.
    """
    if steps < 1 or not 0 <= t <= len(ABAR) - 1:
        raise ValueError(f"expected t in [0, {len(ABAR) - 1}] and at least one step, got t {t}, steps {steps}")
    return [t - k * (t + 1) / steps for k in range(steps)] + [CLEAN]


def add_noise(x: NoisyImages, t: float, randn_like: RandnLike) -> NoisyImages:
    """Diffuse images to a noise level: z = α (2x − 1) + s ε (Ho et al. 2020, equation 4).

    Args:
        x: images (n, c, h, w) in [0, 1].
        t: index of the level, in [0, 999].
        randn_like: the noise ε.

    Returns:
        z (n, c, h, w) at level t.
    """
    alpha_t, s_t = alpha_sigma(t)
    return alpha_t * to_model_range(x) + s_t * randn_like(x)
