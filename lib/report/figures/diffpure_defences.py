"""What figures and sentences of experiment 5 share: defences in words, a look for each, values per image, intervals.

A record's defences are purifiers before a natural classifier ("adaptive-1"), classifiers alone ("none", "trades"), or
both ("adaptive-1 + trades").
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes

from lib.report.answers import answer_values
from lib.report.figures import COLOURS, SAMPLER_LOOKS
from lib.report.statistics import Estimate, estimate_images, interval, scale_estimate
from lib.utils.draws import MATCHED
from lib.utils.specs import PurifierSpec, label_noise

NONE = "none"
CLEAN_STUDENT, ADAPTIVE_STUDENT, ONE_STEP_DDIM = "clean-1", "adaptive-1", "ddim-1"
FEW_STEPS = 4  # DDIM in more steps than these is the teacher's ODE, in as few the undistilled network


class Look(NamedTuple):
    """A method in words, with its marker and colour in all figures."""

    words: str
    marker: Any = "."
    colour: Any = "0.65"


LOOKS = {
    NONE: Look("no purifier", "X", "0.5"),
    "sde": Look("DiffPure (teacher)", *SAMPLER_LOOKS["sde"]),
    "ddpm": Look("DiffPure, DDPM (teacher)", "s", "0.1"),
    "ode": Look("DiffPure's ODE", *SAMPLER_LOOKS["ode"]),
    "ddim": Look("undistilled", *SAMPLER_LOOKS["ddim"]),
    "clean": Look("student of clean pairs", "o", COLOURS[9]),
    "adaptive": Look("student + constraint", "^", COLOURS[3]),
    "grey": Look("student + grey-box constraint", "d", "#b8a800"),
    "undistilled-adaptive": Look("constraint, not distilled", "<", COLOURS[1]),
    "label": Look("constraint + labels", "*", "#005c43"),
    "label-n50": Look("constraint + labels, noise × 0.5", "p", COLOURS[2]),
    "label-n25": Look("constraint + labels, noise × 0.25", "h", "#45b896"),
    "label-n0": Look("constraint + labels, no noise", "8", "#8fd6c0"),
    "pgd-at": Look("PGD-AT", (4, 1, 0), COLOURS[5]),
    "trades": Look("TRADES", "P", "#6b3d00"),
    "trades-wide": Look("TRADES, wide", (6, 1, 0), "#b35900"),
    "adaptive + trades": Look("student + constraint", ">", "#882255"),
    "trades-adaptive + trades": Look("student made for it", "H", "#cc6699"),
    "trades-adaptive": Look("student + constraint, for TRADES", "H", "#cc6699"),
    "cd": Look("consistency distillation", *SAMPLER_LOOKS["cd"]),
    "pd": Look("progressive distillation", *SAMPLER_LOOKS["pd"]),
    "random": Look("student + random δ", "<"),
    "match-ode": Look("student of the ODE from x + δ", ">"),
    "match-sde": Look("student of the SDE from x + δ", "d"),
    "cd + purified": Look("CD", (5, 1, 0), "#228877"),
    "purified": Look("fine-tuned on its images"),
}
ALONE = ("pgd-at", "trades", "trades-wide")  # classifiers without a purifier
PURIFIED_CLASSIFIER = "purified"  # fine-tuned on purified images, without adversarial ones
GROUPS = ("purifier, natural classifier", "adversarially trained classifier", "purifier before such a classifier")


def method_of(name: str) -> str:
    """Return the key of `LOOKS` that a defence's look is under: its name without the steps."""
    purifier, plus, classifier = name.partition(" + ")
    if name in (NONE, *ALONE):
        return name
    spec = PurifierSpec.parse(purifier)
    kind = "ode" if spec.kind == "ddim" and spec.steps > FEW_STEPS else spec.kind
    return f"{kind} + {classifier}" if plus else kind


def steps_of(name: str) -> int:
    """Return the steps of a defence's purifier, 0 without one."""
    return 0 if name in (NONE, *ALONE) else PurifierSpec.parse(name.partition(" + ")[0]).steps


def defence_group(name: str) -> str:
    """Return which of `GROUPS` a defence belongs to."""
    classifier = name.partition(" + ")[2]
    return GROUPS[1] if name in ALONE else GROUPS[0] if classifier in ("", PURIFIED_CLASSIFIER) else GROUPS[2]


def defence_label(name: str) -> str:
    """Return a defence in words: "student + constraint, 1 step"."""
    method, steps = method_of(name), steps_of(name)
    label = LOOKS[method].words if method in LOOKS else method
    if steps:
        network = PurifierSpec.parse(name.partition(" + ")[0]).network
        own = network.distance if network.weight is None else f"weight {network.weight:g}"
        label += f", {own}" if own else ""
        label += f", {steps} step" + "s" * (steps != 1)
    classifier = name.partition(" + ")[2]
    return f"{label} → {LOOKS[classifier].words}" if classifier else label


def defence_style(name: str) -> dict[str, Any]:
    """Return a defence's marker and colour."""
    look = LOOKS.get(method_of(name), Look(""))
    return {"marker": look.marker, "color": look.colour}


def defence_order(name: str) -> tuple:
    """Return what defences are sorted by: group, method, steps."""
    method, order = method_of(name), list(LOOKS)
    place = order.index(method) if method in LOOKS else len(order)
    return GROUPS.index(defence_group(name)), place, method, steps_of(name), name


def defences_of(records: Sequence[dict]) -> list[str]:
    """Return the defences that all records have, in the order of figures."""
    return sorted(set.intersection(*(set(r["outcomes"]["correct"]) for r in records)), key=defence_order)


def noise_shares(records: Sequence[dict]) -> dict[str, float]:
    """Return the share of the noise of each student with a label term, in one step, that all records have."""
    one_step = [name for name in defences_of(records) if steps_of(name) == 1]
    return {name: share for name in one_step if (share := label_noise(method_of(name))) is not None}


def paired_values(
    records: Sequence[dict], name: str, measure: str, condition: str = MATCHED, minus: str | None = None
) -> list[np.ndarray]:
    """Return a measure per image for each seed, of one defence or of one minus another on the same images.

    Args:
        records: one per seed.
        name: of the defence.
        measure: see `lib.report.answers.answer_values`.
        condition: likewise.
        minus: another defence, whose values of the same images are subtracted.

    Returns:
        One array for each seed.
    """

    def values(defence: str) -> list[np.ndarray]:
        return [answer_values(r["outcomes"]["correct"][defence], condition, measure) for r in records]

    return values(name) if minus is None else [a - b for a, b in zip(values(name), values(minus))]


def estimate_paired(
    records: Sequence[dict], name: str, measure: str, condition: str = MATCHED, minus: str | None = None
) -> Estimate:
    """Return the mean over seeds and images of what `paired_values` gives, in %, with what its interval is made of.

    Args:
        records: one per seed.
        name: of the defence.
        measure: see `lib.report.answers.answer_values`.
        condition: likewise.
        minus: another defence, as in `paired_values`.

    Returns:
        The estimate, whose interval `lib.report.statistics.interval` gives.
    """
    return estimate_values(records, paired_values(records, name, measure, condition, minus))


def estimate_values(records: Sequence[dict], values: Sequence[np.ndarray]) -> Estimate:
    """Return the estimate, in %, of values per image of each record: the one place where these intervals come from."""
    images = [r["outcomes"]["images"] for r in records]
    return scale_estimate(estimate_images(values, images, resamples=0), 100)


def evidence_note(records: Sequence[dict]) -> str:
    """Return what a figure rests on and what its error bars are."""
    images = sorted({len(r["outcomes"]["images"]) for r in records})
    count = f"{images[0]}" if len(images) == 1 else f"{images[0]} to {images[-1]}"
    seeds, over = len(records), "seeds and images" if len(records) > 1 else "images"
    return f"n = {seeds} seed{'s' * (seeds != 1)} × {count} images; bars: 95 % interval over {over}"


def point_with_bar(
    axes: Axes,
    estimate: Estimate,
    place: float,
    across: bool = True,
    limits: tuple[float, float] = (-100, 100),
    **options: Any,
) -> None:
    """Draw an estimate with its interval, at a row (`across`) or at a column.

    Args:
        axes: where.
        estimate: in %.
        place: the row, or the column.
        across: whether the estimate is along x.
        limits: what the estimated value lies within; bars are cut there.
        options: of `errorbar`, such as marker and colour.
    """
    mean, (low, high) = estimate.value, np.clip(interval(estimate), *limits)
    options = {"capsize": 2, "markersize": 5, "linestyle": "none"} | options
    bar = {"xerr" if across else "yerr": [[mean - low], [high - mean]]}
    axes.errorbar(*(([mean], [place]) if across else ([place], [mean])), **bar, **options)
