"""Mixed precision as a setting of one call: the forward passes of one model, for one block."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from accelerate.utils import convert_to_fp32
from torch import nn

PRECISIONS: dict[str, torch.dtype | None] = {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}


@contextmanager
def autocast_forward(model: nn.Module, device: torch.device, precision: str) -> Iterator[None]:
    """Let the forward passes of `model` compute in `precision` and return float32, for one block; "no" changes nothing.

    Losses stay in float32, as does every call after the block.
    """
    dtype, forward, before = PRECISIONS[precision], model.forward, vars(model).get("forward")
    if dtype is None:
        yield
        return

    @wraps(forward)
    def autocast(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(device.type, dtype):
            out = convert_to_fp32(forward(*args, **kwargs))
        torch.clear_autocast_cache()  # within a caller's context the weights of this step would be those of the next
        return out

    model.forward = autocast
    try:
        yield
    finally:
        del model.forward  # the class's own is back, or the one that the model had
        if before is not None:
            model.forward = before
