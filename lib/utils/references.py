"""What a model refers to: a function's closure and globals, a wrapper's attributes, and the networks among them.

Evaluations take any callable for a model: `lambda x: net(normalise(x))` has a network with weights, running statistics
and noise, as an `nn.Module` has.
"""

import dis
import sys
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn

LIBRARIES = frozenset((*sys.stdlib_module_names, "torch", "numpy", "scipy", "diffusers", "pandas")) - {"__main__"}
CONTAINERS = (list, tuple, set, frozenset)


def is_library(value: Any) -> bool:
    """Say whether a function or class belongs to Python, torch or another library that no user edits."""
    return (getattr(value, "__module__", None) or "").partition(".")[0] in LIBRARIES


def _codes(code: CodeType) -> Iterator[CodeType]:
    """Yield code and the code of the functions and classes defined in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


@lru_cache(maxsize=10_000)
def _global_names(code: CodeType) -> tuple[str, ...]:
    """Return the names of global variables that code and the functions defined in it look up."""
    steps = (step for part in _codes(code) for step in dis.get_instructions(part))
    return tuple(dict.fromkeys(step.argval for step in steps if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")))


def code_names(code: CodeType) -> tuple[str, ...]:
    """Return all names in code and in the functions defined in it: of variables, attributes and imported modules."""
    return tuple(dict.fromkeys(name for part in _codes(code) for name in part.co_names))


def own_references(function: FunctionType) -> dict[str, Any]:
    """Return what belongs to a function itself, by name: variables of its closure and defaults."""
    out = {f"default {i}": value for i, value in enumerate(function.__defaults__ or ())}
    out |= {f"default {name}": value for name, value in (function.__kwdefaults__ or {}).items()}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or ()):
        try:
            out[name] = cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    return out


def function_references(function: FunctionType) -> dict[str, Any]:
    """Return what a function's code refers to by name: variables of its closure, globals that it reads, defaults."""
    names = [name for name in _global_names(function.__code__) if name in function.__globals__]
    return {name: function.__globals__[name] for name in names} | own_references(function)


def _parts(value: Any) -> list[Any]:
    """Return the objects that one object refers to, as far as a network may be among them."""
    if isinstance(value, FunctionType):
        own = not is_library(value)
        return [*function_references(value).values(), getattr(value, "__wrapped__", None)] if own else []
    if isinstance(value, MethodType):
        return [value.__self__, value.__func__]
    if isinstance(value, partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, CONTAINERS):
        return list(value)
    if isinstance(value, nn.Module):
        return [part for module in value.modules() for part in vars(module).values()] + [type(value).forward]
    if isinstance(value, Tensor | ModuleType | type) or is_library(type(value)):
        return []
    return [*getattr(value, "__dict__", {}).values(), vars(type(value)).get("__call__")]


def reachable(model: Callable) -> list[Any]:
    """Return a model and all objects that it refers to, directly or not, each once.

    Libraries' own functions and objects, imported modules, classes and tensors are not looked into.
    """
    todo, seen = [model], {}
    while todo:
        value = todo.pop()
        if id(value) not in seen and not isinstance(value, str | bytes | int | float | complex | None):
            seen[id(value)] = value
            todo += reversed(_parts(value))
    return list(seen.values())


def reachable_modules(model: Callable) -> list[nn.Module]:
    """Return every network that a model consists of or refers to, with all their submodules, each once."""
    roots = [value for value in reachable(model) if isinstance(value, nn.Module)]
    return list({id(m): m for root in roots for m in root.modules()}.values())
