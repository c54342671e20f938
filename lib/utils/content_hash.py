"""A hash of what decides how an object behaves, by which an interrupted evaluation finds its checkpoints again."""

import hashlib
from functools import partial
from types import CodeType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor


def content_hash(
    value: Any, within: frozenset[int] = frozenset(), known: dict[int, tuple[Any, str]] | None = None
) -> str:
    """Return a SHA-256 of what decides an object's behaviour: weights, buffers, settings, code; not random states.

    `within`: the objects that contain this one, so that circles end; `known`: those hashed before, referenced so that
    no other object takes their id.
    """
    known = {} if known is None else known
    if isinstance(value, torch.Generator) or id(value) in within:
        return ""
    if id(value) in known:
        return known[id(value)][1]
    own, inner = b"", [type(value).__module__, type(value).__qualname__]
    if value is None or isinstance(value, bool | int | float | str | bytes | torch.dtype | torch.device):
        own, inner = f"{type(value).__name__} {value!r}".encode(), []
    elif isinstance(value, Tensor | np.ndarray):
        flat = torch.as_tensor(value).detach().cpu().contiguous().flatten()
        own, inner = flat.view(torch.uint8).numpy().tobytes(), [str(flat.dtype), list(value.shape)]
    elif isinstance(value, CodeType):
        inner += [value.co_code, value.co_names, value.co_consts]
    elif isinstance(value, FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        inner += [value.__qualname__, value.__code__, value.__defaults__, value.__kwdefaults__, cells]
    elif isinstance(value, dict):
        inner += [part for pair in value.items() for part in pair]
    elif isinstance(value, list | tuple):
        inner += value
    elif isinstance(value, partial | MethodType):
        inner += value.__reduce__()[1:]
    else:  # a module's hooks and other private attributes are left out
        state, registered = getattr(value, "__dict__", {}), ("_parameters", "_buffers", "_modules")
        inner += [
            getattr(value, "__qualname__", ""),
            {k: v for k, v in state.items() if k in registered or k[0] != "_"},
        ]
    within |= {id(value)}
    out = hashlib.sha256(own + "/".join(content_hash(part, within, known) for part in inner).encode()).hexdigest()
    known[id(value)] = value, out
    return out
