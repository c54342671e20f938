"""Noise levels of diffusion models: DDPM's schedule, its inverse, time grids and the forward process.

Everything between `to_model_range` and `to_pixel_range` lives in [-1, 1] pixels. A noise level is an index t of the
1000 steps of DDPM's linear betas (Ho et al. 2020): z_t = α_t x + s_t ε with α² + s² = 1; σ = s / α is the same level in
variance-exploding units, the ones to compare schedules in (DiffPure's t* = 0.1 is t = 99, σ* = 0.34). CLEAN stands for
no noise.
"""

from collections.abc import Callable
from functools import cache
from typing import Annotated, Any, overload

import numpy as np
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from jaxtyping import Float, Num
from pydantic import Field
from torch import Tensor

from lib.utils.random_state import RandnLike
from lib.utils.validation import Number, PositiveInt, check_settings, check_value

NoisyImages = Float[Tensor, "n c h w"]
Time = float | np.number | Num[Tensor, ""] | Num[Tensor, " n"]  # one for a batch or one per image; whole or not
EpsModel = Callable[[Tensor, Time], Tensor]  # of (z, t): the noise ε in it
Level = tuple[Any, Any]  # (α, s): floats, or tensors with one entry per image

ABAR: Tensor = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear").alphas_cumprod.double()
LOG_SIGMA = ((1 - ABAR) / ABAR).log() / 2
CLEAN = -1.0
Index = Annotated[Number, Field(ge=0, le=len(ABAR) - 1)]  # of the schedule
IndexOrClean = Annotated[Number, Field(ge=CLEAN, le=len(ABAR) - 1)]


def real_numbers(values: Any, name: str) -> Tensor:
    """Return times or levels, a number or a tensor of them, in float64 on their device.

    Raises ValueError for what is neither, with `name`: text, booleans, complex numbers, tensors of two axes.
    """
    if type(values) in (int, float):
        return torch.tensor(values, dtype=torch.float64)
    if not isinstance(values, Tensor):
        return torch.tensor(check_value(name, values, Number), dtype=torch.float64)
    if values.ndim > 1 or values.dtype == torch.bool or values.is_complex():
        shape = tuple(values.shape)
        raise ValueError(f"expected {name} to be a number or one per image (n,), got {values.dtype} of shape {shape}")
    return values.to(torch.float64)


@cache
def log_sigma_table(device: torch.device) -> Tensor:
    """Return `LOG_SIGMA` on a device, copied there once."""
    return LOG_SIGMA.to(device)


@overload
def alpha_sigma(t: Tensor) -> tuple[Tensor, Tensor]: ...
@overload
def alpha_sigma(t: float | np.number) -> tuple[float, float]: ...
@overload
def alpha_sigma(t: Time) -> Level: ...
def alpha_sigma(t: Time) -> Level:
    """Return (α, s) at an index t of the schedule, between two indices by interpolating log σ; (1, 0) at CLEAN.

    Between CLEAN and 0, where grids finer than the schedule end, σ² rises linearly, as it does in the continuous SDE.
    Computed in float64 on the device of `t`; nothing is copied to the host.

    Args:
        t: index in [0, 999], or down to CLEAN = -1: one number for a whole batch, or one per image (n,).

    Returns:
        Two numbers, or for a tensor two tensors (n, 1, 1, 1) of its dtype: float32 for whole numbers and halves, which
        hold no level.

    Raises:
        ValueError: for an index outside and for what is no number; the range of tensors is checked on the CPU only,
            where that forces no synchronisation.
    """
    times = real_numbers(t, "t")
    table = log_sigma_table(times.device)
    if times.device.type == "cpu" and not ((times >= CLEAN) & (times <= len(table) - 1)).all():
        raise ValueError(f"expected t in [0, {len(table) - 1}], or down to {CLEAN} for a clean image, got {t}")
    low = times.long().clamp(0, len(table) - 2)
    sigma = torch.lerp(table[low], table[low + 1], (times - low).clamp(min=0)).exp()
    sigma = sigma * (times - CLEAN).clamp(max=1).sqrt()
    alpha_t = (1 + sigma**2).rsqrt()
    s_t = sigma * alpha_t
    if isinstance(t, Tensor):
        dtype = torch.promote_types(t.dtype, torch.float32)
        return alpha_t.to(dtype).reshape(-1, 1, 1, 1), s_t.to(dtype).reshape(-1, 1, 1, 1)
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
        A number, or a tensor (n,) of the dtype of `sigma`, float32 for whole numbers and halves.

    Raises:
        ValueError: for a level outside and for what is no number; the range of tensors is checked on the CPU only.
    """
    value = real_numbers(sigma, "σ")
    table, log_sigma = log_sigma_table(value.device), value.log()
    if value.device.type == "cpu" and not ((value >= 0) & (log_sigma < table[-1] + 1e-6)).all():
        raise ValueError(f"expected σ in [0, {table[-1].exp():.3g}], got {sigma}")
    low = (torch.searchsorted(table, log_sigma) - 1).clamp(0, len(table) - 2)
    part = (log_sigma - table[low]) / (table[low + 1] - table[low])
    below = CLEAN + (value / table[0].exp()).clamp(max=1) ** 2  # 0 above the first index
    t = low + part.clamp(0, 1) + below
    return t.to(torch.promote_types(sigma.dtype, torch.float32)) if isinstance(sigma, Tensor) else t.item()


def to_model_range(x: NoisyImages) -> NoisyImages:
    """Return images in [0, 1] as the network takes them, in [-1, 1]."""
    return 2 * x - 1


def to_pixel_range(u: NoisyImages) -> NoisyImages:
    """Return images in [-1, 1] as pixels in [0, 1]; what lies outside stays outside (a clamp would stop gradients)."""
    return (u + 1) / 2


def subtract(a: Tensor, b: Tensor) -> Tensor:
    """Return a − b for a loss; ValueError for two shapes, which torch would broadcast to a third."""
    if a.shape != b.shape:
        raise ValueError(f"expected two tensors of one shape, got {tuple(a.shape)} and {tuple(b.shape)}")
    return a - b


def time_grid(t: Index, steps: PositiveInt) -> list[float]:
    """Return the levels of a run of `steps` steps, equally far apart in time.

    Args:
        t: index in [0, 999] where the run begins.
        steps: number of steps, at least 1.

    Returns:
        `steps` + 1 indices: t first, CLEAN last.

    Raises:
        ValueError: for another index or number of steps.
    """
    t, steps = check_settings(time_grid, {"t": t, "steps": steps}).values()
    return [t - k * (t + 1) / steps for k in range(steps)] + [CLEAN]


def add_noise(x: NoisyImages, t: Time, randn_like: RandnLike) -> NoisyImages:
    """Diffuse images to a noise level: z = α (2x − 1) + s ε (Ho et al. 2020, equation 4).

    Args:
        x: images (n, c, h, w) in [0, 1].
        t: index of the level, in [0, 999]: one for all or one per image (n,).
        randn_like: the noise ε.

    Returns:
        z (n, c, h, w) at level t, of the dtype of `x`.

    Raises:
        ValueError: for an index outside and for images of whole numbers.
    """
    if not x.is_floating_point():
        raise ValueError(f"expected images in [0, 1], got {x.dtype}: divide whole numbers by 255")
    alpha_t, s_t = alpha_sigma(t)
    return (alpha_t * to_model_range(x) + s_t * randn_like(x)).to(x.dtype)
