"""Where networks are trained and evaluated: a CUDA GPU where there is one, else the CPU."""

from collections.abc import Callable
from typing import cast

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from torch import Tensor, nn


def use_gpu() -> bool:
    """Return whether experiments run on a CUDA GPU: if there is one, unless `ACCELERATE_USE_CPU=true`."""
    return torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")


def default_device() -> torch.device:
    """Return the device of training and evaluation: the GPU, else the CPU.

    Other accelerators are not used: Apple's has no float64.
    """
    return cast(torch.device, PartialState(cpu=not use_gpu()).device)


def to_model_device(model: Callable, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Return tensors, such as images and labels, on the device of a network's weights; without weights unchanged."""
    weights = model.parameters() if isinstance(model, nn.Module) else ()
    device = next((w.device for w in weights), None)
    return tuple(t.to(device) if device else t for t in tensors)
