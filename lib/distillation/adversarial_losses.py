"""The outer losses of adversarial training and robust distillation; the table is in `lib.distillation.adversarial`.

Each is a function of the logits of one batch and of the share of training that is over; its options are keyword-only.
"""

from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from lib.attacks.common import Images
from lib.distillation.soft_targets import check_same_classes, soft_targets


def kl_divergence(z_p: Tensor, z_q: Tensor, T: float = 1.0) -> Float[Tensor, " n"]:
    """Compute T² KL(softmax(z_p / T) ‖ softmax(z_q / T)) per image; gradients flow into both.

    Args:
        z_p: logits (n, k) of the distribution p.
        z_q: logits (n, k) of the distribution q.
        T: temperature of both, above 0.

    Returns:
        One divergence per image (n,), in nats.

    Raises:
        ValueError: if T is out of range or the logits are not of one shape.
    """
    return soft_targets(z_q, z_p, T, reduction="none")


class AdversarialBatch:
    """The logits in a batch's loss; each is computed at its first use.

    `s`, `s_adv`: the student's on x and x′, with gradients; `t`, `t_adv`: the teacher's, without. `s_fixed`: S(x) as
    the inner objectives use it, in the attack's mode and without gradient.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module | None, x: Images, y: Int[Tensor, " n"]) -> None:
        self.student, self.teacher, self.x, self.y, self.x_adv = student, teacher, x, y, x

    @cached_property
    def s(self) -> Tensor:
        return self._student_logits(self.x)

    @cached_property
    def s_adv(self) -> Tensor:
        return self._student_logits(self.x_adv)

    def _student_logits(self, x: Images) -> Tensor:
        z = self.student(x)
        check_same_classes(z, y=self.y)
        return z

    @cached_property
    def t(self) -> Tensor:
        return self.teacher_logits(self.x)

    @cached_property
    def t_adv(self) -> Tensor:
        return self.teacher_logits(self.x_adv)

    @cached_property
    @torch.no_grad()
    def s_fixed(self) -> Tensor:
        return self.student(self.x)

    @torch.no_grad()
    def teacher_logits(self, x: Images) -> Tensor:
        """Compute the teacher's logits on any images, without gradient."""
        if self.teacher is None:
            raise ValueError("expected a teacher, got None: this loss learns from one")
        return self.teacher(x)


# the outer losses of a batch `b`; `share` in [0, 1): how much of the training is over
def natural_loss(b: AdversarialBatch, share: float) -> Tensor:
    """Compute the cross-entropy of clean images: standard training.

    Args:
        b: the logits of one batch, computed when first asked for.
        share: of training that is over, in [0, 1).

    Returns:
        The loss, a scalar.
    """
    return F.cross_entropy(b.s, b.y)


def pgd_at_loss(b: AdversarialBatch, share: float) -> Tensor:
    """Compute the loss of PGD adversarial training (Madry et al. 2018, the saddle point problem).

    Args:
        b: the logits of one batch, computed when first asked for.
        share: of training that is over, in [0, 1).

    Returns:
        The loss, a scalar.
    """
    return F.cross_entropy(b.s_adv, b.y)


def trades_loss(b: AdversarialBatch, share: float, *, beta: float = 6.0) -> Tensor:
    """Compute the loss of TRADES (Zhang et al. 2019; `beta` is their 1 / λ).

    Args:
        b: the logits of one batch, computed when first asked for.
        share: of training that is over, in [0, 1).
        beta: weight of the consistency term.

    Returns:
        The loss, a scalar.
    """
    return F.cross_entropy(b.s, b.y) + beta * kl_divergence(b.s, b.s_adv).mean()


def trades_at_loss(b: AdversarialBatch, share: float, *, beta: float = 6.0, lam: float = 0.1) -> Tensor:
    """Compute TRADES' loss with a share `lam` of its consistency term replaced by PGD-AT's loss on the labels (ours).

    The control of `guided_loss`: it says how much of that loss's gain comes from the teacher; `lam` 0 is TRADES.

    Args:
        b: the logits of one batch, computed when first asked for.
        share: of training that is over, in [0, 1).
        beta: weight of the consistency term.
        lam: see the formula.

    Returns:
        The loss, a scalar.
    """
    return F.cross_entropy(b.s, b.y) + beta * (
        (1 - lam) * kl_divergence(b.s, b.s_adv).mean() + lam * F.cross_entropy(b.s_adv, b.y)
    )


def mart_loss(b: AdversarialBatch, share: float, *, lam: float = 6.0) -> Tensor:
    """Compute the loss of MART: boosted cross-entropy and a consistency weighted by 1 − S(x)_y (Wang et al. 2020).

    Args:
        b: the logits of one batch, computed when first asked for.
        share: of training that is over, in [0, 1).
        lam: see the formula.

    Returns:
        The loss, a scalar.
    """
    p = b.s_adv.softmax(1)
    other = p.scatter(1, b.y[:, None], 0.0).amax(1)
    boosted = F.cross_entropy(b.s_adv, b.y) - torch.log1p(-other.clamp(max=1 - 1e-6)).mean()
    unsure = 1 - b.s.softmax(1).gather(1, b.y[:, None]).squeeze(1)
    return boosted + lam * (kl_divergence(b.s, b.s_adv) * unsure).mean()


def clean_kd_loss(b: AdversarialBatch, share: float, *, tau: float = 4.0, weight: float = 0.9) -> Tensor:
    """Compute the classic loss on clean images (Hinton et al. 2015): the control without adversarial examples.

    Args:
        b: the logits of one batch, computed when first asked for.
        share: of training that is over, in [0, 1).
        tau: temperature.
        weight: weight of the term, see the formula.

    Returns:
        The loss, a scalar.
    """
    return weight * kl_divergence(b.t, b.s, tau).mean() + (1 - weight) * F.cross_entropy(b.s, b.y)


def ard_loss(b: AdversarialBatch, share: float, *, tau: float = 30.0, weight: float = 1.0) -> Tensor:
    """Compute the loss of ARD; at `weight` 1, its authors' default, without labels (Goldblum et al. 2020).

    Args:
        b: the logits of one batch, computed when first asked for.
        share: of training that is over, in [0, 1).
        tau: temperature.
        weight: weight of the term, see the formula.

    Returns:
        The loss, a scalar.
    """
    distilled = weight * kl_divergence(b.t, b.s_adv, tau).mean()
    return distilled if weight == 1 else distilled + (1 - weight) * F.cross_entropy(b.s, b.y)


def rslad_loss(b: AdversarialBatch, share: float, *, clean: float = 1 / 6) -> Tensor:
    """Compute the loss of RSLAD: robust soft labels for clean and adversarial images, no labels (Zi et al. 2021).

    Args:
        b: the logits of one batch, computed when first asked for.
        share: of training that is over, in [0, 1).
        clean: weight of the clean images.

    Returns:
        The loss, a scalar.
    """
    return (1 - clean) * kl_divergence(b.t, b.s_adv).mean() + clean * kl_divergence(b.t, b.s).mean()


def iad_loss(b: AdversarialBatch, share: float, *, tau: float = 1.0, beta: float = 0.1, begin: float = 0.3) -> Tensor:
    """Compute the loss of IAD-I: where the teacher errs on x′, the student follows itself (Zhu et al. 2022).

    As in their code, the teacher's term has its full weight. Before the share `begin` of training it is ARD.

    Args:
        b: the logits of one batch, computed when first asked for.
        share: of training that is over, in [0, 1).
        tau: temperature.
        beta: weight of the consistency term.
        begin: share of training before which the loss is that of ARD.

    Returns:
        The loss, a scalar.
    """
    guided = kl_divergence(b.t, b.s_adv, tau).mean()
    if share < begin:
        return guided
    trust = b.t_adv.softmax(1).gather(1, b.y[:, None]).squeeze(1) ** beta
    return guided + ((1 - trust) * kl_divergence(b.s, b.s_adv)).mean()


def adaad_loss(b: AdversarialBatch, share: float) -> Tensor:
    """Compute the loss of AdaAD: both are evaluated at x′, where they differ most (Huang et al. 2023, public code).

    Args:
        b: the logits of one batch, computed when first asked for.
        share: of training that is over, in [0, 1).

    Returns:
        The loss, a scalar.
    """
    return kl_divergence(b.t_adv, b.s_adv).mean()


def igdm_loss(b: AdversarialBatch, share: float, *, weight: float = 20.0) -> Tensor:
    """Compute AdaAD's loss plus IGDM, indirect gradient matching of growing weight (Lee et al. 2025, public code).

    Args:
        b: the logits of one batch, computed when first asked for.
        share: of training that is over, in [0, 1).
        weight: weight of the term, see the formula.

    Returns:
        The loss, a scalar.
    """
    mirrored = 2 * b.x - b.x_adv
    matched = kl_divergence(b.t_adv - b.teacher_logits(mirrored), b.s_adv - b.student(mirrored)).mean()
    return adaad_loss(b, share) + weight * share * matched


def teach_loss(b: AdversarialBatch, share: float, *, beta: float = 6.0) -> Tensor:
    """Compute TRADES' loss (Zhang et al. 2019) with the teacher's soft label T(x) in place of the label (ours).

    Args:
        b: the logits of one batch, computed when first asked for.
        share: of training that is over, in [0, 1).
        beta: weight of the consistency term.

    Returns:
        The loss, a scalar.
    """
    return kl_divergence(b.t, b.s).mean() + beta * kl_divergence(b.s, b.s_adv).mean()


def guided_loss(b: AdversarialBatch, share: float, *, beta: float = 6.0, lam: float = 0.1) -> Tensor:
    """Compute TRADES' loss with a share `lam` of its consistency term replaced by distillation from T(x) (ours).

    `lam` 0 is TRADES (Zhang et al. 2019); where T(x) is the one-hot label it is `trades_at_loss`.

    Args:
        b: the logits of one batch, computed when first asked for.
        share: of training that is over, in [0, 1).
        beta: weight of the consistency term.
        lam: see the formula.

    Returns:
        The loss, a scalar.
    """
    consistency, distilled = kl_divergence(b.s, b.s_adv).mean(), kl_divergence(b.t, b.s_adv).mean()
    return F.cross_entropy(b.s, b.y) + beta * ((1 - lam) * consistency + lam * distilled)
