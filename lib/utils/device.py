"""Where networks are trained and evaluated: a CUDA GPU where there is one, else the CPU."""

from collections.abc import Callable
from typing import cast

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from torch import Tensor, nn

from lib.utils.references import reachable_modules


def use_gpu() -> bool:
    """Return whether experiments run on a CUDA GPU: if there is one, unless `ACCELERATE_USE_CPU=true`."""
    return torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")


def default_device() -> torch.device:
    """Return the device of training and evaluation: the GPU, else the CPU.

    Other accelerators are not used: Apple's has no float64.
    """
    return cast(torch.device, PartialState(cpu=not use_gpu()).device)


def to_model_device(model: Callable, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Return tensors, such as images and labels, on the device of a model's weights; without weights unchanged.

    Where a model has none of its own, as a function that calls a network, they are those of what it refers to.
    """
    own = [] if not isinstance(model, nn.Module) else [model]
    device = next((w.device for m in own for w in m.parameters()), None)
    if device is None:
        device = next((w.device for m in reachable_modules(model) for w in m.parameters(recurse=False)), None)
    return tuple(t.to(device) if device else t for t in tensors)
