"""Backward pass differentiable approximation (Athalye et al. 2018a): exact outputs, another function's gradient."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

ImageMap = Callable[[Tensor], Tensor]


class StraightThrough(torch.autograd.Function):
    """Compute `forward_fn(x)`; differentiate `backward_fn` at the same point instead."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward_fn: ImageMap, backward_fn: ImageMap) -> Tensor:
        ctx.save_for_backward(x)
        ctx.backward_fn = backward_fn
        return forward_fn(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            return torch.autograd.grad(ctx.backward_fn(x), x, grad_outputs)[0], None, None


class ClampStraightThrough(torch.autograd.Function):
    """Cut what leaves [0, 1]; the gradient is that of the identity, so that no pixel is lost to an attack."""

    generate_vmap_rule = True

    @staticmethod
    def forward(y: Tensor) -> Tensor:
        return y.clamp(0, 1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        return grad_outputs[0]


class BPDA(nn.Module):
    """The module that `bpda` returns."""

    def __init__(self, forward_fn: ImageMap, backward_fn: ImageMap) -> None:
        super().__init__()
        self.forward_fn, self.backward_fn = forward_fn, backward_fn

    def forward(self, x: Tensor) -> Tensor:
        return StraightThrough.apply(x, self.forward_fn, self.backward_fn)


def bpda(forward_fn: ImageMap, backward_fn: ImageMap = lambda x: x) -> BPDA:
    """Give a function the gradient of another one (Athalye et al. 2018a, section 4.1).

    For layers without a useful gradient, such as quantisers, JPEG or purifiers: put the result before the classifier in
    `nn.Sequential` and attack that.

    Args:
        forward_fn: maps a tensor to one of any shape, exactly as the defence does.
        backward_fn: a differentiable function of the same shapes, by default the identity.

    Returns:
        A module whose output is `forward_fn(x)` and whose gradient is that of `backward_fn` at x.
    """
    return BPDA(forward_fn, backward_fn)
