"""Defensive distillation (Papernot et al. 2016): teacher and student trained at one temperature."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lib.distillation.soft_targets import check_same_classes
from lib.models import predict_logits
from lib.training import train
from lib.utils.validation import Positive, check_settings


def temperature_loss(T: Positive) -> Callable:
    """Build the cross-entropy of softmax(z / T) for `lib.training.train` on (images, targets).

    Args:
        T: temperature that divides the logits, finite and above 0.

    Returns:
        `loss(model, x, target, *, generator, epoch) -> (scalar, {})`; targets are class numbers (n,) or
        probabilities (n, k).

    Raises:
        ValueError: if T is out of range.
    """
    check_settings(temperature_loss, {"T": T})

    def loss(model: nn.Module, x: Tensor, target: Tensor, *, generator: torch.Generator, epoch: int):
        z = model(x)
        check_same_classes(z, *((target,) if target.is_floating_point() else (None, target)))
        return F.cross_entropy(z / T, target), {}

    return loss


def defensive_distillation(
    model: nn.Module, tensors: tuple[Tensor, ...], *, T: float = 100.0, **options: Any
) -> nn.Module:
    """Train a network by defensive distillation (Papernot et al. 2016, section IV).

    Two copies of `model` are trained at temperature T: the teacher on the labels, the student on the teacher's
    softmax(z / T) alone.

    Args:
        model: the untrained network; it is not changed.
        tensors: images (n, c, h, w) in [0, 1] and class numbers (n,).
        T: temperature of both trainings.
        options: those of `lib.training.train`.

    Returns:
        The student, in eval mode; it is used at T = 1.
    """
    x, y = tensors
    teacher, student = copy.deepcopy(model), copy.deepcopy(model)
    first: dict[str, Any] = {"name": "teacher"} | options
    second: dict[str, Any] = {"name": "student"} | options
    train(teacher, temperature_loss(T), (x, y), **first)
    soft = (predict_logits(teacher, x) / T).softmax(1).to(x.device)
    train(student, temperature_loss(T), (x, soft), **second)
    return student.eval()
