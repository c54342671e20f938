"""Consistency distillation (Song et al. 2023): one network that maps every point of an ODE path to the path's end.

Levels are variance-exploding, x_σ = u + σ ε with u in [-1, 1], on a Karras grid from σ* down to σ_min. The map is
f(x, σ) = c_skip(σ) x + c_out(σ) F(c_in(σ) x, 250 ln σ), so that f(x, σ_min) = x exactly. At σ* much of the input, an
adversary's part included, goes straight through c_skip: `skip=False` is f = F, without that boundary condition.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from diffusers.models.unets.unet_2d import UNet2DOutput
from jaxtyping import Float
from torch import Tensor, nn

from lib.diffusion.schedule import EpsModel, alpha_sigma, sigma_to_t, subtract, t_to_sigma, to_model_range
from lib.utils.random_state import RandnLike
from lib.utils.validation import Integer, Number, Positive, PositiveInt, check_fields, check_settings, check_value

SIGMA_MIN = t_to_sigma(0)  # the least level that the teacher knows
SAMPLING_LEVELS = 40  # of the Karras grid from which sampling takes every so many
CONSISTENCY_WEIGHTS = ("inverse", "uniform")
DISTANCES = ("l2", "huber", "features")


@dataclass(frozen=True)
class ConsistencyScalings:
    """The function that a consistency model's network stands for: its levels and the coefficients of f.

    Args:
        sigma_max: σ*, where sampling begins.
        sigma_data: the standard deviation of the data in [-1, 1].
        sigma_min: the last level, at least `SIGMA_MIN`, the least that the teacher knows.
        skip: whether f has the skip connection, and with it the boundary condition f(x, σ_min) = x.
        rho: exponent of the Karras grid.

    Raises:
        ValueError: unless 0 < `sigma_min` < `sigma_max` and `sigma_data` > 0.
    """

    sigma_max: Number
    sigma_data: Number
    sigma_min: Number = SIGMA_MIN
    skip: bool = True
    rho: Positive = 7.0

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0 < self.sigma_min < self.sigma_max or self.sigma_data <= 0:
            raise ValueError(
                f"expected 0 < sigma_min < sigma_max and sigma_data > 0, "
                f"got {self.sigma_min}, {self.sigma_max} and {self.sigma_data}"
            )

    def c_skip_out(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Return c_skip and c_out, the weights of input and network (Song et al. 2023, app. C); 0, 1 without skip."""
        if not self.skip:
            return 0 * sigma, 0 * sigma + 1
        above = sigma - self.sigma_min
        c_skip = self.sigma_data**2 / (above**2 + self.sigma_data**2)
        return c_skip, above * self.sigma_data / (sigma**2 + self.sigma_data**2) ** 0.5

    def c_in(self, sigma: Tensor) -> Tensor:
        """Return the scale of the network's input, which gives it unit variance."""
        return (sigma**2 + self.sigma_data**2).rsqrt()


def karras_sigmas(scalings: ConsistencyScalings, n: int) -> Float[Tensor, " n"]:
    """Return `n` levels from σ_max down to σ_min, dense where they are small (Karras et al. 2022, equation 5).

    The levels are float64.
    """
    low, high = (sigma ** (1 / scalings.rho) for sigma in (scalings.sigma_min, scalings.sigma_max))
    return torch.linspace(high, low, n, dtype=torch.float64) ** scalings.rho


def consistency_fn(net: nn.Module, x: Tensor, sigma: Tensor | float, scalings: ConsistencyScalings) -> Tensor:
    """Return f(x, σ), the end of the path on which x lies (Song et al. 2023, equation 5).

    Args:
        net: F, a network of (x, time) whose output has the attribute `sample`.
        x: noisy images (n, c, h, w) = u + σ ε, u in [-1, 1].
        sigma: σ, one level per image (n,), or one for all.
        scalings: of the consistency model.

    Returns:
        Images (n, c, h, w) in [-1, 1], not clamped.
    """
    sigma = torch.as_tensor(sigma, device=x.device, dtype=x.dtype).expand(len(x))
    wide = sigma[:, None, None, None]
    output = net(scalings.c_in(wide) * x, 250 * sigma.log()).sample
    c_skip, c_out = scalings.c_skip_out(wide)
    return c_skip * x + c_out * output


class PreconditionedTeacher(nn.Module):
    """A diffusion network as the F of a consistency model, so that f begins as the teacher's one-step denoiser.

    F = a x + b net(α x, t(σ)), where a and b are such that c_skip x + c_out F is the image that the network predicts
    from x, with σ − σ_min for σ in the coefficients, which keeps the boundary condition exact.

    Args:
        net: a diffusion network.
        scalings: with the skip connection: the network's own parametrisation contains one.
        target: what the network predicts, one of `lib.diffusion.network.PREDICTION_TARGETS`.

    Raises:
        ValueError: for `scalings` without the skip connection.
    """

    def __init__(self, net: nn.Module, scalings: ConsistencyScalings, target: str) -> None:
        super().__init__()
        if not scalings.skip:
            raise ValueError("expected scalings with skip=True: a diffusion network has a skip connection of its own")
        self.net, self.target = net, target
        self.sigma_min, self.sigma_data = scalings.sigma_min, scalings.sigma_data

    def forward(self, scaled_x: Tensor, time: Tensor) -> UNet2DOutput:
        sigma, data = (time / 250).exp(), self.sigma_data
        t = sigma_to_t(sigma).clamp(min=0)
        sigma = sigma[:, None, None, None]
        above, root = sigma - self.sigma_min, (sigma**2 + data**2).sqrt()
        x = scaled_x * root
        output = self.net(x * (1 + sigma**2).rsqrt(), t).sample
        a, b = above * root / (data * (data**2 + above**2)), root / data
        if self.target == "v":
            a, b = a * (1 - data**2) / (1 + above**2), b * (1 + sigma**2).rsqrt()
        return UNet2DOutput(sample=a * x - b * output)


def ode_step(eps_model: EpsModel, x: Tensor, sigma: Tensor, sigma_next: Tensor, solver: str = "heun") -> Tensor:
    """Take one step of the teacher along the probability-flow ODE dx/dσ = ε (Karras et al. 2022, equation 1).

    Args:
        eps_model: the noise that the teacher predicts in variance-preserving z at index t.
        x: noisy images (n, c, h, w) = u + σ ε.
        sigma: the level of each image (n,).
        sigma_next: the level of each after the step (n,).
        solver: "heun", or "ddim", which is Euler's step.

    Returns:
        Noisy images (n, c, h, w) at `sigma_next`.
    """

    def eps_hat(x: Tensor, sigma: Tensor) -> Tensor:
        t = sigma_to_t(sigma)
        return eps_model(alpha_sigma(t)[0] * x, t)

    step = (sigma_next - sigma)[:, None, None, None]
    first = eps_hat(x, sigma)
    euler = x + step * first
    return euler if solver == "ddim" else x + step * (first + eps_hat(euler, sigma_next)) / 2


def image_distance(kind: str, features: Callable[[Tensor], Tensor] | None = None) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a distance d between two batches of images in [-1, 1].

    Args:
        kind: "l2": mean square; "huber": √(‖a − b‖² + c²) − c with c = 0.00054 √dim (Song and Dhariwal 2023);
            "features": mean square between `features` of the images, such as a classifier's last layer.
        features: a function of images (n, c, h, w) to (n, d), for "features".

    Returns:
        A function of (a, b), both (n, c, h, w), with one number per pair (n,); ValueError for other shapes.

    Raises:
        ValueError: for an unknown kind, and for "features" without the function.
    """
    if kind not in DISTANCES:
        raise ValueError(f"expected a distance among {', '.join(DISTANCES)}, got {kind!r}")

    def huber(a: Tensor, b: Tensor) -> Tensor:
        c = 0.00054 * math.sqrt(a[0].numel())
        return (subtract(a, b).flatten(1).square().sum(1) + c**2).sqrt() - c

    def mean_square(a: Tensor, b: Tensor) -> Tensor:
        return subtract(a, b).flatten(1).square().mean(1)

    if kind != "features":
        return huber if kind == "huber" else mean_square
    if features is None:
        raise ValueError("distance 'features': expected a function of images as `features`, got None")
    return lambda a, b: mean_square(features(a), features(b))


def num_scales(progress: float, first: int, last: int) -> int:
    """Return the number of levels at a share of training (Song and Dhariwal 2023, N(k)).

    Args:
        progress: share of the training that is done, in [0, 1).
        first: number of levels at the beginning, doubled at equal intervals.
        last: number of levels in the last interval.

    Returns:
        A number from `first` to `last`.
    """
    doublings = max(0, math.ceil(math.log2(last / first)))
    return min(last, first * 2 ** int(progress * (doublings + 1)))


class EMATarget(nn.Module):
    """A student and the average of its weights that gives the targets; both are in its state, so training can resume.

    Args:
        net: the student.
        decay: μ of the exponential moving average, in [0, 1); 0: the target is the student itself, without gradient.

    Raises:
        ValueError: for another decay.
    """

    def __init__(self, net: nn.Module, decay: Number = 0.0) -> None:
        super().__init__()
        decay = check_value("decay", decay, Number)
        if not 0 <= decay < 1:
            raise ValueError(f"expected decay in [0, 1), 0 for the student itself, got decay {decay}")
        self.net, self.decay = net, decay
        self.target = copy.deepcopy(net).requires_grad_(False) if decay else None

    def forward(self, *inputs: Tensor) -> Any:
        return self.net(*inputs)

    @torch.no_grad()
    def update_target(self) -> nn.Module:
        """Move the average towards the student and return it, the network of the targets."""
        if self.target is None:
            return self.net
        for average, weight in zip(self.target.parameters(), self.net.parameters(), strict=True):
            average.lerp_(weight, 1 - self.decay)
        return self.target


def consistency_loss(
    teacher: EpsModel,
    scalings: ConsistencyScalings,
    *,
    epochs: PositiveInt,
    levels: tuple[PositiveInt, PositiveInt] = (10, 40),
    solver: str = "heun",
    distance: Callable[[Tensor, Tensor], Tensor] | None = None,
    weight: str = "inverse",
) -> Callable:
    """Return the loss λ(σ) d(f(x_σ, σ), f⁻(x_σ′, σ′)) of an `EMATarget` student (Song et al. 2023, algorithm 2).

    σ and σ′ are neighbours on the grid, x_σ′ is the teacher's step from x_σ, f⁻ has no gradient.

    Args:
        teacher: the noise that it predicts in z at index t.
        scalings: of the student.
        epochs: of the whole training, over which the number of levels grows.
        levels: number of levels at the beginning and at the end.
        solver: of the teacher's step, "heun" or "ddim".
        distance: d, see `image_distance`; Pseudo-Huber when None.
        weight: λ = 1 / (σ − σ′) for "inverse", 1 for "uniform".

    Returns:
        A loss for `lib.training.train` on images in [0, 1].

    Raises:
        ValueError: for another weight or solver, and for fewer than two levels or falling ones.
    """
    check_settings(consistency_loss, {"epochs": epochs, "levels": levels})
    if weight not in CONSISTENCY_WEIGHTS or solver not in ("heun", "ddim") or not 2 <= levels[0] <= levels[1]:
        raise ValueError(
            f"expected weight {' or '.join(CONSISTENCY_WEIGHTS)}, solver heun or ddim and at least 2 levels, "
            f"got weight {weight!r}, solver {solver!r}, levels {levels}"
        )
    d = distance or image_distance("huber")

    def loss(model: nn.Module, x: Tensor, *_: Tensor, generator: torch.Generator, epoch: int):
        student: Any = getattr(model, "module", model)  # inside DistributedDataParallel
        sigmas = karras_sigmas(scalings, num_scales(epoch / epochs, *levels)).to(x)
        i = torch.randint(0, len(sigmas) - 1, (len(x),), generator=generator, device=x.device)
        sigma, sigma_next = sigmas[i], sigmas[i + 1]
        noise = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        noisy = to_model_range(x) + sigma[:, None, None, None] * noise
        with torch.no_grad():
            nearer = ode_step(teacher, noisy, sigma, sigma_next, solver)
            target = consistency_fn(student.update_target(), nearer, sigma_next, scalings)
        each = d(consistency_fn(model, noisy, sigma, scalings), target)
        each = each if weight == "uniform" else each / (sigma - sigma_next)
        return each.mean(), {"levels": float(len(sigmas))}

    return loss


def consistency_sample(
    net: nn.Module,
    x: Float[Tensor, "n c h w"],
    scalings: ConsistencyScalings,
    steps: Integer,
    randn_like: RandnLike | None = None,
) -> Float[Tensor, "n c h w"]:
    """Draw images by multistep consistency sampling (Song et al. 2023, algorithm 1), differentiable throughout.

    x ← f(x, σ_k) + √(σ_{k+1}² − σ_min²) noise, where the last level is σ_min and its noise has no weight. The order of
    operations is that of diffusers' `CMStochasticIterativeScheduler`, to the bit: x is divided by 1 / c_in.

    Args:
        net: F, a network of (x, time) whose output has the attribute `sample`.
        x: noisy images (n, c, h, w) at σ_max.
        scalings: of the consistency model.
        steps: evaluations of the network per image, 1 to 40.
        randn_like: the noise between steps.

    Returns:
        Images (n, c, h, w) in [-1, 1], not clamped.

    Raises:
        ValueError: for more than one step without `randn_like`, and for another number of steps.
    """
    if type(steps) is not int:
        steps = check_settings(consistency_sample, {"steps": steps})["steps"]
    if not 1 <= steps <= SAMPLING_LEVELS:
        raise ValueError(f"expected 1 to {SAMPLING_LEVELS} sampling steps, got {steps}")
    if steps > 1 and randn_like is None:
        raise ValueError(f"{steps} steps draw noise: expected randn_like, got None")
    levels = karras_sigmas(scalings, SAMPLING_LEVELS)[:: SAMPLING_LEVELS // steps][:steps]
    sigmas = torch.cat([levels, levels.new_tensor([scalings.sigma_min])]).float()
    for (sigma, sigma_next), time in zip(pairwise(sigmas), 250 * levels.log(), strict=True):
        output = net(x / (sigma**2 + scalings.sigma_data**2) ** 0.5, time.to(x).expand(len(x))).sample
        c_skip, c_out = scalings.c_skip_out(sigma)
        x = c_skip * x + c_out * output
        if steps > 1 and randn_like:
            x = x + randn_like(x) * (sigma_next.clamp(scalings.sigma_min) ** 2 - scalings.sigma_min**2) ** 0.5
    return x
