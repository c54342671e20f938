"""Consistency distillation (Song et al. 2023): one network that maps every point of an ODE path to the path's end.

Coordinates are variance-exploding, x_σ = u + σ ε with u in [-1, 1], on a Karras grid from σ* down to σ_min. The map is
f(x, σ) = c_skip(σ) x + c_out(σ) F(c_in(σ) x, 250 ln σ), so that f(x, σ_min) = x exactly. At σ* much of the input, an
adversary's part included, goes straight through c_skip: `skip=False` is f = F, without that boundary condition.
"""

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers import CMStochasticIterativeScheduler
from diffusers.models.unets.unet_2d import UNet2DOutput
from jaxtyping import Float
from torch import Tensor, nn

from lib.diffusion.schedule import EpsModel, alpha_sigma, sigma_to_t, t_to_sigma, to_model_range
from lib.utils.random_state import RandnLike

SIGMA_MIN = t_to_sigma(0)  # the least level that the teacher knows
DISTANCES = ("l2", "huber", "features")


class BoundaryScheduler(CMStochasticIterativeScheduler):
    """Diffusers' scheduler of consistency models with the skip connection as an option."""

    skip = True

    def get_scalings_for_boundary_condition(self, sigma: Any) -> tuple[Any, Any]:
        """Returns (c_skip, c_out) at σ: Song et al. 2023, appendix C, or (0, 1) without the skip connection."""
        return super().get_scalings_for_boundary_condition(sigma) if self.skip else (0 * sigma, 0 * sigma + 1)


def consistency_scalings(
    sigma_max: float, sigma_data: float, *, sigma_min: float = SIGMA_MIN, skip: bool = True
) -> BoundaryScheduler:
    """Returns the scheduler that holds a model's scalings, levels and sampler; nothing is clipped.

    `sigma_max`: σ*, where sampling begins; `sigma_data`: the measured standard deviation of the data in [-1, 1];
    `sigma_min`: no less than the schedule's least level, 0.01. Raises ValueError unless min < max.
    """
    if not 0 < sigma_min < sigma_max or sigma_data <= 0:
        raise ValueError(f"σ from {sigma_min} to {sigma_max}, of data {sigma_data}: 0 < min < max and data > 0 are due")
    at = BoundaryScheduler(sigma_min=sigma_min, sigma_max=sigma_max, sigma_data=sigma_data, clip_denoised=False)
    at.skip = skip
    return at


def karras_sigmas(at: BoundaryScheduler, n: int) -> Float[Tensor, " n"]:
    """Returns `n` levels from σ_max down to σ_min, dense where they are small (Karras et al. 2022, equation 5)."""
    low, high = (sigma ** (1 / at.config.rho) for sigma in (at.config.sigma_min, at.config.sigma_max))
    return torch.linspace(high, low, n, dtype=torch.float64) ** at.config.rho


def sampling_sigmas(at: BoundaryScheduler, steps: int) -> Float[np.ndarray, " k"]:
    """Returns the `steps` levels of multistep sampling: every so many of 40 on Karras' grid, σ_max first."""
    if not 1 <= steps <= 40:
        raise ValueError(f"expected 1 to 40 sampling steps, got {steps}")
    low, high = (sigma ** (1 / at.config.rho) for sigma in (at.config.sigma_min, at.config.sigma_max))
    ramp = np.arange(steps) * (40 // steps) / 39
    return (high + ramp * (low - high)) ** at.config.rho


def consistency_fn(net: nn.Module, x: Tensor, sigma: Tensor, at: BoundaryScheduler) -> Tensor:
    """Returns f(x, σ), the end of the path on which x lies; `sigma`: one level per image, or one for all."""
    sigma = torch.as_tensor(sigma, device=x.device, dtype=x.dtype).expand(len(x))
    wide = sigma[:, None, None, None]
    skip, out = at.get_scalings_for_boundary_condition(wide)
    c_in = (wide**2 + at.config.sigma_data**2).rsqrt()
    return skip * x + out * net(c_in * x, 250 * sigma.log()).sample


class PreconditionedTeacher(nn.Module):
    """A diffusion network as the F of a consistency model, so that f begins as the teacher's one-step denoiser.

    F = a x + b net(α x, t(σ)), where a and b are such that c_skip x + c_out F is the image that the network sees in x,
    with σ − σ_min for σ in the coefficients, which keeps the boundary condition exact. For use with the skip connection
    only: the network's own parametrisation contains one.
    """

    def __init__(self, net: nn.Module, at: BoundaryScheduler, target: str) -> None:
        super().__init__()
        if not at.skip:
            raise ValueError("skip is False: a diffusion network's own skip connection would come in with it")
        self.net, self.target = net, target
        self.low, self.data = at.config.sigma_min, at.config.sigma_data

    def forward(self, scaled_x: Tensor, time: Tensor) -> UNet2DOutput:
        sigma, data = (time / 250).exp(), self.data
        t = sigma_to_t(sigma).clamp(min=0)
        sigma = sigma[:, None, None, None]
        gap, root = sigma - self.low, (sigma**2 + data**2).sqrt()
        x = scaled_x * root
        seen = self.net(x * (1 + sigma**2).rsqrt(), t).sample
        a, b = gap * root / (data * (data**2 + gap**2)), root / data
        if self.target == "v":
            a, b = a * (1 - data**2) / (1 + gap**2), b * (1 + sigma**2).rsqrt()
        return UNet2DOutput(sample=a * x - b * seen)


def ode_step(predict: EpsModel, x: Tensor, now: Tensor, then: Tensor, solver: str = "heun") -> Tensor:
    """Returns the teacher's step of the probability-flow ODE dx/dσ = ε from level `now` to `then`, one per image.

    `predict` is asked in variance-preserving coordinates; `solver`: "heun" or "ddim", which is Euler's step.
    """

    def noise(x: Tensor, sigma: Tensor) -> Tensor:
        t = sigma_to_t(sigma)
        return predict(alpha_sigma(t)[0] * x, t)

    gap = (then - now)[:, None, None, None]
    first = noise(x, now)
    end = x + gap * first
    return end if solver == "ddim" else x + gap * (first + noise(end, then)) / 2


def image_distance(kind: str, features: Callable[[Tensor], Tensor] | None = None) -> Callable[[Tensor, Tensor], Tensor]:
    """Returns a function of two batches of images in [-1, 1] that gives one number per pair.

    "l2": mean square; "huber": √(‖d‖² + c²) − c with c = 0.00054 √dim (Song and Dhariwal 2023); "features": mean square
    between what `features` makes of the images, such as a classifier's last layer. ValueError otherwise.
    """
    if kind not in DISTANCES or (kind == "features" and features is None):
        raise ValueError(
            f"distance {kind!r}: choose one of {', '.join(DISTANCES)}, the last with a function `features`"
        )

    def huber(a: Tensor, b: Tensor) -> Tensor:
        c = 0.00054 * math.sqrt(a[0].numel())
        return ((a - b).flatten(1).square().sum(1) + c**2).sqrt() - c

    def square(a: Tensor, b: Tensor) -> Tensor:
        return (a - b).flatten(1).square().mean(1)

    def perceived(a: Tensor, b: Tensor) -> Tensor:
        return square(features(a), features(b))

    return {"l2": square, "huber": huber, "features": perceived}[kind]


def num_scales(share: float, first: int, last: int) -> int:
    """Returns the number of levels at a share of training: `first`, doubled at equal intervals until it is `last`.

    The schedule of Song and Dhariwal 2023; the last interval has exactly `last`.
    """
    doublings = max(0, math.ceil(math.log2(last / first)))
    return min(last, first * 2 ** int(share * (doublings + 1)))


class EMATarget(nn.Module):
    """A student and the slow copy of it that gives the targets; both are in its state, so that training can resume.

    `decay` 0: the target is the student itself, without gradient.
    """

    def __init__(self, net: nn.Module, decay: float = 0.0) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise ValueError(f"decay is {decay}: a number in [0, 1) is due, 0 for the student itself")
        self.net, self.decay = net, decay
        self.target = copy.deepcopy(net).requires_grad_(False) if decay else None

    def forward(self, *inputs: Tensor) -> Any:
        return self.net(*inputs)

    @torch.no_grad()
    def slow(self) -> nn.Module:
        """Returns the network of the targets, after moving the slow copy towards the student."""
        if self.target is None:
            return self.net
        for old, new in zip(self.target.parameters(), self.net.parameters(), strict=True):
            old.lerp_(new, 1 - self.decay)
        return self.target


def consistency_loss(
    teacher: EpsModel,
    at: BoundaryScheduler,
    *,
    epochs: int,
    levels: tuple[int, int] = (10, 40),
    solver: str = "heun",
    measure: Callable[[Tensor, Tensor], Tensor] | None = None,
    weight: str = "gap",
) -> Callable:
    """Returns the loss λ(σ) d(f(x_σ, σ), f⁻(x_σ′, σ′)) of a `EMATarget` student, for `lib.training` on images in [0, 1].

    σ and σ′ are neighbours on the grid, x_σ′ is the teacher's step from x_σ, f⁻ has no gradient (Song et al. 2023,
    algorithm 2). `levels`: how many at the beginning and the end of the `epochs`; `measure`: see `image_distance`, "huber"
    when None; `weight`: λ = 1 / (σ − σ′) for "gap", 1 for "uniform". Raises ValueError for unusable settings.
    """
    if weight not in ("gap", "uniform") or solver not in ("heun", "ddim") or not 2 <= levels[0] <= levels[1]:
        raise ValueError(
            f"weight {weight!r}, solver {solver!r}, levels {levels}: gap or uniform, heun or ddim, 2 or more"
        )
    measure = measure or image_distance("huber")

    def loss(model: nn.Module, x: Tensor, *_: Tensor, generator: torch.Generator, epoch: int):
        tracked = model.module if hasattr(model, "module") else model
        sigmas = karras_sigmas(at, num_scales(epoch / epochs, *levels)).to(x)
        i = torch.randint(0, len(sigmas) - 1, (len(x),), generator=generator, device=x.device)
        now, then = sigmas[i], sigmas[i + 1]
        noise = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        far = to_model_range(x) + now[:, None, None, None] * noise
        with torch.no_grad():
            target = consistency_fn(tracked.slow(), ode_step(teacher, far, now, then, solver), then, at)
        each = measure(consistency_fn(model, far, now, at), target)
        return (each / (now - then) if weight == "gap" else each).mean(), {"levels": float(len(sigmas))}

    return loss


def consistency_sample(
    net: nn.Module, x: Tensor, at: BoundaryScheduler, steps: int, randn_like: RandnLike | None = None
) -> Float[Tensor, "n c h w"]:
    """Returns images in [-1, 1] for x at level σ_max in `steps` evaluations, x ← f(x, σ_k) + √(σ_{k+1}² − σ_min²) noise.

    Multistep consistency sampling (Song et al. 2023, algorithm 1), differentiable throughout; the last level is σ_min,
    where the noise has no weight. Raises ValueError for more than one step without `randn_like`.
    """
    if steps > 1 and randn_like is None:
        raise ValueError(f"{steps} steps draw noise: expected randn_like, got None")
    levels = sampling_sigmas(at, steps)
    sigmas = torch.from_numpy(np.append(levels, at.config.sigma_min).astype(np.float32))
    for sigma, then, time in zip(sigmas, sigmas[1:], torch.from_numpy(250 * np.log(levels)), strict=False):
        output = net(x / (sigma**2 + at.config.sigma_data**2) ** 0.5, time.to(x).expand(len(x))).sample
        skip, out = at.get_scalings_for_boundary_condition(sigma)
        x = out * output + skip * x
        if steps > 1:
            x = x + randn_like(x) * (then.clamp(at.config.sigma_min) ** 2 - at.config.sigma_min**2) ** 0.5
    return x
