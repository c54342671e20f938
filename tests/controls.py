"""Models whose robustness is known: twelve that fake it, one defensively distilled, one adversarially trained.

`BROKEN` builds those that fake it. `EXPECTED` names, for each that fakes it, the checks of
`lib.evaluation.sanity_checks` that must be red; the adversarially trained one has none.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lib.attacks.pgd import pgd
from lib.training import train
from lib.utils.random_state import seeded_noise

EXPECTED = {
    "scaled logits": ("zero gradients", "logit margin, median", "white-box vs Square"),
    "quantised input": ("zero gradients", "white-box vs Square"),
    "shattered gradient": ("white-box vs Square", "loss landscape"),
    "random output": ("random answers", "no-attack control"),
    "softmax output": ("softmax output",),
    "defensive distillation": (
        "zero gradients",
        "logit margin, median",
        "white-box vs Square",
        "float32 vs float64 gradients",
    ),
}


class Wrapped(nn.Module):
    """Apply `before` to the images and `after` to the logits of `model`."""

    def __init__(self, model: nn.Module, before: Callable = lambda x: x, after: Callable = lambda z: z) -> None:
        super().__init__()
        self.model, self.before, self.after = model, before, after

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k"]:
        return self.after(self.model(self.before(x)))


def scaled_logits(model: nn.Module, scale: float = 1e4) -> nn.Module:
    """Return `model` with its logits multiplied: the float32 gradient of the cross-entropy underflows to exactly 0."""
    return Wrapped(model, after=lambda z: z * scale)


def quantised_input(model: nn.Module, levels: int = 16) -> nn.Module:
    """Return `model` behind rounding to `levels` >= 2 grey values in [0, 1]: its input gradient is exactly 0."""
    return Wrapped(model, before=lambda x: (x * (levels - 1)).round() / (levels - 1))


def shattered_gradient(model: nn.Module, amplitude: float = 0.01, frequency: float = 1e4) -> nn.Module:
    """Return `model` behind x + a sin(f x): it moves pixels by at most `amplitude`, but a f >> 1 gives the gradient's
    entries unpredictable signs (shattered gradients, Athalye et al. 2018, section 3.1)."""
    return Wrapped(model, before=lambda x: x + amplitude * torch.sin(frequency * x))


class Autocast(nn.Module):
    """A model under autocast, as mixed precision has it: logits in bfloat16."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.model(x)


class RandomOutput(nn.Module):
    """Add normal noise of standard deviation `sigma` to the logits of `model`, drawn from `generator`."""

    def __init__(self, model: nn.Module, generator: torch.Generator, sigma: float) -> None:
        super().__init__()
        self.model, self.generator, self.sigma = model, generator, sigma

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k"]:
        z = self.model(x)
        return z + self.sigma * torch.randn(z.shape, generator=self.generator, device=z.device)


def random_output(model: nn.Module, generator: torch.Generator, sigma: float = 3.0) -> nn.Module:
    """Return `model` with noisy logits: a stochastic defence whose single answers prove nothing."""
    return RandomOutput(model, generator, sigma)


def softmax_output(model: nn.Module) -> nn.Module:
    """Return `model` answering probabilities: a loss that expects logits applies a second softmax to them."""
    return Wrapped(model, after=lambda z: z.softmax(1))


class WithoutGradient(nn.Module):
    """The forward pass of `model` under `no_grad`, as purifiers that were written for inference alone have it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    @torch.no_grad()
    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k"]:
        return self.model(x)


def detached_input(model: nn.Module) -> nn.Module:
    """Return `model` behind a detached image: the logits have a graph, but it does not reach the image."""
    return Wrapped(model, before=lambda x: x.detach() + 0 * x.detach().requires_grad_())


def nan_off_grid(model: nn.Module) -> nn.Module:
    """Return `model` answering NaN for images whose pixels are not multiples of 1/16, which those of the digits are."""

    class Off(Wrapped):
        def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k"]:
            off = ((16 * x).round() != 16 * x).flatten(1).any(1)
            return self.model(x).masked_fill(off[:, None], float("nan"))

    return Off(model)


def constant_logits(model: nn.Module) -> nn.Module:
    """Return a model that says class 0 of every image, with a graph."""
    return Wrapped(model, after=lambda z: 0 * z + 5 * torch.eye(z.shape[1])[0])


def step_input(model: nn.Module) -> nn.Module:
    """Return `model` behind black and white: a step function, without a gradient."""
    return Wrapped(model, before=lambda x: (x > 0.5).to(x.dtype))


def in_place_input(model: nn.Module) -> nn.Module:
    """Return `model` behind a change of the caller's images in place."""
    return Wrapped(model, before=lambda x: x.mul_(0.999))


def turned_gradient(model: nn.Module) -> nn.Module:
    """Return `model` with the same answers and the gradient's sign turned: every step leads away from the goal."""
    return Wrapped(model, before=lambda x: 2 * x.detach() - x)


BROKEN = {
    "no_grad": WithoutGradient,
    "detached": detached_input,
    "scaled logits": scaled_logits,
    "quantised input": quantised_input,
    "shattered gradient": shattered_gradient,
    "random output": lambda model: random_output(model, torch.Generator()),
    "softmax output": softmax_output,
    "NaN off the grid": nan_off_grid,
    "constant logits": constant_logits,
    "step": step_input,
    "in place": in_place_input,
    "turned gradient": turned_gradient,
}


def adversarial_loss(eps: float, norm: str = "Linf", steps: int = 7) -> Callable:
    """Return the loss of adversarial training: cross-entropy on PGD's points (Madry et al. 2018, equation 2.1)."""

    def loss(model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator, epoch: int):
        seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
        with seeded_noise(model, seed, x.device):
            x_adv = pgd(model, x, y, eps, norm, seed, steps=steps)
        return F.cross_entropy(model(x_adv), y), {}

    return loss


def adversarially_trained(
    model: nn.Module, tensors: tuple[Tensor, Tensor], *, eps: float, norm: str = "Linf", steps: int = 7, **options: Any
) -> nn.Module:
    """Return a copy of `model` trained on (images, labels) by `adversarial_loss`; `options`: those of `train`."""
    student = copy.deepcopy(model)
    train(student, adversarial_loss(eps, norm, steps), tensors, **{"name": "adversarial"} | options)
    return student.eval()
