"""Random states and train/eval flags: set for one block, restored afterwards."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lib.utils.seeds import derive_seed, seeded_generator


@contextmanager
def attack_mode(student: nn.Module, mode: str) -> Iterator[None]:
    """Sets the student's mode for the inner maximum; afterwards flags, buffers and running statistics are as before.

    "eval": normalisation by running statistics, no dropout, as TRADES does; "train": by those of the attacked batch.
    """
    flags = [(m, m.training) for m in student.modules()]
    kept = [(b, b.clone()) for b in student.buffers()] if mode == "train" else []
    student.train(mode == "train")
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag
        with torch.no_grad():
            for buffer, before in kept:
                buffer.copy_(before)


@contextmanager
def isolated_rng(model: Any, seed: int, device: torch.device, mode: str = "eval") -> Iterator[None]:
    """Seeds a forked global random state and sets eval mode; restores state, every module's flag and `param.grad`."""
    module = model if isinstance(model, nn.Module) else nn.Module()
    flags = [(m, m.training) for m in module.modules()]
    grads = [(p, p.grad) for p in module.parameters()]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
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
            for m, flag in flags:
                m.training = flag
            for p, grad in grads:
                p.grad = grad


@contextmanager
def seeded_noise(model: Any, seed: int, device: torch.device, mode: str = "eval") -> Iterator[None]:
    """Gives a stochastic model's noise a stream of its own and restores random states and train/eval flags afterwards.

    Covered are the global generators and every `torch.Generator` that a module holds as its attribute `generator`.
    """
    found = [getattr(m, "generator", None) for m in (model.modules() if isinstance(model, nn.Module) else [model])]
    held = {id(g): (g, g.get_state()) for g in found if isinstance(g, torch.Generator)}
    with isolated_rng(model, seed, device, mode):
        try:
            for i, (g, _) in enumerate(held.values()):
                g.manual_seed(derive_seed(seed, f"held/{i}"))
            yield
        finally:
            for g, state in held.values():
                g.set_state(state)


RandnLike = Callable[[Tensor], Tensor]  # standard normal noise that looks like a tensor: shape, dtype, device


def randn_like(generator: torch.Generator | None = None) -> RandnLike:
    """Returns a source of standard normal noise that draws from `generator`, or from the global state when None.

    Args:
        generator: on the device of the tensors that it will be asked for.

    Returns:
        A function of a tensor that returns independent N(0, 1) noise of its shape, dtype and device.
    """
    return lambda like: torch.randn(like.shape, generator=generator, device=like.device, dtype=like.dtype)


def shared_randn_like(seed: int) -> RandnLike:
    """Returns a source of noise that is the same for all images of a batch, whatever the batch, device and precision.

    A random defence with it is a fixed function of the image. Asked anew, the source begins anew.

    Args:
        seed: decides the noise; it is drawn on the CPU.

    Returns:
        A function of a tensor n c h w; its k-th call returns the k-th noise 1 c h w, expanded over n.
    """
    rng = seeded_generator(seed, "same noise")
    return lambda like: torch.randn(1, *like.shape[1:], generator=rng).to(like).expand(like.shape)
