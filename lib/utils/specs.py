"""Names that are data: which purifier "noskip-adaptive@0.3-2" is, and what "adaptive-2/exact" is a result of.

Records and folders know purifiers by such names; here alone they are taken apart and put together. Needs no torch.
"""

import math
import re
from typing import NamedTuple

NOSKIP = "noskip"  # the consistency student without c_skip, and the beginning of the names of its variants
MOST_STEPS = 10_000  # of a purifier
KIND = re.compile(r"[A-Za-z][A-Za-z0-9_]*(-[A-Za-z0-9_]+)*")  # no dots and slashes: a kind is also a folder's name
OWN = re.compile(r"[A-Za-z0-9_.+-]+")


class StudentSpec(NamedTuple):
    """A network by how it was trained: "[noskip-]<variant>[@<weight or distance>]".

    `variant`: "cd", a variant of `lib.distillation.robust_consistency`, or a solver for the teacher; `skip`: whether it
    has the skip connection c_skip; `weight` of the constraint or `distance` in the loss, where they are its own.
    """

    variant: str
    skip: bool = True
    weight: float | None = None
    distance: str | None = None

    @classmethod
    def parse(cls, name: str) -> "StudentSpec":
        """Return the network that a name stands for; ValueError for a name that `str` would not write."""
        kind, at, own = name.partition("@")
        weight, distance = _weight_or_distance(own)
        skip = kind != NOSKIP and not kind.startswith(f"{NOSKIP}-")
        variant = "cd" if kind == NOSKIP else kind.removeprefix(f"{NOSKIP}-")
        spec = cls(variant, skip, weight, distance)
        valid = KIND.fullmatch(kind) and (OWN.fullmatch(own) if at else True)
        if not valid or str(spec) != name or (weight is not None and not 0 <= weight < math.inf):
            raise ValueError(f"expected [{NOSKIP}-]<variant>[@<weight or distance>], got {name[:80]!r}")
        return spec

    @property
    def kind(self) -> str:
        """Return the name without a weight or distance of its own."""
        if self.skip:
            return self.variant
        return NOSKIP if self.variant == "cd" else f"{NOSKIP}-{self.variant}"

    def __str__(self) -> str:
        own = self.distance if self.weight is None else f"{self.weight:g}"
        return self.kind if own is None else f"{self.kind}@{own}"


def _weight_or_distance(own: str) -> tuple[float | None, str | None]:
    """Return what stands after "@" in a name, as a weight where it is a number, NaN included, else as a distance."""
    try:
        return float(own), None
    except ValueError:
        return None, own or None


def label_noise(variant: str) -> float | None:
    """Return the share of the noise of "label" (1) and "label-n<percent>", None for another variant."""
    parts = re.fullmatch("label(?:-n(0|[1-9][0-9]?))?", variant)
    return None if parts is None else 1.0 if parts[1] is None else int(parts[1]) / 100


class PurifierSpec(NamedTuple):
    """A purifier, "<network>-<steps>": sde-100 is DiffPure, pd-2 a student of progressive distillation."""

    network: StudentSpec
    steps: int

    @classmethod
    def parse(cls, name: str) -> "PurifierSpec":
        """Return the purifier that a name stands for; ValueError without steps, for too many, and for other spellings.

        "none-0", which leaves images as they are, alone has no steps.
        """
        network, _, steps = name.rpartition("-")
        if not network or not re.fullmatch("0|[1-9][0-9]{0,5}", steps) or int(steps) > MOST_STEPS:
            raise ValueError(f"expected a purifier <kind>-<steps>, such as sde-100 or cd-2, got {name[:80]!r}")
        spec = cls(StudentSpec.parse(network), int(steps))
        if not spec.steps and network != "none":
            raise ValueError(f"expected 1 to {MOST_STEPS} steps, got {name[:80]!r}")
        return spec

    @property
    def kind(self) -> str:
        """Return the network's kind: "adaptive@0.3-2" is of the kind adaptive."""
        return self.network.kind

    def __str__(self) -> str:
        return f"{self.network}-{self.steps}"


class ResultKey(NamedTuple):
    """The key of a result in a record, "<purifier or network>/<what>": what is a threat model or a noise level."""

    name: str
    what: str

    @classmethod
    def parse(cls, key: str) -> "ResultKey":
        """Return the two parts of a key."""
        name, _, what = key.partition("/")
        return cls(name, what)

    def __str__(self) -> str:
        return f"{self.name}/{self.what}"
