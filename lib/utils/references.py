"""What a model refers to: a function's closure and globals, a wrapper's attributes, and the networks among them.

Evaluations take any callable for a model: `lambda x: net(normalise(x))` has a network with weights, running statistics
and noise, as an `nn.Module` has.
"""

import dis
import sys
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, lru_cache, partial
from pathlib import Path
from types import CodeType, FunctionType, MemberDescriptorType, MethodType, ModuleType, SimpleNamespace
from typing import Any

from torch import Tensor, nn

LIBRARIES = frozenset((*sys.stdlib_module_names, "torch", "numpy", "scipy", "diffusers", "pandas")) - {"__main__"}
CONTAINERS = (list, tuple, set, frozenset, deque)
EMPTY = (dict, OrderedDict, list, tuple, set, type(None))
INNER = ("__self__", "__wrapped__", "fget")  # of built-in methods, caches and static methods, properties
PLAIN_VALUES = (str, bytes, int, float, complex, type(None), Tensor, ModuleType)


def is_library(value: Any) -> bool:
    """Say whether a function or class belongs to Python, torch or another library that no user edits."""
    return (getattr(value, "__module__", None) or "").partition(".")[0] in LIBRARIES


@cache
def _is_installed(package: str) -> bool:
    """Say whether a package is this one or lies among installed ones: its code and globals are not looked into."""
    if package == __name__.partition(".")[0]:
        return True
    module = sys.modules.get(package)
    places = [getattr(module, "__file__", None) or "", *map(str, getattr(module, "__path__", ()))]
    return any(part in Path(place).parts for place in places for part in ("site-packages", "dist-packages"))


def _is_users(value: Any) -> bool:
    """Say whether a function or class was written by a user, in no library and no installed package."""
    return not (is_library(value) or _is_installed((getattr(value, "__module__", None) or "").partition(".")[0]))


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


def _function_parts(function: FunctionType) -> list[Any]:
    """Return what a user's function refers to; of a user's module that it imports, what it may look up there."""
    if not _is_users(function):
        own = [] if is_library(function) else own_references(function).values()
        return [*own, getattr(function, "__wrapped__", None)]
    values = list(function_references(function).values())
    modules = [v for v in values if isinstance(v, ModuleType) and _is_users(SimpleNamespace(__module__=v.__name__))]
    names = code_names(function.__code__) if modules else ()
    looked_up = [vars(module)[name] for module in modules for name in names if name in vars(module)]
    return [*values, *looked_up, *vars(function).values()]


def _class_parts(classes: Sequence[type]) -> list[Any]:
    """Return the attributes of classes, methods among them, that a user wrote."""
    return [value for c in classes if _is_users(c) for value in vars(c).values()]


def _object_parts(value: Any) -> list[Any]:
    """Return the attributes of an object, its slots among them, and those of its classes."""
    inherited = _class_parts(type(value).__mro__)
    slots = [v.__get__(value) for v in inherited if isinstance(v, MemberDescriptorType) and hasattr(value, v.__name__)]
    return [*getattr(value, "__dict__", {}).values(), *slots, *inherited]


def _parts(value: Any) -> list[Any]:
    """Return the objects that one object refers to, as far as a network or a generator may be among them."""
    if isinstance(value, FunctionType):
        return _function_parts(value)
    if isinstance(value, MethodType):
        return [value.__self__, value.__func__]
    if isinstance(value, partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, CONTAINERS):
        return list(value)
    if isinstance(value, type):
        return _class_parts(value.__mro__)
    if isinstance(value, nn.Module | SimpleNamespace) or not is_library(type(value)):
        return _object_parts(value)
    return [getattr(value, name, None) for name in INNER]


_WALKS: ContextVar[dict[int, tuple[Any, list[Any]]] | None] = ContextVar("walks", default=None)


@contextmanager
def shared_walks() -> Iterator[None]:
    """Walk through each model once within the block, in which no model may change."""
    token = _WALKS.set({})
    try:
        yield
    finally:
        _WALKS.reset(token)


def _walk(model: Any) -> list[Any]:
    """Return what `reachable` does, by a walk."""
    todo, seen = [model], {}
    while todo:
        value = todo.pop()
        if type(value) in EMPTY and not value:  # most of what a module holds: hooks that it has none of
            continue
        if id(value) not in seen:
            seen[id(value)] = value
            if not isinstance(value, PLAIN_VALUES):
                todo += reversed(_parts(value))
    return [value for value in seen.values() if not isinstance(value, str | bytes | int | float | complex | None)]


def reachable(model: Any) -> list[Any]:
    """Return a model and all objects that it refers to, directly or not, each once.

    Numbers, text, libraries' own functions and objects, imported libraries and tensors are not looked into.
    """
    walks = _WALKS.get()
    if walks is None:
        return _walk(model)
    if id(model) not in walks:
        walks[id(model)] = model, _walk(model)
    return walks[id(model)][1]


def reachable_modules(model: Any) -> list[nn.Module]:
    """Return every network that a model consists of or refers to, with all their submodules, each once."""
    return [value for value in reachable(model) if isinstance(value, nn.Module)]
