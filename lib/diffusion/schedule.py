"""Diffusion models of images: noise levels, U-Net, training loss, reverse-time solvers, DiffPure's purifier.

Everything between `to_model_range` and `to_pixel_range` lives in [-1, 1] pixels. A noise level is an index t of the 1000 steps of
DDPM's linear betas (Ho et al. 2020): z_t = α_t x + s_t ε with α² + s² = 1; σ = s / α is the same level in
variance-exploding units, the ones to compare schedules in (DiffPure's t* = 0.1 is t = 99, σ* = 0.34). CLEAN stands for
no noise. All solvers are differentiable end to end: nothing is clipped, rounded or detached between input and output.
"""

from collections.abc import Callable

import torch
from diffusers import DDPMScheduler
from jaxtyping import Float
from torch import Tensor

from lib.utils.random_state import RandnLike

NoisyImages = Float[Tensor, "n c h w"]
Time = float | Float[Tensor, " n"]
EpsModel = Callable[[Tensor, Time], Tensor]  # of (z, t): the noise ε in it
Level = tuple[float, float] | tuple[Tensor, Tensor]  # (α, s)

ABAR = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear").alphas_cumprod.double()
LOG_SIGMA = ((1 - ABAR) / ABAR).log() / 2
CLEAN = -1.0


def alpha_sigma(t: Time) -> Level:
    """Returns (α, s) at the index t in [0, 999], between two indices by interpolating log σ; (1, 0) at CLEAN.

    Between CLEAN and 0, where grids finer than the schedule end, σ² rises linearly, as it does in the continuous SDE.
    `t`: one number for a whole batch, or a tensor with one per image, which gives α and s the shape n 1 1 1.
    Raises ValueError outside.
    """
    times = torch.as_tensor(t, dtype=torch.float64, device="cpu")
    if not ((times >= CLEAN) & (times <= len(ABAR) - 1)).all():
        raise ValueError(f"t is {t}: an index in [0, {len(ABAR) - 1}], or down to {CLEAN} for a clean image, is due")
    low = times.long().clamp(0, len(ABAR) - 2)
    sigma = torch.lerp(LOG_SIGMA[low], LOG_SIGMA[low + 1], (times - low).clamp(min=0)).exp()
    sigma = sigma * (times - CLEAN).clamp(max=1).sqrt()
    alpha = (1 + sigma**2).rsqrt()
    if isinstance(t, Tensor):
        return tuple(part.to(t)[:, None, None, None] for part in (alpha, sigma * alpha))
    return alpha.item(), (sigma * alpha).item()


def t_to_sigma(t: float) -> float:
    """Returns σ = s / α of an index t: 0.34 at t = 99."""
    alpha, s = alpha_sigma(t)
    return s / alpha


def sigma_to_t(sigma: Time) -> Time:
    """Returns the index t, not rounded, of a level σ or of one level per image: the inverse of `t_to_sigma`.

    Raises ValueError outside the schedule.
    """
    value = torch.as_tensor(sigma, dtype=torch.float64, device="cpu")
    wanted = value.log()
    if not ((value >= 0) & (wanted < LOG_SIGMA[-1] + 1e-6)).all():
        raise ValueError(f"σ is {sigma}: a level in [0, {LOG_SIGMA[-1].exp():.3g}] is due")
    low = (torch.searchsorted(LOG_SIGMA, wanted) - 1).clamp(0, len(LOG_SIGMA) - 2)
    part = (wanted - LOG_SIGMA[low]) / (LOG_SIGMA[low + 1] - LOG_SIGMA[low])
    below = CLEAN + (value / LOG_SIGMA[0].exp()).clamp(max=1) ** 2  # 0 above the first index
    t = low + part.clamp(0, 1) + below
    return t.to(sigma) if isinstance(sigma, Tensor) else t.item()


def to_model_range(x: NoisyImages) -> NoisyImages:
    """Returns images in [0, 1] as the network takes them, in [-1, 1]."""
    return 2 * x - 1


def to_pixel_range(u: NoisyImages) -> NoisyImages:
    """Returns images in [-1, 1] as pixels in [0, 1]; what lies outside stays outside (a clamp would stop gradients)."""
    return (u + 1) / 2


def time_grid(t: float, steps: int) -> list[float]:
    """Returns the levels of a run of `steps` steps from t to CLEAN, equally far apart in time: t first, CLEAN last."""
    if steps < 1 or not 0 <= t <= len(ABAR) - 1:
        raise ValueError(f"t {t}, steps {steps}: an index of the schedule and at least one step are due")
    return [t - k * (t + 1) / steps for k in range(steps)] + [CLEAN]


def add_noise(x: NoisyImages, t: float, randn_like: RandnLike) -> NoisyImages:
    """Diffuse images in [0, 1] to z at level t: scaled, and with the noise of `randn_like`."""
    alpha, s = alpha_sigma(t)
    return alpha * to_model_range(x) + s * randn_like(x)
