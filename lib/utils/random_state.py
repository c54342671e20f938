"""Random states and train/eval flags: set for one block, restored afterwards."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lib.utils.seeds import derive_seed, seeded_generator


@contextmanager
def restored_flags(model: nn.Module) -> Iterator[None]:
    """Restore the train/eval flag of every module after the block, also when it fails."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag


@contextmanager
def attack_mode(student: nn.Module, mode: str) -> Iterator[None]:
    """Set the student's mode for the inner maximum; restore flags, buffers and running statistics afterwards.

    "eval": normalisation by running statistics, no dropout, as TRADES does; "train": by those of the attacked batch.
    """
    buffers = [(b, b.clone()) for b in student.buffers()] if mode == "train" else []
    with restored_flags(student):
        student.train(mode == "train")
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)


@contextmanager
def isolated_rng(model: Any, seed: int, device: torch.device, mode: str = "eval") -> Iterator[None]:
    """Seed a forked global random state and set eval mode; restore state, flags and `param.grad` afterwards."""
    module = model if isinstance(model, nn.Module) else nn.Module()
    grads = [(p, p.grad) for p in module.parameters()]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), restored_flags(module):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        try:
            if mode == "eval":
                module.eval()
            for p, _ in grads:
                p.grad = None
            yield
        finally:
            for p, grad in grads:
                p.grad = grad


@contextmanager
def seeded_noise(model: Any, seed: int, device: torch.device, mode: str = "eval") -> Iterator[None]:
    """Seed a random model's noise for the block; restore random states, train/eval flags and gradients afterwards.

    Covered are the global generators and every `torch.Generator` that a module has as its attribute `generator`.
    """
    modules = model.modules() if isinstance(model, nn.Module) else [model]
    own = [g for g in (getattr(m, "generator", None) for m in modules) if isinstance(g, torch.Generator)]
    states = {id(g): (g, g.get_state()) for g in own}
    with isolated_rng(model, seed, device, mode):
        try:
            for i, (g, _) in enumerate(states.values()):
                g.manual_seed(derive_seed(seed, f"held/{i}"))
            yield
        finally:
            for g, state in states.values():
                g.set_state(state)


RandnLike = Callable[[Tensor], Tensor]  # standard normal noise that looks like a tensor: shape, dtype, device


def randn_like(generator: torch.Generator | None = None) -> RandnLike:
    """Return a source of standard normal noise that draws from `generator`, or from the global state when None.

    Args:
        generator: on the device of the tensors that the source is called with.

    Returns:
        A function of a tensor that returns independent N(0, 1) noise of its shape, dtype and device.
    """
    return lambda like: torch.randn(like.shape, generator=generator, device=like.device, dtype=like.dtype)


def shared_randn_like(seed: int) -> RandnLike:
    """Return a source of noise that is the same for all images of a batch, whatever the batch, device and precision.

    A random defence with it is a fixed function of the image. Each source starts anew.

    Args:
        seed: decides the noise, which is drawn on the CPU.

    Returns:
        A function of a tensor (n, c, h, w); its k-th call returns the k-th noise (1, c, h, w), expanded over n.
    """
    rng = seeded_generator(seed, "same noise")
    return lambda like: torch.randn(1, *like.shape[1:], generator=rng).to(like).expand(like.shape)
