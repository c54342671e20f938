"""What each parameter may be: one table for profiles, params.yaml, `-p` and the notebooks' own values.

The defaults are in profiles/base.yaml, the names in the notebooks' parameters cells. A notebook's parameters are those
of its section, of `data`, and `RUN`. What depends on several settings is checked where they are used. Needs no torch.
"""

import difflib
import reprlib
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from lib.utils.validation import (
    BadSetting,
    BelowOne,
    Integer,
    Name,
    NonNegative,
    NonNegativeInt,
    Number,
    Positive,
    PositiveInt,
    Share,
    check_value,
    describe_type,
    fits,
)

LARGEST = 1_000_000_000
CLASS_COUNT = 10  # of every data set


def check_different(values: list) -> list:
    """Return a list whose entries all differ; ValueError for another one."""
    if len(set(values)) < len(values):
        raise ValueError("entries are equal")
    return values


def check_label_count(count: int) -> int:
    """Return a number of labelled images, 0 for all; ValueError for fewer than one of each class."""
    if 0 < count < CLASS_COUNT:
        raise ValueError("fewer than one image of each class")
    return count


def list_of(entry: Any, least: int = 1) -> Any:
    """Return the type of lists of `least` or more entries of a type, no two of them equal."""
    words = f"a list of {least} or more different entries, each {describe_type(entry)}"
    return Annotated[list[entry], Field(min_length=least, description=words), AfterValidator(check_different)]


Count = Annotated[PositiveInt, Field(le=LARGEST)]
CountOrNone = Annotated[NonNegativeInt, Field(le=LARGEST)]  # 0: none, or all, as the notebook says
LabelCount = Annotated[Integer, Field(ge=CLASS_COUNT, le=LARGEST)]  # one of each class at least
LabelCountOrAll = Annotated[CountOrNone, AfterValidator(check_label_count), Field(description="an integer >= 10, or 0")]
Seed = Annotated[NonNegativeInt, Field(le=2**32 - 1)]
Digit = Annotated[NonNegativeInt, Field(le=9)]  # a class, or a number of wrong classes
Dataset = Literal["digits", "mnist", "fashion-mnist", "cifar10"]
Architecture = Literal["cnn", "resnet18", "resnet34", "resnet50"]
RobustMethod = Literal[
    *("natural", "pgd-at", "trades", "trades-at", "mart", "kd"),
    *("ard", "rslad", "iad", "adaad", "igdm", "teach", "guided"),
]
ReferencePurifier = Annotated[
    str, Field(pattern="^(sde|ddpm)-[1-9][0-9]{0,3}$", description="sde-<steps> or ddpm-<steps>")
]
StudentVariant = Annotated[
    str,
    Field(
        pattern="^((noskip-|undistilled-|trades-)?(clean|random|grey|adaptive|match-ode|match-sde)(@(l2|huber|features))?"
        "|label(-n(0|[1-9][0-9]?))?)$",
        description="[noskip-, undistilled- or trades-]<clean, random, grey, adaptive, match-ode or match-sde>"
        "[@<l2, huber or features>], label or label-n<percent>",
    ),
]

TOP: dict[str, Any] = {"profile": Name, "threads": CountOrNone}  # beside the sections
RUN: dict[str, Any] = {"profile": Name, "seed": Seed, "write": bool}  # of a notebook, beside its section and `data`
SECTIONS: dict[str, dict[str, Any]] = {
    "data": {"dataset": Dataset, "train_images": LabelCountOrAll},
    "seeds": dict.fromkeys(("kd_seeds", "dd_seeds", "rd_seeds", "diff_seeds", "dp_seeds"), list_of(Seed, 0)),
    "kd": {
        "teacher": Architecture,
        "teacher_width": Count,
        "teacher_epochs": Count,
        "teacher_lr": Positive,
        "teacher_shift": CountOrNone,
        "teacher_dropout": BelowOne,
        "members": Count,
        "student_width": Count,
        "student_steps": Count,
        "batch_size": Count,
        "student_lr": Positive,
        "label_counts": list_of(LabelCountOrAll),
        "T": Positive,
        "alpha": Share,
        "sweep_labels": LabelCount,
        "temperatures": list_of(Positive),
        "alphas": list_of(Share),
        "weight_decays": list_of(NonNegative),
        "smoothings": list_of(Share),
        "omitted": Digit,
        "jobs": Count,
        "clock": bool,
    },
    "dd": {
        "temperatures": list_of(Positive),
        "arch": Architecture,
        "width": Count,
        "epochs": Count,
        "lr": Positive,
        "batch_size": Count,
        "proxy_epochs": Count,
        "test_points": Count,
        "eps_large": Share,
        "eps_small": Share,
        "steps": Count,
        "queries": Count,
        "cw_steps": Count,
        "cw_searches": Count,
        "strong_steps": Count,
        "strong_restarts": Count,
        "jsma_targets": Digit,
        "diagnosed": CountOrNone,
        "student_width": Count,
        "student_steps": Count,
        "student_batch": Count,
        "student_lr": Positive,
        "student_T": Positive,
        "student_alpha": Share,
        "jobs": Count,
    },
    "rd": {
        "eps": Share,
        "attack_steps": Count,
        "teacher": Architecture,
        "teacher_width": Count,
        "teacher_lr": Positive,
        "student": Architecture,
        "student_width": Count,
        "student_lr": Positive,
        "teacher_epochs": Count,
        "epochs": Count,
        "batch_size": Count,
        "optimizer": Literal["adam", "adamw", "sgd"],
        "weight_decay": NonNegative,
        "ema": BelowOne,
        "shift": CountOrNone,
        "flip": bool,
        "precision": Literal["no", "fp16", "bf16"],
        "methods": list_of(RobustMethod, 0),
        "trials": Annotated[PositiveInt, Field(le=3)],
        "teachers": list_of(Literal["natural", "weak", "middle", "trades", "pgd-at"], 0),
        "few_labels": LabelCountOrAll,
        "temperatures": list_of(Positive, 0),
        "test_points": Count,
        "steps": Count,
        "targets": Annotated[PositiveInt, Field(le=9)],
        "queries": Count,
        "radii": list_of(Share),
        "diagnosed": CountOrNone,
        "jobs": Count,
    },
    "diff": {
        "channels": Annotated[list[Count], Field(min_length=1, description="a list of 1 or more integers >= 1")],
        "attention": bool,
        "target": Literal["v", "epsilon"],
        "t": Annotated[Positive, Field(le=999)],
        "t_max": Annotated[PositiveInt, Field(le=999)],
        "batch_size": Count,
        "teacher_epochs": Count,
        "teacher_lr": Positive,
        "teacher_ema": BelowOne,
        "student_ema": BelowOne,
        "first": Count,
        "weight": Literal["uniform", "truncated", "snr+1", "capped"],
        "round_epochs": Count,
        "round_lr": Positive,
        "cd_epochs": Count,
        "cd_lr": Positive,
        "levels": Annotated[list[Count], Field(min_length=2, max_length=2, description="a list of 2 integers >= 1")],
        "solver": Literal["heun", "ddim"],
        "cd_weight": Literal["uniform", "inverse"],
        "measure": Literal["huber", "l2"],
        "decay": BelowOne,
        "skip": bool,
        "steps": list_of(Count),
        "test_points": CountOrNone,
        "draws": Count,
        "classifier_width": Count,
        "classifier_epochs": Count,
        "classifier_lr": Positive,
        "sampled": Count,
        "jobs": Count,
    },
    "dp": {
        "eps": Share,
        "teacher": ReferencePurifier,
        "steps": Count,
        "variants": list_of(StudentVariant),
        "attacked": list_of(StudentVariant, 0),
        "adversarial_weight": NonNegative,
        "weights": list_of(NonNegative, 0),
        "copies": Count,
        "variant_epochs": Count,
        "variant_lr": Positive,
        "delta_steps": Count,
        "measure": Literal["huber", "l2", "features"],
        "label_weight": NonNegative,
        "label_epochs": Count,
        "label_lr": Positive,
        "classifier_width": Count,
        "classifier_epochs": Count,
        "classifier_lr": Positive,
        "wide_width": Count,
        "robust_epochs": Count,
        "robust_batch": Count,
        "robust_lr": Positive,
        "robust_steps": Count,
        "test_points": Count,
        "attack_steps": Count,
        "eot": Count,
        "queries": Count,
        "last_steps": Count,
        "last_eot": Count,
        "first_draws": Count,
        "finalists": Count,
        "second_draws": Count,
        "fresh_draws": Annotated[Integer, Field(ge=10, le=LARGEST)],  # worst of ten needs ten
        "diagnosed": CountOrNone,
        "certified_points": Count,
        "certified_draws": Count,
        "sigmas": list_of(Positive),
        "inherited_points": Count,
        "jobs": Count,
    },
}


def check_names(
    names: Iterable[Any], known: Iterable[str], where: str, complete: bool = False, what: str = "key"
) -> None:
    """Check names of something; BadSetting for an unknown one, and where `complete` for a missing one."""
    known, names = list(known), list(names)
    for name in (n for n in names if n not in known):
        near = difflib.get_close_matches(str(name), known, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise BadSetting(f"unknown {what} {reprlib.repr(name)} in {where}: {hint}expected one of {', '.join(known)}")
    if complete and (missing := [name for name in known if name not in names]):
        raise BadSetting(f"expected all parameters in {where}, got none for {reprlib.repr(missing)}")


def check_profile(settings: Mapping[Any, Any], where: str, complete: bool = False) -> dict[str, Any]:
    """Check a profile, or what it changes.

    Args:
        settings: by name, those of a section in a mapping of their own.
        where: the file, for messages.
        complete: whether every parameter must be there.

    Returns:
        The settings, numbers in the types of the table.

    Raises:
        BadSetting: for unknown and missing names, another type or a value out of range.
    """
    check_names(settings, [*TOP, *SECTIONS], where, complete)
    checked = {}
    for key, value in settings.items():
        if key in TOP:
            checked[key] = check_value(f"{key} in {where}", value, TOP[key])
            continue
        if not isinstance(value, dict):
            raise BadSetting(f"expected a section, `name: value` lines, at {key} in {where}, got {reprlib.repr(value)}")
        check_names(value, SECTIONS[key], f"section {key} of {where}", complete)
        checked[key] = {n: check_value(f"{key}.{n} in {where}", v, SECTIONS[key][n]) for n, v in value.items()}
    return checked


def default_type(default: Any) -> Any:
    """Return the type of a parameter that the table does not know: that of its default, its entries' for a list."""
    if isinstance(default, list):
        return list[default_type(default[0])] if default else list
    return {bool: bool, int: Integer, float: Number}.get(type(default), type(default))


def notebook_types(defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return the type of each parameter of a notebook.

    They are those of the section that shares most names with it; a parameter of a notebook of one's own that is not
    there, or means something else since its default does not fit, has the type of its default.
    """
    section = max(SECTIONS.values(), key=lambda types: len(types.keys() & defaults.keys()))
    known = RUN | SECTIONS["data"] | section
    fitting = {name: name in known and fits(value, known[name]) for name, value in defaults.items()}
    return {name: known[name] if fitting[name] else default_type(value) for name, value in defaults.items()}
