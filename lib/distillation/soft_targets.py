"""Distillation losses: what a student learns from its teacher's logits (Hinton, Vinyals, Dean 2015)."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F


def soft_targets(
    z_s: Float[Tensor, "n k"], z_t: Float[Tensor, "n k"], T: float, *, reduction: str = "batchmean"
) -> Tensor:
    """Compute T² KL(softmax(z_t/T) ‖ softmax(z_s/T)), summed over classes (Hinton et al. 2015, section 2).

    The factor T² keeps the gradient's size when T changes. For T → ∞ this becomes logit matching,
    ‖(z_s − z̄_s) − (z_t − z̄_t)‖² / 2k per example (their equation 4).

    Args:
        z_s: the student's logits (n, k).
        z_t: the teacher's logits (n, k).
        T: temperature, above 0.
        reduction: "batchmean" or "none".

    Returns:
        The mean over the batch, or with "none" one value per example (n,).

    Raises:
        ValueError: if T is not above 0.
    """
    if not T > 0:
        raise ValueError(f"expected a temperature T above 0, got {T}")
    terms = F.kl_div((z_s / T).log_softmax(1), (z_t / T).log_softmax(1), reduction="none", log_target=True).sum(1)
    return T**2 * (terms.mean() if reduction == "batchmean" else terms)


def kd_loss(
    z_s: Float[Tensor, "n k"], z_t: Float[Tensor, "n k"], y: Int[Tensor, " n"], *, T: float, alpha: float
) -> Tensor:
    """Compute α T² KL(softmax(z_t/T) ‖ softmax(z_s/T)) + (1 − α) CE(z_s, y) (Hinton et al. 2015, section 2).

    Args:
        z_s: the student's logits (n, k).
        z_t: the teacher's logits (n, k).
        y: class numbers (n,).
        T: temperature, above 0.
        alpha: weight of the soft targets in [0, 1]; 0: the labels alone.

    Returns:
        The mean over the batch.

    Raises:
        ValueError: if T or alpha is out of range.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"expected a weight alpha in [0, 1], got {alpha}")
    return alpha * soft_targets(z_s, z_t, T) + (1 - alpha) * F.cross_entropy(z_s, y)


def classic_loss(T: float, alpha: float) -> Callable:
    """Build the loss of classic distillation for `lib.training.train` on (images, labels, teacher's logits).

    Args:
        T: temperature, above 0.
        alpha: weight of the soft targets in [0, 1].

    Returns:
        `loss(student, x, y, z_t, *, generator, epoch) -> (scalar, {})`, that of `kd_loss`.
    """

    def loss(student: nn.Module, x: Tensor, y: Tensor, z_t: Tensor, *, generator: torch.Generator, epoch: int):
        return kd_loss(student(x), z_t, y, T=T, alpha=alpha), {}

    return loss


def _smoothed_loss(
    student: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator, epoch: int, smoothing: float
) -> tuple[Tensor, dict[str, Any]]:
    return F.cross_entropy(student(x), y, label_smoothing=smoothing), {}


def hard_label_smoothing_loss(smoothing: float = 0.0) -> Callable:
    """Build the cross-entropy on labels for `lib.training.train` on (images, labels).

    Args:
        smoothing: weight in [0, 1) of the uniform distribution in the targets; 0: hard labels.

    Returns:
        `loss(student, x, y, *, generator, epoch) -> (scalar, {})`.
    """
    return partial(_smoothed_loss, smoothing=smoothing)
