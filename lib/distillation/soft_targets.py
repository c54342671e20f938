"""Distillation losses: what a student learns from its teacher's logits (Hinton, Vinyals, Dean 2015)."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lib.utils.validation import Positive, Share, check_settings, check_value

PLAIN_UP_TO = 100.0  # temperature to which float32's rounding hides nothing


def check_same_classes(z: Any, z_t: Any = None, y: Any = None) -> None:
    """Check that logits and labels belong to each other, since torch would broadcast or leave out what does not.

    Args:
        z: logits (n, k), such as the student's.
        z_t: logits of the same shape, such as the teacher's, or None.
        y: class numbers (n,) below k, or None; on the CPU their range is checked as well.

    Raises:
        ValueError: for another shape, for numbers that are none of the k classes, and for logits of integers.
    """
    for name, value in (("logits", z), ("the teacher's logits", z_t)):
        if value is not None and not (isinstance(value, Tensor) and value.ndim == 2 and value.is_floating_point()):
            got = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"expected {name} to be floating-point (images, classes), got {got}")
    if z_t is not None and z_t.shape != z.shape:
        raise ValueError(
            f"expected the teacher's logits to have the student's shape {tuple(z.shape)}, got {tuple(z_t.shape)}: "
            "take networks of the same classes, and one row per image"
        )
    if y is None:
        return
    if y.shape != z.shape[:1] or y.is_floating_point():
        raise ValueError(f"expected labels ({len(z)},), class numbers, got {y.dtype} {tuple(y.shape)}")
    if y.device.type == "cpu" and y.numel() and not 0 <= int(y.min()) <= int(y.max()) < z.shape[1]:
        raise ValueError(f"expected labels in [0, {z.shape[1] - 1}], got {int(y.min())} to {int(y.max())}")


def _scaled_divergence(z_s: Tensor, z_t: Tensor, T: float) -> Tensor:
    """Return T² KL(softmax(z_t / T) ‖ softmax(z_s / T)) per row without cancellation, in float64.

    With d = (z_s − z_t) / T less its mean under p = softmax(z_t / T), KL = log Σ p e^d = log(1 + Σ p (e^d − 1 − d)),
    where the last bracket is a series of terms in d² for small d.
    """
    z_s, z_t = z_s.double(), z_t.double()
    log_p, log_q = (z_t / T).log_softmax(1), (z_s / T).log_softmax(1)
    p, d = log_p.exp(), (z_s - z_t) / T
    d = d - (p * d).sum(1, keepdim=True)
    series = d.square() / 2 * (1 + d / 3 * (1 + d / 4 * (1 + d / 5 * (1 + d / 6 * (1 + d / 7)))))
    small = d.detach().abs().amax(1) < 0.1
    return T**2 * torch.where(small, (p * series).sum(1).clamp(min=0).log1p(), (p * (log_p - log_q)).sum(1))


def soft_targets(
    z_s: Tensor, z_t: Tensor, T: Positive, *, reduction: Literal["batchmean", "none"] = "batchmean"
) -> Tensor:
    """Compute T² KL(softmax(z_t/T) ‖ softmax(z_s/T)), summed over classes (Hinton et al. 2015, section 2).

    The factor T² keeps the gradient's size when T changes. For T → ∞ this becomes logit matching,
    ‖(z_s − z̄_s) − (z_t − z̄_t)‖² / 2k per example (their equation 4). Logits of less than float32, and T above 100, are
    computed in float64, since T² magnifies the rounding of two logarithms that are almost equal.

    Args:
        z_s: the student's logits (n, k).
        z_t: the teacher's logits (n, k).
        T: temperature, finite and above 0.
        reduction: "batchmean" or "none".

    Returns:
        The mean over the batch, or with "none" one value per example (n,); at least float32.

    Raises:
        ValueError: if T or the reduction is out of range, or the logits are not of one shape (n, k).
    """
    hint = "1e6 differs from the limit by less than float32 shows" if math.inf == T else ""
    T = check_value("T, the temperature,", T, Positive, hint)
    check_value("reduction", reduction, Literal["batchmean", "none"])
    check_same_classes(z_s, z_t)
    dtype = torch.promote_types(torch.promote_types(z_s.dtype, z_t.dtype), torch.float32)
    if T <= PLAIN_UP_TO and z_s.dtype.itemsize >= 4 and z_t.dtype.itemsize >= 4:
        log_q, log_p = (z_s / T).log_softmax(1), (z_t / T).log_softmax(1)
        terms = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1)
        return T**2 * (terms.mean() if reduction == "batchmean" else terms)
    terms = _scaled_divergence(z_s, z_t, T)
    return (terms.mean() if reduction == "batchmean" else terms).to(dtype)


def kd_loss(z_s: Tensor, z_t: Tensor, y: Tensor, *, T: Positive, alpha: Share) -> Tensor:
    """Compute α T² KL(softmax(z_t/T) ‖ softmax(z_s/T)) + (1 − α) CE(z_s, y) (Hinton et al. 2015, section 2).

    Args:
        z_s: the student's logits (n, k).
        z_t: the teacher's logits (n, k).
        y: class numbers (n,).
        T: temperature, finite and above 0.
        alpha: weight of the soft targets in [0, 1]; 0: the labels alone.

    Returns:
        The mean over the batch.

    Raises:
        ValueError: if T or alpha is out of range, the logits are not of one shape, or `y` are no classes of theirs.
    """
    alpha = check_value("alpha", alpha, Share)
    check_same_classes(z_s, z_t, y)
    return alpha * soft_targets(z_s, z_t, T) + (1 - alpha) * F.cross_entropy(z_s, y)


def classic_loss(T: Positive, alpha: Share) -> Callable:
    """Build the loss of classic distillation for `lib.training.train` on (images, labels, teacher's logits).

    Args:
        T: temperature, above 0.
        alpha: weight of the soft targets in [0, 1].

    Returns:
        `loss(student, x, y, z_t, *, generator, epoch) -> (scalar, {})`, that of `kd_loss`.

    Raises:
        ValueError: if T or alpha is out of range.
    """
    check_settings(classic_loss, {"T": T, "alpha": alpha})

    def loss(student: nn.Module, x: Tensor, y: Tensor, z_t: Tensor, *, generator: torch.Generator, epoch: int):
        return kd_loss(student(x), z_t, y, T=T, alpha=alpha), {}

    return loss


def _smoothed_loss(
    student: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator, epoch: int, smoothing: float
) -> tuple[Tensor, dict[str, Any]]:
    z = student(x)
    check_same_classes(z, y=y)
    return F.cross_entropy(z, y, label_smoothing=smoothing), {}


def hard_label_smoothing_loss(smoothing: Share = 0.0) -> Callable:
    """Build the cross-entropy on labels for `lib.training.train` on (images, labels).

    Args:
        smoothing: weight in [0, 1) of the uniform distribution in the targets; 0: hard labels.

    Returns:
        `loss(student, x, y, *, generator, epoch) -> (scalar, {})`.

    Raises:
        ValueError: if the weight is out of range.
    """
    check_settings(hard_label_smoothing_loss, {"smoothing": smoothing})
    return partial(_smoothed_loss, smoothing=smoothing)
