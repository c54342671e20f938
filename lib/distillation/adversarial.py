"""Losses of adversarial training and robust distillation: an inner maximum over x′, an outer minimum, one interface.

S: student, T: teacher (frozen, in eval mode), x: images in [0, 1], x′: the point of the eps-ball around x to which the
inner objective climbs, y: labels, KL(p ‖ q) = Σ p log(p / q), summed over classes and averaged over the batch.

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

Nothing but the teacher and the inner targets is detached: TRADES' clean answer gets its gradient too (public code that
detaches it trains another loss). The teacher answers x once per batch, and x′ only where the loss asks for it.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from lib.attacks.common import Images, loss_and_grad, project, step_size
from lib.distillation.soft_targets import soft_targets
from lib.utils.random_state import attack_mode

STARTS = ("uniform", "normal", "none")
INNER_MODES = ("eval", "train")


def kl_divergence(z_p: Float[Tensor, "n k"], z_q: Float[Tensor, "n k"], T: float = 1.0) -> Float[Tensor, " n"]:
    """Returns T² KL(softmax(z_p / T) ‖ softmax(z_q / T)) per image; gradients flow into both."""
    return soft_targets(z_q, z_p, T, reduction="none")


class AdversarialBatch:
    """The answers of which a batch's loss is made; each is computed when first asked for, and once.

    `s`, `s_adv`: the student's logits on x and x′, with gradients; `t`, `t_adv`: the teacher's, without. `start`: S(x)
    as the inner objectives see it, in the attack's mode and without gradient.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module | None, x: Images, y: Int[Tensor, " n"]) -> None:
        self.student, self.teacher, self.x, self.y, self.x_adv = student, teacher, x, y, x

    @cached_property
    def s(self) -> Tensor:
        return self.student(self.x)

    @cached_property
    def s_adv(self) -> Tensor:
        return self.student(self.x_adv)

    @cached_property
    def t(self) -> Tensor:
        return self.told(self.x)

    @cached_property
    def t_adv(self) -> Tensor:
        return self.told(self.x_adv)

    @torch.no_grad()
    def told(self, x: Images) -> Tensor:
        """Returns the teacher's logits on any images, without gradient."""
        return self.teacher(x)

    @cached_property
    def start(self) -> Tensor:
        with torch.no_grad():
            return self.student(self.x)


def both_networks(batch: AdversarialBatch) -> tuple[Callable, Callable]:
    """Returns AdaAD's inner problem: the teacher answers x′ too, and the gradient goes through both networks."""

    def both(x: Images) -> Tensor:
        return torch.cat([batch.teacher(x), batch.student(x)], 1)

    return both, lambda z, y: kl_divergence(*z.chunk(2, dim=1))


INNER_OBJECTIVES: dict[
    str, Callable[[AdversarialBatch], tuple[Callable, Callable]]
] = {  # of a batch: the model to climb on, and its loss
    "ce": lambda b: (b.student, lambda z, y: F.cross_entropy(z, y, reduction="none")),
    "self": lambda b: (b.student, lambda z, y: kl_divergence(b.start, z)),
    "teacher": lambda b: (b.student, lambda z, y: kl_divergence(b.t, z)),
    "moving": both_networks,
}


def inner_maximisation(
    batch: AdversarialBatch, inner: str, *, eps: float, steps: int, alpha: float, start: str, generator: torch.Generator
) -> Images:
    """Returns x′: `steps` signed gradient steps of `alpha` on an objective of `INNER_OBJECTIVES`, projected to ball and [0, 1].

    The start is uniform in the Linf ball of radius `eps`, or x + 0.001 N(0, 1) ("normal"), or x. The last point is
    returned, as all of these methods do: training wants the maximum, not the first error.
    """
    x, device = batch.x, batch.x.device
    point = x
    if start == "uniform":
        point = x + eps * (2 * torch.rand(x.shape, generator=generator, device=device) - 1)
    elif start == "normal":
        point = x + 0.001 * torch.randn(x.shape, generator=generator, device=device)
    point = project(point, x, eps, "Linf")
    model, objective = INNER_OBJECTIVES[inner](batch)
    for _ in range(steps):
        grad = loss_and_grad(model, point, batch.y, objective)[2]
        point = project(point + alpha * grad.sign(), x, eps, "Linf")
    return point


def natural_loss(b: AdversarialBatch, share: float) -> Tensor:
    """Returns the cross-entropy of clean images."""
    return F.cross_entropy(b.s, b.y)


def pgd_at_loss(b: AdversarialBatch, share: float) -> Tensor:
    """Returns the loss of adversarial training (Madry et al. 2018, the saddle point problem)."""
    return F.cross_entropy(b.s_adv, b.y)


def trades_loss(b: AdversarialBatch, share: float, *, beta: float = 6.0) -> Tensor:
    """Returns the loss of TRADES (Zhang et al. 2019; `beta` is their 1 / λ)."""
    return F.cross_entropy(b.s, b.y) + beta * kl_divergence(b.s, b.s_adv).mean()


def trades_at_loss(b: AdversarialBatch, share: float, *, beta: float = 6.0, lam: float = 0.1) -> Tensor:
    """Returns TRADES' loss with a share `lam` of its consistency asked for by the label: `guided_loss` without a teacher.

    The control that says how much of `guided_loss`'s gain the teacher has earned; `lam` 0 is TRADES.
    """
    return F.cross_entropy(b.s, b.y) + beta * (
        (1 - lam) * kl_divergence(b.s, b.s_adv).mean() + lam * F.cross_entropy(b.s_adv, b.y)
    )


def mart_loss(b: AdversarialBatch, share: float, *, lam: float = 6.0) -> Tensor:
    """Returns the loss of MART: boosted cross-entropy and a consistency weighted by doubt (Wang et al. 2020)."""
    p = b.s_adv.softmax(1)
    other = p.scatter(1, b.y[:, None], 0.0).amax(1)
    boosted = F.cross_entropy(b.s_adv, b.y) - torch.log1p(-other.clamp(max=1 - 1e-6)).mean()
    doubt = 1 - b.s.softmax(1).gather(1, b.y[:, None]).squeeze(1)
    return boosted + lam * (kl_divergence(b.s, b.s_adv) * doubt).mean()


def clean_kd_loss(b: AdversarialBatch, share: float, *, tau: float = 4.0, weight: float = 0.9) -> Tensor:
    """Returns the classic loss on clean images (Hinton et al. 2015): the control without adversarial examples."""
    return weight * kl_divergence(b.t, b.s, tau).mean() + (1 - weight) * F.cross_entropy(b.s, b.y)


def ard_loss(b: AdversarialBatch, share: float, *, tau: float = 30.0, weight: float = 1.0) -> Tensor:
    """Returns the loss of ARD; at `weight` 1, its authors' default, without labels (Goldblum et al. 2020)."""
    distilled = weight * kl_divergence(b.t, b.s_adv, tau).mean()
    return distilled if weight == 1 else distilled + (1 - weight) * F.cross_entropy(b.s, b.y)


def rslad_loss(b: AdversarialBatch, share: float, *, clean: float = 1 / 6) -> Tensor:
    """Returns the loss of RSLAD: robust soft labels for both kinds of images, no labels (Zi et al. 2021)."""
    return (1 - clean) * kl_divergence(b.t, b.s_adv).mean() + clean * kl_divergence(b.t, b.s).mean()


def iad_loss(b: AdversarialBatch, share: float, *, tau: float = 1.0, beta: float = 0.1, begin: float = 0.3) -> Tensor:
    """Returns the loss of IAD-I: where the teacher errs on x′, the student follows itself (Zhu et al. 2022).

    As their code has it: the teacher's term keeps its full weight. Before the share `begin` of training it is ARD.
    """
    guided = kl_divergence(b.t, b.s_adv, tau).mean()
    if share < begin:
        return guided
    trust = b.t_adv.softmax(1).gather(1, b.y[:, None]).squeeze(1) ** beta
    return guided + ((1 - trust) * kl_divergence(b.s, b.s_adv)).mean()


def adaad_loss(b: AdversarialBatch, share: float) -> Tensor:
    """Returns the loss of AdaAD: both answer x′, which is where they differ most (Huang et al. 2023, public code)."""
    return kl_divergence(b.t_adv, b.s_adv).mean()


def igdm_loss(b: AdversarialBatch, share: float, *, weight: float = 20.0) -> Tensor:
    """Returns AdaAD's loss with indirect gradient matching, whose weight grows (Lee et al. 2025, public code)."""
    mirrored = 2 * b.x - b.x_adv
    matched = kl_divergence(b.t_adv - b.told(mirrored), b.s_adv - b.student(mirrored)).mean()
    return adaad_loss(b, share) + weight * share * matched


def teach_loss(b: AdversarialBatch, share: float, *, beta: float = 6.0) -> Tensor:
    """Returns TRADES' loss with the teacher's clean answer in place of the label."""
    return kl_divergence(b.t, b.s).mean() + beta * kl_divergence(b.s, b.s_adv).mean()


def guided_loss(b: AdversarialBatch, share: float, *, beta: float = 6.0, lam: float = 0.1) -> Tensor:
    """Returns TRADES' loss with a share `lam` of its consistency asked for by the teacher's clean answer instead.

    Our recipe; `lam` 0 is TRADES, and with certain answers of the teacher it is `trades_at_loss`.
    """
    own, told = kl_divergence(b.s, b.s_adv).mean(), kl_divergence(b.t, b.s_adv).mean()
    return F.cross_entropy(b.s, b.y) + beta * ((1 - lam) * own + lam * told)


@dataclass(frozen=True)
class Method:
    """A loss by its parts: outer minimum, inner objective (None: no adversarial examples), need of a teacher, start."""

    outer: Callable[..., Tensor]
    inner: str | None = None
    teacher: bool = False
    start: str = "uniform"

    def options(self) -> dict[str, Any]:
        """Returns the outer minimum's own options and their defaults."""
        every = inspect.signature(self.outer).parameters.values()
        return {p.name: p.default for p in every if p.kind is p.KEYWORD_ONLY}


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
    """Returns the loss of one of `METHODS`, or of a method put together anew, for `lib.training.train` on (x, y).

    `eps`: radius of the Linf ball in pixel units; `epochs`: of the whole training, for the terms that grow with it;
    `alpha`: step size, 2.5 eps / steps when None; `mode`: the student's during the inner maximum (see `attack_mode`), the
    same for every method; `options`: those of the outer minimum. The teacher is frozen and set to eval mode here.
    Raises ValueError for an unknown method, option or mode, a missing teacher and unusable numbers.
    """
    if isinstance(method, str) and method not in METHODS:
        raise ValueError(f"unknown method {method!r}: choose one of {', '.join(METHODS)}")
    kind = METHODS[method] if isinstance(method, str) else method
    unknown = sorted(set(options) - set(kind.options()))
    if unknown:
        raise ValueError(f"{method} has no option {', '.join(unknown)}: it has {', '.join(kind.options()) or 'none'}")
    if kind.inner is not None and kind.inner not in INNER_OBJECTIVES:
        raise ValueError(f"unknown inner objective {kind.inner!r}: choose one of {', '.join(INNER_OBJECTIVES)}")
    for name, value, valid in (("mode", mode, INNER_MODES), ("start", kind.start, STARTS)):
        if value not in valid:
            raise ValueError(f"{name} is {value!r}: choose one of {', '.join(valid)}")
    if kind.teacher and teacher is None:
        raise ValueError(f"{method} learns from a teacher: give one")
    if not 0 <= eps <= 1 or steps < 1 or epochs < 1:
        raise ValueError(f"eps {eps}, steps {steps}, epochs {epochs}: eps in [0, 1], steps and epochs >= 1 are due")
    alpha = step_size(eps, steps) if alpha is None else alpha
    if teacher is not None:
        teacher.eval().requires_grad_(False)

    def loss(student: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator, epoch: int):
        batch = AdversarialBatch(student, teacher.to(x.device) if kind.teacher else None, x, y)
        if kind.inner is not None:
            with attack_mode(student, mode):
                batch.x_adv = inner_maximisation(
                    batch, kind.inner, eps=eps, steps=steps, alpha=alpha, start=kind.start, generator=generator
                )
        return kind.outer(batch, epoch / epochs, **options), {}

    return loss
