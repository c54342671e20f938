"""Random states, train/eval flags, buffers and gradients: set for one block, restored afterwards.

A model is any callable: its networks and generators are all that it refers to (`lib.utils.references`).
"""

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lib.utils.references import reachable, reachable_modules, shared_walks
from lib.utils.seeds import derive_seed, seeded_generator

NUMPY_GLOBAL: np.random.RandomState = np.random.mtrand._rand
PYTHON_GLOBAL: random.Random = random._inst  # type: ignore[attr-defined]
NUMPY_SOURCES = (np.random.Generator, np.random.RandomState, np.random.BitGenerator)


@contextmanager
def restored_flags(model: Any) -> Iterator[None]:
    """Restore the train/eval flag of every network of a model after the block, also when it fails."""
    flags = [(module, module.training) for module in reachable_modules(model)]
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag


@contextmanager
def restored_networks(model: Any, mode: str = "keep") -> Iterator[None]:
    """Restore all that passes through a model's networks may change, also when the block fails.

    Restored are train/eval flags, buffers, such as running statistics, and `param.grad`, which is None in the block.

    Args:
        model: any callable.
        mode: "eval" puts all of its networks in eval mode, "keep" leaves their flags as they are.
    """
    modules = reachable_modules(model)
    registered = ((m, name, b) for m in modules for name, b in m._buffers.items() if b is not None)
    buffers = [(m, name, b, None if is_lazy(b) else b.detach().clone()) for m, name, b in registered]
    weights = [p for m in modules for p in m._parameters.values() if p is not None]
    grads = [(p, p.grad) for p in weights]
    with restored_flags(model):
        try:
            for p in weights:
                p.grad = None
            for module in modules if mode == "eval" else ():
                if module.training:
                    module.eval()
            yield
        finally:
            for p, grad in grads:
                p.grad = grad
            for module, name, buffer, copy in buffers:
                module._buffers[name] = buffer
                if copy is not None and not torch.equal(buffer, copy):
                    with torch.no_grad():
                        buffer.copy_(copy)


@contextmanager
def attack_mode(student: nn.Module, mode: str) -> Iterator[None]:
    """Set the student's mode for the inner maximum; restore flags, buffers and running statistics afterwards.

    "eval": normalisation by running statistics, no dropout, as TRADES does; "train": by those of the attacked batch.
    """
    with restored_networks(student):
        student.train(mode == "train")
        yield


def _held_generators(model: Any, reached: list[Any]) -> list[Any]:
    """Return the generators of torch, numpy and Python that a model refers to, each once; no global ones.

    Those that modules have as their attribute `generator` come first.
    """
    modules = model.modules() if isinstance(model, nn.Module) else [model]
    named = [g for g in (getattr(m, "generator", None) for m in modules) if isinstance(g, torch.Generator)]
    shared = {id(g) for g in (torch.default_generator, *torch.cuda.default_generators, NUMPY_GLOBAL, PYTHON_GLOBAL)}
    kinds = (torch.Generator, *NUMPY_SOURCES, random.Random)
    others = [g for g in reached if isinstance(g, kinds) and not isinstance(g, random.SystemRandom)]
    return list({id(g): g for g in [*named, *(g for g in others if id(g) not in shared)]}.values())


def _state(source: Any) -> Any:
    """Return a generator's state."""
    if isinstance(source, np.random.Generator):
        source = source.bit_generator
    if isinstance(source, np.random.RandomState):
        return source.get_state(legacy=False)
    if isinstance(source, random.Random):
        return source.getstate()
    return source.get_state() if isinstance(source, torch.Generator) else source.state  # of numpy's bit generators


def _set_state(source: Any, state: Any) -> None:
    """Set a generator's state."""
    if isinstance(source, np.random.Generator):
        source = source.bit_generator
    if isinstance(source, np.random.BitGenerator):
        source.state = state
    elif isinstance(source, random.Random):
        source.setstate(state)
    else:
        source.set_state(state)


def _seed(source: Any, seed: int) -> None:
    """Seed a generator of any library."""
    if source is NUMPY_GLOBAL and isinstance(source._bit_generator, np.random.MT19937):
        source.seed(seed % 2**32)  # eight times as fast as a new generator
    elif isinstance(source, NUMPY_SOURCES):
        bits: Any = getattr(source, "bit_generator", getattr(source, "_bit_generator", source))
        _set_state(source, type(bits)(seed).state)
    elif isinstance(source, random.Random):
        source.seed(seed)
    else:
        source.manual_seed(seed)


def _same_state(a: Any, b: Any) -> bool:
    """Say whether two states of a generator are equal."""
    if isinstance(a, dict):
        return all(_same_state(a[key], b[key]) for key in a)
    return bool(np.array_equal(a, b)) if isinstance(a, Tensor | np.ndarray) else a == b


@contextmanager
def forked_noise(model: Any, seed: int, device: torch.device) -> Iterator[Callable[[], bool]]:
    """Seed every source of noise that a model can reach for the block, and restore their states afterwards.

    Covered are the global states of torch, on the CPU and on the CUDA devices of the images and of the model's weights,
    of numpy and of `random`, and all generators that the model refers to, by whatever name. Out of reach is noise from
    generators that the model creates in its call, from the system and the clock: see `unseeded_noise`.

    Args:
        model: any callable.
        seed: decides all of it.
        device: of the images.

    Returns:
        The context of the block: a function that says whether noise was drawn, that is, one of these states has moved;
        not that of `random`, which checks of types move, too.
    """
    reached = reachable(model)
    places = {device, *(v.device for v in reached if isinstance(v, nn.Parameter))}
    cuda = sorted({torch.device(d).index or 0 for d in places if d.type == "cuda"})
    held = _held_generators(model, reached)
    seeds = [derive_seed(seed, purpose) for purpose in ("numpy", "python", *(f"held/{i}" for i in range(len(held))))]
    sources = [NUMPY_GLOBAL, PYTHON_GLOBAL, *held]
    before = [_state(source) for source in sources]

    def states() -> list[Any]:
        return [
            torch.get_rng_state(),
            *(torch.cuda.get_rng_state(k) for k in cuda),
            *map(_state, [NUMPY_GLOBAL, *held]),
        ]

    with torch.random.fork_rng(devices=cuda):
        torch.default_generator.manual_seed(seed)
        for k in cuda:
            with torch.cuda.device(k):
                torch.cuda.manual_seed(seed)
        try:
            for source, own_seed in zip(sources, seeds, strict=True):
                _seed(source, own_seed)
            begin = states()
            yield lambda: not all(map(_same_state, begin, states()))
        finally:
            for source, state in zip(sources, before, strict=True):
                _set_state(source, state)


@contextmanager
def seeded_noise(model: Any, seed: int, device: torch.device, mode: str = "eval") -> Iterator[None]:
    """Seed a model's noise for the block, as far as it can be reached; leave no trace of the block in the model.

    Args:
        model: any callable.
        seed: decides its noise, see `forked_noise`.
        device: of the images.
        mode: "eval", or "keep" for the model's own train/eval flags, see `restored_networks`.
    """
    with ExitStack() as stack:
        with shared_walks():
            stack.enter_context(forked_noise(model, seed, device))
            stack.enter_context(restored_networks(model, mode))
        yield


@torch.no_grad()
def unseeded_noise(model: Callable[[Tensor], Tensor], x: Tensor, seed: int = 0, mode: str = "eval") -> bool:
    """Say whether a model's answers to the same images under the same seed differ.

    Then its noise is out of reach of `seeded_noise`, and no evaluation of it repeats.

    Args:
        model: a function of images, with an answer of any shape.
        x: images (n, c, h, w); a few suffice.
        seed: of the noise that can be seeded.
        mode: "eval" or "keep", as in `seeded_noise`.

    Returns:
        Whether two answers differ by more than rounding; NaN equals NaN.
    """
    answers = []
    for _ in range(2):
        with seeded_noise(model, seed, x.device, mode):
            answers.append(model(x.clone()).detach())
    a, b = (answer.float() if answer.dtype in (torch.float16, torch.bfloat16) else answer for answer in answers)
    if a.shape != b.shape or not a.is_floating_point():
        return not torch.equal(a, b)
    scale = a.nan_to_num(0, 0, 0).abs().amax() if a.numel() else 0
    tolerance = float(16 * torch.finfo(answers[0].dtype).eps * scale)
    return not torch.allclose(a, b, rtol=0, atol=tolerance, equal_nan=True)


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
