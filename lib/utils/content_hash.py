"""A hash of all that decides how an object behaves, by which what was interrupted finds its own files again.

Weights, settings (private ones too), hooks and states of random generators count, and so does code: that of functions
and of the methods of classes, with the variables and modules that they read. Libraries count by name and version, this
project by name and the hash of its code. An object whose state nobody can read, such as a lock or an open file, is
refused: better nothing is resumed than something else.
"""

import hashlib
import inspect
import platform
import random
import sys
import weakref
from collections.abc import Callable, Iterable
from enum import Enum
from functools import cache, cached_property, lru_cache
from importlib import metadata
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType, MappingProxyType, MethodType, ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lib.utils.code_hash import core_hash
from lib.utils.references import code_names, function_references, own_references

ATOMS = frozenset(
    (bool, int, float, complex, str, bytes, bytearray, range, type(None), type(...), type(NotImplemented))
    + (torch.dtype, torch.device, torch.memory_format, torch.layout)
)
INHERITED = (list, tuple, dict, set, frozenset, str, bytes, bytearray, int, float, complex)  # classes inherit these
TYPE_CHECKERS = ("jaxtyping", "beartype")  # their wrappers change no result
WITHOUT_STATE = ("builtins", "typing", "abc", "collections")  # modules of base classes that add nothing to an object
SHARED = (Tensor, nn.Module, torch.Generator, np.random.Generator, np.random.RandomState, random.Random)


class Unhashable(TypeError):
    """An object whose state cannot be read, so that nothing that depends on it can be resumed; the message names it."""


class Content(NamedTuple):
    """What one object consists of: a kind, bytes of its own, and other objects by name."""

    kind: str
    own: Any = b""
    parts: Iterable[tuple[str, Any]] = ()


@cache
def library_version(module: Any) -> str | None:
    """Return the version of the library, or of Python, that a module's name belongs to; None for all other code."""
    top = module.partition(".")[0] if isinstance(module, str) else "builtins"
    if top == "__main__":  # a script or a notebook, also where a library runs it
        return None
    if top in sys.stdlib_module_names:
        return platform.python_version()
    file = getattr(sys.modules.get(top), "__file__", None)
    if not file or not {"site-packages", "dist-packages"} & set(Path(file).parts):
        return None
    try:
        return str(getattr(sys.modules[top], "__version__", None) or metadata.version(top))
    except metadata.PackageNotFoundError:
        return hashlib.sha256(Path(file).read_bytes()).hexdigest()


def code_version(module: Any) -> str | None:
    """Return what stands for a module's code: a library's version, this project's hash, None for users' own code."""
    parts = str(module).split(".")
    if parts[0] == "lib" and parts[1:2] not in (["report"], ["pipeline"]):  # see `core_hash`
        return core_hash()
    return library_version(module)


def _is_users_module(value: Any) -> bool:
    """Say whether an object is a module that a user edits."""
    return isinstance(value, ModuleType) and code_version(value.__name__) is None


def _by_name(state: dict[str, Any]) -> list[tuple[str, Any]]:
    """Return attributes in an order that does not depend on when they were set."""
    return sorted(state.items())


def _function_content(function: FunctionType) -> Content:
    """Return a function's code, closure, defaults and attributes; of a user's function the variables that it reads."""
    module = function.__globals__.get("__name__") or ""
    if module.partition(".")[0] in TYPE_CHECKERS and hasattr(function, "__wrapped__"):
        return Content("function", parts=[("", function.__wrapped__)])
    version, references = code_version(module), own_references(function)
    if version is None:
        names, references = code_names(function.__code__), function_references(function)
        imported = {k: sys.modules[k] for k in names if _is_users_module(sys.modules.get(k))}
        modules = {k: v for k, v in (imported | references).items() if _is_users_module(v)}
        references |= {f"{k}.{name}": vars(v)[name] for k, v in modules.items() for name in names if name in vars(v)}
    kind = f"function {module}.{function.__qualname__} {version}" if version else "function"
    return Content(kind, parts=[("code", function.__code__), *_by_name(references), *_by_name(vars(function))])


def _code_content(code: CodeType) -> Content:
    """Return what compiled code does; its file and lines do not count."""
    counts = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags)
    names = (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
    parts = [("names", names), ("counts", counts), ("constants", code.co_consts)]
    return Content("code", code.co_code + getattr(code, "co_exceptiontable", b""), parts)


def _class_content(cls: type) -> Content:
    """Return a class by its name, bases and attributes; of a library's class only methods that a user put there."""
    version = code_version(cls.__module__)
    own = {k: v for k, v in vars(cls).items() if not inspect.isdatadescriptor(v) or isinstance(v, property)}
    methods = (FunctionType, staticmethod, classmethod, property)
    own = {k: v for k, v in own.items() if k != "_abc_impl" and (k[:2] != "__" or isinstance(v, methods))}
    bases = [(base.__name__, base) for base in (*cls.__bases__, type(cls)) if base not in (object, type)]
    if library_version(cls.__module__) is not None:
        own = {k: v for k, v in own.items() if isinstance(v, FunctionType) and _is_users_function(v)}
        bases = [(name, base) for name, base in bases if issubclass(cls, nn.Module)]
    return Content(f"class {cls.__module__}.{cls.__qualname__} {version}", parts=[*_by_name(own), *bases])


def _is_users_function(function: FunctionType) -> bool:
    """Say whether a function's code stands neither in a library nor in one that Python generated."""
    module = function.__globals__.get("__name__") or ""
    return code_version(module) is None and not module.startswith("namedtuple_")


def _tensor_content(tensor: Tensor) -> Content:
    """Return a tensor's numbers, shape and type, and the hooks and attributes that it has."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested or tensor.is_meta:
        raise TypeError("its numbers are not those of a dense tensor")
    flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().flatten()
    hooks = [
        list((getattr(tensor, k, None) or {}).values()) for k in ("_backward_hooks", "_post_accumulate_grad_hooks")
    ]
    kind = f"{type(tensor).__qualname__} {tensor.dtype} {tuple(tensor.shape)} {tensor.requires_grad}"
    own = flat.view(torch.uint8).numpy() if flat.numel() else b""
    return Content(kind, own, [("hooks", hooks), *_by_name(vars(tensor))] if any(hooks) or vars(tensor) else ())


def _array_content(array: np.ndarray) -> Content:
    """Return an array's numbers, text or objects, shape and type."""
    kind = f"array {array.dtype.descr if array.dtype.names else array.dtype.str} {array.shape}"
    if array.dtype.hasobject:
        return Content(kind, parts=[("entries", array.tolist())])
    return Content(kind, array.tobytes())


def _network_content(network: nn.Module) -> Content:
    """Return the class and all attributes of a network; hooks by their order, since torch numbers them per process."""
    state = dict(vars(network))
    if "_orig_mod" in state["_modules"]:  # torch.compile's wrapper
        return Content("compiled", parts=[("", state["_modules"]["_orig_mod"])])
    if "_internal_dict" in state:  # diffusers' settings; private ones say where the network came from
        state["_internal_dict"] = {k: v for k, v in state["_internal_dict"].items() if k[:1] != "_"}
    hooks = {k: v for k, v in state.items() if "_hooks" in k and isinstance(v, dict)}
    order = {number: i for i, number in enumerate(sorted({n for entries in hooks.values() for n in entries}))}
    state |= {name: {order[n]: hook for n, hook in entries.items()} for name, entries in hooks.items()}
    first: dict[int, str] = {}
    named = network.named_parameters(remove_duplicate=False)
    tied = [(name, first[id(p)]) for name, p in named if first.setdefault(id(p), name) != name]
    return Content("network", parts=[("class", type(network)), ("tied weights", tied), *_by_name(state)])


def _pickled_content(value: Any) -> Content:
    """Return what pickle would save of an object; an error for what it cannot save."""
    reduced = value.__reduce_ex__(4)
    if isinstance(reduced, str):
        return Content(f"global {getattr(value, '__module__', '')}.{reduced}")
    make, arguments, state, items, pairs = (*reduced, None, None, None)[:5]
    return Content("object", parts=[("", [make, arguments, state, list(items or ()), list(pairs or ())])])


def _object_content(value: Any) -> Content:
    """Return class and attributes of an object, and what it has from a container or a library's class."""
    cls = type(value)
    if isinstance(value, nn.Module) and not isinstance(value, torch.jit.ScriptModule):
        return _network_content(value)
    if library_version(cls.__module__) is not None:
        return _pickled_content(value)
    slots = [slot for base in cls.__mro__ for slot in [vars(base).get("__slots__", ())]]
    names = [name for slot in slots for name in ([slot] if isinstance(slot, str) else slot)]
    state = {k: getattr(value, k) for k in names if k[:2] != "__" and hasattr(value, k)} | getattr(
        value, "__dict__", {}
    )
    parts: list[tuple[str, Any]] = [("class", cls), *_by_name(state)]
    container: Any = next((kind for kind in INHERITED if isinstance(value, kind)), None)
    if container:
        return Content("object", parts=[*parts, ("content", container(value))])
    inherited = {base.__module__.partition(".")[0] for base in cls.__mro__} - {*WITHOUT_STATE, "lib"}
    if any(library_version(module) is not None for module in inherited):
        parts += _pickled_content(value).parts
    return Content("object", parts=parts)


def _imported_content(module: ModuleType) -> Content:
    """Return an imported module by name and version, a user's by the content of its file."""
    version, file = code_version(module.__name__), getattr(module, "__file__", None)
    if version is None and file:
        version = hashlib.sha256(Path(file).read_bytes()).hexdigest()
    own = {} if version else {k: v for k, v in vars(module).items() if k[:2] != "__"}
    return Content(f"module {module.__name__} {version}", parts=_by_name(own))


def _builtin_content(function: Any) -> Content:
    """Return a function in C by its name and the object that it belongs to."""
    owner = getattr(function, "__self__", None)
    parts = [] if owner is None or isinstance(owner, ModuleType | type) else [("self", owner)]
    return Content(f"builtin {function.__module__}.{function.__qualname__}", parts=parts)


# the first type that fits an object says what it consists of
CONTENTS: dict[type | tuple[type, ...], Callable[[Any], Content]] = {
    Tensor: _tensor_content,
    np.ndarray: _array_content,
    np.generic: lambda v: _array_content(np.asarray(v)),
    FunctionType: _function_content,
    CodeType: _code_content,
    ModuleType: _imported_content,
    type: _class_content,
    BuiltinFunctionType: _builtin_content,
    MethodType: lambda v: Content("method", parts=[("", v.__func__), ("self", v.__self__)]),
    (staticmethod, classmethod): lambda v: Content(type(v).__name__, parts=[("", v.__func__)]),
    property: lambda v: Content("property", parts=[("get", v.fget), ("set", v.fset), ("delete", v.fdel)]),
    cached_property: lambda v: Content("cached property", parts=[("", v.func)]),
    type(lru_cache(len)): lambda v: Content("cached function", parts=[("", v.__wrapped__)]),
    MappingProxyType: lambda v: Content("mapping", parts=[("", dict(v))]),
    weakref.ref: lambda v: Content("weak reference", parts=[("", v())]),
    Enum: lambda v: Content("enum", parts=[("class", type(v)), ("name", v.name)]),
    torch.Generator: lambda v: Content(f"generator {v.device}", parts=[("state", v.get_state())]),
    object: _object_content,
}


class Walk:
    """One hash's way through objects: those that contain the present one, so that circles end, and those hashed before.

    `sharing`: whether it counts that two names are one network, tensor or generator, as it does where they change.
    """

    def __init__(self, sharing: bool) -> None:
        self.sharing = sharing
        self.containing: dict[int, int] = {}
        self.numbers: dict[int, int] = {}
        self.known: dict[int, tuple[Any, str]] = {}  # objects, too, so that no other takes their id

    def digest(self, value: Any, name: str) -> str:
        """Return the hash of one object, which messages call `name`."""
        kind, key = type(value), id(value)
        entries: Any = value
        if kind in ATOMS:
            return hashlib.sha256(f"{kind.__name__} {value!r}".encode()).hexdigest()
        if key in self.containing:
            return f"circle of {len(self.containing) - self.containing[key]}"
        if key in self.known:
            return f"the same as {self.numbers[key]}" if key in self.numbers else self.known[key][1]
        if self.sharing and isinstance(value, SHARED):
            self.numbers[key] = len(self.numbers)
        self.containing[key] = len(self.containing)
        if kind in (set, frozenset):
            kind_name, own, inner = (
                kind.__name__,
                b"",
                sorted(self.digest(part, f"an entry of {name}") for part in entries),
            )
        else:
            kind_name, own, parts = self.content(value, name)
            inner = [part for label, each in parts for part in (label, self.digest(each, f"{name}.{label}".strip(".")))]
        sha = hashlib.sha256(f"{kind_name}\0{len(inner)}\0{'/'.join(inner)}\0".encode())
        sha.update(own)
        del self.containing[key]
        self.known[key] = value, sha.hexdigest()
        return sha.hexdigest()

    def content(self, value: Any, name: str) -> Content:
        """Return what an object consists of; Unhashable for one that cannot be read."""
        if type(value) is dict:
            names = [k if type(k) is str else f"entry {i}" for i, k in enumerate(value)]
            return Content("dict", parts=[*zip(names, value.values()), ("keys", list(value))])
        if type(value) in (list, tuple):
            return Content(type(value).__name__, parts=[(str(i), part) for i, part in enumerate(value)])
        try:
            return next(of(value) for kind, of in CONTENTS.items() if isinstance(value, kind))
        except Exception as error:  # whatever an object's own code raises
            raise Unhashable(
                f"expected weights, settings and code, got a {type(value).__qualname__} as {name}, whose state cannot "
                "be hashed: leave it out, or resume nothing (without checkpoint or resume_dir)"
            ) from error


def content_hash(value: Any, name: str = "value", *, sharing: bool = False) -> str:
    """Return a SHA-256 of all that decides how an object behaves; the same in every process.

    Args:
        value: any object, such as a model, or a dict of objects by name.
        name: what messages call it.
        sharing: whether tied weights and other objects that are one count as such everywhere, as for a training.

    Returns:
        64 hexadecimal digits.

    Raises:
        Unhashable: for an object whose state cannot be read, named by the way to it.
    """
    try:
        return Walk(sharing).digest(value, name)
    except RecursionError:
        raise Unhashable(
            f"expected a {name} of objects within each other, got more levels than can be hashed"
        ) from None


def content_id(value: Any, length: int = 16) -> str | None:
    """Return the first digits of an object's hash, for records; None where it cannot be hashed."""
    try:
        return content_hash(value)[:length]
    except Unhashable:
        return None
