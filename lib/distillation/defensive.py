"""Defensive distillation (Papernot et al. 2016): teacher and student trained at one temperature."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lib.models import predict_logits
from lib.training import train


def temperature_loss(T: float) -> Callable:
    """Build the cross-entropy of softmax(z / T) for `lib.training.train` on (images, targets).

    Args:
        T: temperature that divides the logits.

    Returns:
        `loss(model, x, target, *, generator, epoch) -> (scalar, {})`; targets are class numbers (n,) or
        probabilities (n, k).
    """

    def loss(model: nn.Module, x: Tensor, target: Tensor, *, generator: torch.Generator, epoch: int):
        return F.cross_entropy(model(x) / T, target), {}

    return loss


def defensive_distillation(
    model: nn.Module, tensors: tuple[Tensor, Tensor], *, T: float = 100.0, **options: Any
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
    train(teacher, temperature_loss(T), (x, y), **{"name": "teacher"} | options)
    soft = (predict_logits(teacher, x) / T).softmax(1).to(x.device)
    train(student, temperature_loss(T), (x, soft), **{"name": "student"} | options)
    return student.eval()
