"""Distillation losses: what a student is asked to learn from its teacher's answers."""

from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F


def soft_targets(
    z_s: Float[Tensor, "n k"], z_t: Float[Tensor, "n k"], T: float, *, reduction: str = "batchmean"
) -> Tensor:
    """Returns T² KL(softmax(z_t/T) ‖ softmax(z_s/T)), summed over classes and averaged over the batch.

    `z_s`, `z_t`: logits; T²: keeps the gradient's size when T changes (Hinton et al. 2015, section 2). For T → ∞ this
    becomes logit matching, ‖(z_s − z̄_s) − (z_t − z̄_t)‖² / 2k per example (their equation 4). `reduction="none"`
    gives one value per example. Raises ValueError unless T > 0.
    """
    if not T > 0:
        raise ValueError(f"the temperature T is {T}: it must be above 0")
    terms = F.kl_div((z_s / T).log_softmax(1), (z_t / T).log_softmax(1), reduction="none", log_target=True).sum(1)
    return T**2 * (terms.mean() if reduction == "batchmean" else terms)


def kd_loss(
    z_s: Float[Tensor, "n k"], z_t: Float[Tensor, "n k"], y: Int[Tensor, " n"], *, T: float, alpha: float
) -> Tensor:
    """Returns α T² KL(softmax(z_t/T) ‖ softmax(z_s/T)) + (1 − α) CE(z_s, y) (Hinton et al. 2015, section 2).

    `alpha` in [0, 1]: 1 is the teacher's answers alone, 0 the labels alone. Raises ValueError outside.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}: a weight in [0, 1] is due")
    return alpha * soft_targets(z_s, z_t, T) + (1 - alpha) * F.cross_entropy(z_s, y)


def classic_loss(T: float, alpha: float) -> Callable:
    """Returns the loss of `kd_loss` for `lib.training.train` on the tensors (images, labels, teacher's logits)."""

    def loss(student: nn.Module, x: Tensor, y: Tensor, z_t: Tensor, *, generator: torch.Generator, epoch: int):
        return kd_loss(student(x), z_t, y, T=T, alpha=alpha), {}

    return loss


def _smoothed_loss(student, x, y, *, generator, epoch, smoothing: float):
    return F.cross_entropy(student(x), y, label_smoothing=smoothing), {}


def hard_label_smoothing_loss(smoothing: float = 0.0) -> Callable:
    """Returns the cross-entropy on labels for `train`; `smoothing` in [0, 1) mixes in the uniform distribution."""
    return partial(_smoothed_loss, smoothing=smoothing)
