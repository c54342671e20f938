"""Losses of adversarial training and robust distillation: an inner maximum over x′, an outer minimum, one interface.

S: student, T: teacher (frozen, in eval mode), x: images in [0, 1], x′: the point of the eps-ball around x to which the
inner maximisation arrives, y: labels, KL(p ‖ q) = Σ p log(p / q), summed over classes and averaged over the batch.

| method   | inner maximum        | outer minimum |
|----------|----------------------|---------------|
| natural  | –                    | CE(S(x), y) |
| pgd-at   | CE(S(x′), y)         | CE(S(x′), y) |
| trades   | KL(S(x) ‖ S(x′))     | CE(S(x), y) + β KL(S(x) ‖ S(x′)) |
| trades-at | KL(S(x) ‖ S(x′))    | CE(S(x), y) + β [(1 − λ) KL(S(x) ‖ S(x′)) + λ CE(S(x′), y)] |
| mart     | CE(S(x′), y)         | BCE(S(x′), y) + λ KL(S(x) ‖ S(x′)) (1 − S(x)_y) |
| kd       | –                    | α τ² KL(T(x) ‖ S(x)) + (1 − α) CE(S(x), y) |
| ard      | CE(S(x′), y)         | α τ² KL(T(x) ‖ S(x′)) + (1 − α) CE(S(x), y) |
| rslad    | KL(T(x) ‖ S(x′))     | (1 − w) KL(T(x) ‖ S(x′)) + w KL(T(x) ‖ S(x)) |
| iad      | CE(S(x′), y)         | τ² KL(T(x) ‖ S(x′)) + (1 − T(x′)_y^β) KL(S(x) ‖ S(x′)) |
| adaad    | KL(T(x′) ‖ S(x′))    | KL(T(x′) ‖ S(x′)) |
| igdm     | KL(T(x′) ‖ S(x′))    | adaad + a (epoch / epochs) KL(T(x′) − T(x″) ‖ S(x′) − S(x″)), x″ = 2x − x′ |
| teach    | KL(S(x) ‖ S(x′))     | KL(T(x) ‖ S(x)) + β KL(S(x) ‖ S(x′)) |
| guided   | KL(S(x) ‖ S(x′))     | CE(S(x), y) + β [(1 − λ) KL(S(x) ‖ S(x′)) + λ KL(T(x) ‖ S(x′))] |

Only the teacher and the targets of the inner maximisation are detached: TRADES' gradient flows through S(x) too (public
code that detaches it trains another loss). The teacher sees x once per batch, and x′ only where the loss needs it.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lib.attacks.common import Images, loss_and_grad, project, step_size
from lib.distillation.adversarial_losses import (
    AdversarialBatch,
    adaad_loss,
    ard_loss,
    clean_kd_loss,
    guided_loss,
    iad_loss,
    igdm_loss,
    kl_divergence,
    mart_loss,
    natural_loss,
    pgd_at_loss,
    rslad_loss,
    teach_loss,
    trades_at_loss,
    trades_loss,
)
from lib.distillation.soft_targets import check_same_classes
from lib.utils.random_state import attack_mode

STARTS = ("uniform", "normal", "none")
INNER_MODES = ("eval", "train")


def both_networks(batch: AdversarialBatch) -> tuple[Callable, Callable]:
    """Return AdaAD's inner problem: the gradient flows through the teacher on x′, too."""

    def both(x: Images) -> Tensor:
        assert batch.teacher is not None  # `robust_loss` has checked it
        z_t, z_s = batch.teacher(x), batch.student(x)
        check_same_classes(z_s, z_t)  # of other classes, the halves would be mixed
        return torch.cat([z_t, z_s], 1)

    return both, lambda z, y: kl_divergence(*z.chunk(2, dim=1))


# of a batch: the model and the loss that the inner maximisation maximises
INNER_OBJECTIVES: dict[str, Callable[[AdversarialBatch], tuple[Callable, Callable]]] = {
    "ce": lambda b: (b.student, lambda z, y: F.cross_entropy(z, y, reduction="none")),
    "self": lambda b: (b.student, lambda z, y: kl_divergence(b.s_fixed, z)),
    "teacher": lambda b: (b.student, lambda z, y: kl_divergence(b.t, z)),
    "moving": both_networks,
}


def inner_maximisation(
    batch: AdversarialBatch, inner: str, *, eps: float, steps: int, alpha: float, start: str, generator: torch.Generator
) -> Images:
    """Maximise an inner objective over the ball by projected signed gradient steps.

    The last point is returned, as all of these methods do: training wants the maximum, not the first error.

    Args:
        batch: student, teacher, images and labels.
        inner: a key of `INNER_OBJECTIVES`.
        eps: radius of the Linf ball, in pixel units.
        steps: number of gradient steps.
        alpha: step size, in pixel units.
        start: "uniform" in the ball, "normal" for x + 0.001 N(0, 1), or "none" for x.
        generator: of the random start, on the images' device.

    Returns:
        x′, images of the same shape, in the ball and in [0, 1].
    """
    x_adv, x, device = batch.x, batch.x, batch.x.device
    if start == "uniform":
        x_adv = x + eps * (2 * torch.rand(x.shape, generator=generator, device=device) - 1)
    elif start == "normal":
        x_adv = x + 0.001 * torch.randn(x.shape, generator=generator, device=device)
    x_adv = project(x_adv, x, eps, "Linf")
    model, objective = INNER_OBJECTIVES[inner](batch)
    for _ in range(steps):
        grad = loss_and_grad(model, x_adv, batch.y, objective)[2]
        x_adv = project(x_adv + alpha * grad.sign(), x, eps, "Linf")
    return x_adv


@dataclass(frozen=True)
class Method:
    """A loss by its parts: outer loss, inner objective (None: no adversarial examples), need of a teacher, start."""

    outer: Callable[..., Tensor]
    inner: str | None = None
    teacher: bool = False
    start: str = "uniform"

    def options(self) -> dict[str, Any]:
        """Return the options of the outer loss and their defaults."""
        parameters = inspect.signature(self.outer).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}

    def check(self, name: str, teacher: nn.Module | None, mode: str, options: dict[str, Any]) -> None:
        """Raise ValueError, which names the valid values, for an unknown part, mode or option and a missing teacher."""
        valid = {"inner": (*INNER_OBJECTIVES, None), "start": STARTS, "mode": INNER_MODES}
        for part, value in (("inner", self.inner), ("start", self.start), ("mode", mode)):
            if value not in valid[part]:
                raise ValueError(f"expected {part} to be one of {', '.join(map(str, valid[part]))}, got {value!r}")
        if unknown := sorted(set(options) - set(self.options())):
            known = ", ".join(self.options()) or "none"
            raise ValueError(f"expected options of {name} among {known}, got {', '.join(unknown)}")
        if self.teacher and teacher is None:
            raise ValueError(f"expected a teacher, got None: {name} learns from one")


METHODS = {
    "natural": Method(natural_loss),
    "pgd-at": Method(pgd_at_loss, "ce"),
    "trades": Method(trades_loss, "self", start="normal"),
    "trades-at": Method(trades_at_loss, "self", start="normal"),
    "mart": Method(mart_loss, "ce"),
    "kd": Method(clean_kd_loss, teacher=True),
    "ard": Method(ard_loss, "ce", teacher=True),
    "rslad": Method(rslad_loss, "teacher", teacher=True, start="normal"),
    "iad": Method(iad_loss, "ce", teacher=True),
    "adaad": Method(adaad_loss, "moving", teacher=True, start="normal"),
    "igdm": Method(igdm_loss, "moving", teacher=True, start="normal"),
    "teach": Method(teach_loss, "self", teacher=True, start="normal"),
    "guided": Method(guided_loss, "self", teacher=True, start="normal"),
}


def robust_loss(
    method: str | Method,
    teacher: nn.Module | None = None,
    *,
    eps: float,
    epochs: int,
    steps: int = 10,
    alpha: float | None = None,
    mode: str = "eval",
    **options: Any,
) -> Callable:
    """Build the loss of adversarial training or robust distillation for `lib.training.train` on (images, labels).

    Args:
        method: a key of `METHODS`, or a `Method` of one's own.
        teacher: the network to learn from, for methods that need one; frozen and set to eval mode here.
        eps: radius of the Linf ball, in pixel units, in [0, 1].
        epochs: length of the whole training, for terms whose weight changes with the epoch.
        steps: gradient steps of the inner maximisation, at least 1.
        alpha: its step size, in pixel units; None: 2.5 eps / steps.
        mode: the student's during the inner maximisation, "eval" or "train" (`lib.utils.random_state.attack_mode`).
        options: of the outer loss, such as `beta` or `lam`; its defaults are the papers' or their public code's.

    Returns:
        `loss(student, x, y, *, generator, epoch) -> (scalar, {})`.

    Raises:
        ValueError: if the method, an option or the mode is unknown, a teacher is missing or a number is out of range.
    """
    if isinstance(method, str) and method not in METHODS:
        raise ValueError(f"expected method to be one of {', '.join(METHODS)}, got {method!r}")
    kind = METHODS[method] if isinstance(method, str) else method
    kind.check(str(method), teacher, mode, options)
    if not 0 <= eps <= 1 or steps < 1 or epochs < 1:
        raise ValueError(
            f"expected eps in [0, 1], steps and epochs >= 1, got eps {eps}, steps {steps}, epochs {epochs}"
        )
    attack: dict[str, Any] = {"eps": eps, "steps": steps, "alpha": step_size(eps, steps) if alpha is None else alpha}
    if teacher is not None:
        teacher.eval().requires_grad_(False)

    def loss(student: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator, epoch: int):
        batch = AdversarialBatch(student, teacher.to(x.device) if kind.teacher and teacher is not None else None, x, y)
        if kind.inner is not None:
            with attack_mode(student, mode):
                batch.x_adv = inner_maximisation(batch, kind.inner, **attack, start=kind.start, generator=generator)
        return kind.outer(batch, epoch / epochs, **options), {}

    return loss
