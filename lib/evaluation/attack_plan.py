"""The plan of an evaluation: its settings and attacks, all checked before the first image is passed."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_origin

import torch
from torch import Tensor

from lib.attacks.api import REGISTRY, attack_options, check_call, check_classes
from lib.attacks.checks import check_labels
from lib.attacks.gate import ModelGate
from lib.utils.random_state import seeded_noise
from lib.utils.validation import (
    Integer,
    NonNegative,
    PositiveInt,
    check_fields,
    check_settings,
    check_value,
    setting_types,
)

RESERVED = ("name", "model", "eps", "norm")  # the entries of an attack that are not options of its own
Norm = Literal["Linf", "L2", "L0"]
NORMS: tuple[str, ...] = get_args(Norm)


@dataclass(frozen=True)
class EvaluationSettings:
    """What holds for a whole evaluation.

    Args:
        eps: radius of the ball, in pixel units; None for no ball.
        norm: "Linf", "L2" or "L0".
        seed: decides all noise.
        batch_size: examples per batch.
        draws: predictions per image; more than 1 for a stochastic model.
        mode: "eval", or "keep" for the model's own train/eval flags.

    Raises:
        ValueError: if a setting is unusable.
    """

    eps: NonNegative | None
    norm: Norm = "Linf"
    seed: Integer = 0
    batch_size: PositiveInt = 256
    draws: PositiveInt = 1
    mode: Literal["eval", "keep"] = "eval"

    def __post_init__(self) -> None:
        check_fields(self)


def _checked_function(entry: dict[str, Any], options: dict[str, Any]) -> None:
    """Raise ValueError or TypeError unless an adaptive attack takes its options and a ball of its own is one."""
    function = entry["name"]
    check_value("eps", entry.get("eps"), NonNegative | None)
    check_value("norm", entry.get("norm"), Norm | None)
    try:
        parameters = inspect.signature(function)
    except (TypeError, ValueError):  # built in: it says nothing of itself
        return
    try:
        parameters.bind(*"mxyenr", **options)
    except TypeError as error:
        given = f"(model, x, y, eps, norm, generator{''.join(f', {name}=...' for name in options)})"
        raise TypeError(f"expected an attack that can be called as {given}, got one that cannot: {error}") from None
    with suppress(TypeError, NameError):  # hints that mean nothing here
        known = setting_types(function)
        ranges = {k: v for k, v in options.items() if get_origin(known.get(k)) in (Annotated, Literal)}
        check_settings(function, ranges)


def _checked_entry(entry: dict[str, Any], at: EvaluationSettings) -> dict[str, Any]:
    """Return an attack's entry, numbers of other libraries as Python's, after checking all that needs no model."""
    if entry.get("model") is not None:
        check_value("model", entry["model"], Callable, "give a function of images that returns logits")
    options = {k: v for k, v in entry.items() if k not in RESERVED}
    if callable(entry["name"]):
        _checked_function(entry, options)
        return entry
    attack_options(entry["name"])  # refuses an unknown name
    eps, norm = attack_ball(entry, at)
    batch_size = options.pop("batch_size", at.batch_size)
    call = check_call(entry["name"], eps, norm, options, batch_size=batch_size, mode=at.mode)
    return entry | {k: v for k, v in call.options.items() if not isinstance(entry[k], int | float | str)}


def attack_plan(attacks: Any, at: EvaluationSettings) -> dict[str, dict[str, Any]]:
    """Return label → dict(name=..., **options) from a list of names or such a dict, after checking names and options.

    `name` may also be a function of `(model, x, y, eps, norm, generator, **options)`, for adaptive attacks. An entry's
    `model` is attacked in place of the evaluated one (a surrogate); its `eps` and `norm` are a ball of its own.

    Args:
        attacks: a list of names, or such a dict.
        at: ball and mode of the evaluation.

    Returns:
        The entries by label.

    Raises:
        ValueError: if there is no such attack, an entry has no name, or a setting is of another type or out of range.
        TypeError: if an attack has no such option.
    """
    if isinstance(attacks, str):
        raise ValueError(f"expected attacks to be a list of names or a dict, got the text {attacks!r}: [{attacks!r}]")
    if isinstance(attacks, Mapping):
        entries = dict(attacks)
    elif isinstance(attacks, list | tuple) and all(isinstance(a, str) for a in attacks):
        entries = {a: {"name": a} for a in attacks}
    else:
        remedy = "write ['pgd'], or {'label': dict(name='pgd', steps=10)}"
        raise ValueError(f"expected attacks to be a list of names or a dict, got {type(attacks).__name__}: {remedy}")
    for label, entry in entries.items():
        if not isinstance(label, str) or label == "clean" or not isinstance(entry, Mapping) or "name" not in entry:
            raise ValueError(f"attack {label!r}: give dict(name=..., **options) under a label other than 'clean'")
        with _naming(label):
            entries[label] = _checked_entry(dict(entry), at)
    return entries


@contextmanager
def _naming(label: str) -> Iterator[None]:
    """Put an attack's label before the message of a refusal."""
    try:
        yield
    except (ValueError, TypeError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"attack {label!r}: {error}") from error


def check_plan(entries: Mapping[str, dict[str, Any]], x: Tensor, classes: int) -> None:
    """Check what an evaluation's attacks need of the model's classes, and the surrogates that they attack.

    Args:
        entries: of `attack_plan`.
        x: images (n, c, h, w), in [0, 1].
        classes: number of the model's logits.

    Raises:
        ValueError: if there are too few classes, or a surrogate does not answer logits of as many for these images.
    """
    passed: list[Any] = []
    for label, entry in entries.items():
        with _naming(label):
            if not callable(entry["name"]):
                check_classes(entry["name"], {k: v for k, v in entry.items() if k not in RESERVED}, classes)
            if (target := entry.get("target")) is not None and not callable(entry["name"]):
                check_labels("target", target, x, classes)
            for role in ("model", "surrogate"):
                other = entry.get(role)
                if not callable(other) or any(other is p for p in passed):
                    continue
                passed.append(other)
                try:
                    with seeded_noise(other, 0, x.device), torch.no_grad():
                        z = ModelGate(other, x)(x[:1])
                except RuntimeError as error:
                    reason = str(error).splitlines()[0]
                    raise ValueError(f"expected a {role} for these images, got {reason!r} from it") from error
                if z.shape[1] != classes:
                    raise ValueError(f"expected a {role} of {classes} classes, got {z.shape[1]}: train it on them")


def attack_ball(entry: dict, at: EvaluationSettings) -> tuple[Any, Any]:
    """Return the eps and norm an attack is called with: the evaluation's, unless its options say otherwise.

    Attacks of least distance (cw, deepfool, jsma) get no eps, and their own norm.
    """
    if callable(entry["name"]) or REGISTRY[entry["name"]].needs_eps:
        return entry.get("eps", at.eps), entry.get("norm", at.norm)
    return entry.get("eps"), entry.get("norm")
