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
    """Returns the cross-entropy of softmax(z / T), against class numbers or probabilities, as a loss for `train`."""

    def loss(model: nn.Module, x: Tensor, target: Tensor, *, generator: torch.Generator, epoch: int):
        return F.cross_entropy(model(x) / T, target), {}

    return loss


def defensive_distillation(
    model: nn.Module, tensors: tuple[Tensor, Tensor], *, T: float = 100.0, **options: Any
) -> nn.Module:
    """Returns the student of defensive distillation, to be used at T = 1 (Papernot et al. 2016, section IV).

    Two copies of the untrained `model` are trained at temperature T: the teacher on the labels, the student on nothing
    but the teacher's softmax(z / T). `options`: those of `train`.
    """
    x, y = tensors
    teacher, student = copy.deepcopy(model), copy.deepcopy(model)
    train(teacher, temperature_loss(T), (x, y), **{"name": "teacher"} | options)
    soft = (predict_logits(teacher, x) / T).softmax(1).to(x.device)
    train(student, temperature_loss(T), (x, soft), **{"name": "student"} | options)
    return student.eval()
