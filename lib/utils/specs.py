"""Names that are data: which purifier "noskip-adaptive@0.3-2" is, and what "adaptive-2/exact" is a result of.

Records and folders know purifiers by such names; here alone they are taken apart and put together. Needs no torch.
"""

from typing import NamedTuple

NOSKIP = "noskip"  # the consistency student without c_skip, and the beginning of the names of its variants


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
        """Return the network that a name stands for; ValueError for an empty one."""
        kind, _, own = name.partition("@")
        if not kind:
            raise ValueError(f"expected [{NOSKIP}-]<variant>[@<weight or distance>], got {name!r}")
        skip = kind != NOSKIP and not kind.startswith(f"{NOSKIP}-")
        variant = "cd" if kind == NOSKIP else kind.removeprefix(f"{NOSKIP}-")
        if own[:1].isdigit():
            return cls(variant, skip, weight=float(own))
        return cls(variant, skip, distance=own or None)

    @property
    def kind(self) -> str:
        """Return the name without a weight or distance of its own."""
        if self.skip:
            return self.variant
        return NOSKIP if self.variant == "cd" else f"{NOSKIP}-{self.variant}"

    def __str__(self) -> str:
        own = self.distance if self.weight is None else f"{self.weight:g}"
        return self.kind if own is None else f"{self.kind}@{own}"


class PurifierSpec(NamedTuple):
    """A purifier, "<network>-<steps>": sde-100 is DiffPure, pd-2 a student of progressive distillation."""

    network: StudentSpec
    steps: int

    @classmethod
    def parse(cls, name: str) -> "PurifierSpec":
        """Return the purifier that a name stands for; ValueError for a name without steps."""
        network, _, steps = name.rpartition("-")
        if not network or not steps.isdigit():
            raise ValueError(f"expected a purifier <kind>-<steps>, such as sde-100 or cd-2, got {name!r}")
        return cls(StudentSpec.parse(network), int(steps))

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


def effort_label(steps: int, eot: int) -> str:
    """Return how the results of an attack of `steps` steps and `eot` passes per gradient are labelled: "50x16"."""
    return f"{steps}x{eot}"


def parse_effort(label: str) -> tuple[int, int] | None:
    """Return (steps, eot) of a label that `effort_label` made, None for another label."""
    steps, _, eot = label.partition("x")
    return (int(steps), int(eot)) if steps.isdigit() and eot.isdigit() else None
