"""Types of settings with their ranges, and the one check of values against them, before any work (pydantic).

A setting's type stands once, in the signature or the dataclass that it belongs to: `steps: PositiveInt = 20`. Checks
read it there. Numbers of numpy and one-element tensors pass as numbers; text, booleans and NaN do not.
"""

import numbers
import operator
import types
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from functools import cache, partial
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import annotated_types
from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

TYPE_CHECKS = ConfigDict(strict=True, arbitrary_types_allowed=True)


def _is_truth(value: Any) -> bool:
    """Say whether a value is a boolean, of Python, numpy or torch."""
    return isinstance(value, bool) or "bool" in str(getattr(value, "dtype", ""))


def _as_int(value: Any) -> Any:
    """Return a whole number of any library as an int, another value as it is, which the strict check then refuses."""
    return operator.index(value) if hasattr(value, "__index__") and not _is_truth(value) else value


def _as_float(value: Any) -> Any:
    """Return a real number of any library, or a one-element tensor, as a float, -0 as 0; another value as it is."""
    single = getattr(value, "shape", None) == () or isinstance(value, numbers.Real)
    return float(value) + 0.0 if single and not _is_truth(value) and not isinstance(value, complex) else value


Integer = Annotated[int, BeforeValidator(_as_int)]
PositiveInt = Annotated[Integer, Field(ge=1)]
NonNegativeInt = Annotated[Integer, Field(ge=0)]
Number = Annotated[float, BeforeValidator(_as_float), Field(allow_inf_nan=False)]
Positive = Annotated[Number, Field(gt=0)]
NonNegative = Annotated[Number, Field(ge=0)]
Share = Annotated[Number, Field(ge=0, le=1)]
BelowOne = Annotated[NonNegative, Field(lt=1)]  # such as momentum, decay of an average, rate of dropout
PositiveShare = Annotated[Number, Field(gt=0, le=1)]
Name = Annotated[  # of what becomes a file or a folder
    str,
    Field(
        pattern="^[A-Za-z0-9_][A-Za-z0-9_-]{0,63}$",
        description="a name of up to 64 letters, digits, - and _, the first no -",
    ),
]
SYMBOLS = {
    annotated_types.Ge: "ge >=",
    annotated_types.Gt: "gt >",
    annotated_types.Le: "le <=",
    annotated_types.Lt: "lt <",
}
PLAIN = {int: "an integer", float: "a finite number", bool: "True or False", str: "text", type(None): "None"}


class BadSetting(ValueError):
    """A setting of another type or out of its range; the message names it, what was expected and the value."""


def _bounds(metadata: list) -> list[str]:
    """Return the bounds among an annotation's metadata as text, such as ">= 1"."""
    parts = [part for item in metadata for part in (getattr(item, "metadata", None) or [item])]
    symbols = ((SYMBOLS[type(part)].split(), part) for part in parts if type(part) in SYMBOLS)
    return [f"{symbol} {getattr(part, name)}" for (name, symbol), part in symbols]


def describe_type(annotation: Any) -> str:
    """Return a type in words, such as "an integer >= 1" or "one of 'ce', 'dlr'"; its own description if it has one."""
    origin: Any = get_origin(annotation)
    arguments: list[Any] = list(get_args(annotation))
    if origin is Annotated:
        if words := [text for part in arguments[1:] if (text := getattr(part, "description", None))]:
            return words[-1]
        text, bounds = describe_type(arguments[0]), _bounds(arguments[1:])
        return f"{text} {' and '.join(bounds)}" if bounds else text
    if origin is Literal:
        return f"one of {', '.join(map(repr, arguments))}" if len(arguments) > 1 else repr(arguments[0])
    if origin in (Union, types.UnionType):
        return " or ".join(map(describe_type, arguments))
    if origin in (list, tuple):
        items = [a for a in arguments if a is not Ellipsis]
        return f"a {origin.__name__}" + (f", each entry {describe_type(items[0])}" if items else "")
    return PLAIN.get(annotation) or f"a {getattr(annotation, '__name__', str(annotation))}"


@cache
def _adapter(annotation: Any) -> TypeAdapter:
    """Return the validator of a type, built once."""
    return TypeAdapter(annotation, config=TYPE_CHECKS)


def _shown(value: Any) -> str:
    """Return a value as messages show it: in one line, with its type unless it is a plain number."""
    text = " ".join(repr(value).split())
    text = text if len(text) <= 80 else f"{text[:77]}..."
    return (
        text if isinstance(value, int | float) and not isinstance(value, bool) else f"{text} ({type(value).__name__})"
    )


def check_value(name: str, value: Any, annotation: Any, hint: str = "") -> Any:
    """Check one setting.

    Args:
        name: what messages call it.
        value: as the caller gave it.
        annotation: its type, with ranges: one of this module, or any that pydantic knows.
        hint: a remedy, for the end of the message.

    Returns:
        The value, numbers as Python's own.

    Raises:
        BadSetting: for another type or a value out of range.
    """
    try:
        return _adapter(annotation).validate_python(value)
    except (ValidationError, TypeError, ValueError, OverflowError):
        pass
    quoted = isinstance(value, str) and "a finite number" in describe_type(annotation) and not hint
    hint = "write numbers without quotes, such as 8 / 255" if quoted else hint
    message = f"expected {name} to be {describe_type(annotation)}, got {_shown(value)}"
    raise BadSetting(f"{message}: {hint}" if hint else message)


def fits(value: Any, annotation: Any) -> bool:
    """Return whether a value is of a type, in its range."""
    try:
        check_value("a value", value, annotation)
    except BadSetting:
        return False
    return True


@cache
def setting_types(function: Callable) -> dict[str, Any]:
    """Return the annotation of each parameter of a function, a `functools.partial` or a dataclass, ranges included."""
    while isinstance(function, partial):
        function = function.func
    return {k: v for k, v in get_type_hints(function, include_extras=True).items() if k != "return"}


def check_settings(function: Callable, values: Mapping[str, Any], whose: str = "") -> dict[str, Any]:
    """Check settings against the signature that they belong to.

    Args:
        function: a function, a `functools.partial` or a dataclass whose annotations say what is valid.
        values: settings by name, all of them parameters of it.
        whose: what messages put before a setting's name, such as "pgd's ".

    Returns:
        The settings, numbers as Python's own.

    Raises:
        BadSetting: for another type or a value out of range.
        KeyError: for a name that is no parameter.
    """
    known = setting_types(function)
    return {name: check_value(f"{whose}{name}", value, known[name]) for name, value in values.items()}


def from_settings(kind: type, values: Mapping[str, Any], whose: str) -> Any:
    """Return a dataclass of settings, after checking names and values.

    Args:
        kind: the dataclass, whose annotations say what is valid.
        values: settings by name.
        whose: the function that takes them, for messages.

    Raises:
        TypeError: for an unknown name, or one that is missing.
        BadSetting: for another type or a value out of range.
    """
    known = {f.name: f.default is MISSING and f.default_factory is MISSING for f in fields(kind)}
    if unknown := sorted(set(values) - set(known)):
        raise TypeError(f"{whose} has no option {', '.join(unknown)}: its options are {', '.join(known)}")
    if missing := [name for name, needed in known.items() if needed and name not in values]:
        raise TypeError(f"{whose} needs {missing[0]}=...: expected {describe_type(setting_types(kind)[missing[0]])}")
    return kind(**check_settings(kind, values))


def check_fields(instance: Any) -> None:
    """Check all fields of a dataclass by their annotations, for its `__post_init__`; numbers become Python's own.

    Raises:
        BadSetting: for another type or a value out of range.
    """
    values = {f.name: getattr(instance, f.name) for f in fields(instance)}
    for name, value in check_settings(type(instance), values).items():
        object.__setattr__(instance, name, value)
