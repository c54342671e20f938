"""Models whose robustness is known: five that fake it, a defensively distilled one, and one adversarially trained.

`EXPECTED` names, for each that fakes it, the checks of `lib.evaluation.sanity_checks` that must be red; the
adversarially trained one has none.
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
