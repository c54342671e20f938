"""Backward pass differentiable approximation (Athalye et al. 2018): exact forward pass, another function's gradient."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

ImageMap = Callable[[Tensor], Tensor]


class StraightThrough(torch.autograd.Function):
    """Computes `there(x)`; differentiates `back` at the same point instead."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, there: ImageMap, back: ImageMap) -> Tensor:
        ctx.save_for_backward(x)
        ctx.back = back
        return there(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            return torch.autograd.grad(ctx.back(x), x, grad)[0], None, None


class BPDA(nn.Module):
    """The module that `bpda` returns."""

    def __init__(self, forward_fn: ImageMap, backward_fn: ImageMap) -> None:
        super().__init__()
        self.there, self.back = forward_fn, backward_fn

    def forward(self, x: Tensor) -> Tensor:
        return StraightThrough.apply(x, self.there, self.back)


def bpda(forward_fn: ImageMap, backward_fn: ImageMap = lambda x: x) -> BPDA:
    """Returns a module that answers `forward_fn(x)` exactly but has the gradient of `backward_fn`, by default x itself.

    Backward pass differentiable approximation (Athalye et al. 2018), for quantisers, JPEG, purifiers: put it before the
    classifier in `nn.Sequential`. Both functions map to tensors of one shape.
    """
    return BPDA(forward_fn, backward_fn)
