"""What sentences rest on: paired differences with intervals over seeds and images, and the words for them.

A `Key` is a defence and a condition, as in the `outcomes` of a record. A record without outcomes is read by a function
`share(record, key)`, which takes the accuracy from its metrics.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lib.report.answers import answer_values
from lib.report.statistics import estimate_images, interval, scale_estimate
from lib.utils.intervals import mean_interval

Record = Mapping[str, Any]
Key = tuple[str, str]
Weights = Mapping[Key, float]
ShareOf = Callable[[Record, Key], float]


class PointsEstimate(NamedTuple):
    """A number with its 95 % interval, in points."""

    mean: float
    low: float
    high: float


def weigh_answers(record: Record, weights: Weights, of_class: int | None = None) -> np.ndarray | None:
    """Return the weighted sum of each image's accuracies, of one class if `of_class` is one; None without outcomes."""
    outcomes = record.get("outcomes", {})
    correct = outcomes.get("correct", {})
    if any(condition not in correct.get(defence, {}) for defence, condition in weights):
        return None
    sums = sum(w * answer_values(correct[name], what, "accuracy") for (name, what), w in weights.items())
    if of_class is None:
        return np.asarray(sums)
    return np.asarray(sums)[np.array(outcomes["labels"]) == of_class] if "labels" in outcomes else None


def image_numbers(record: Record, of_class: int | None = None) -> np.ndarray:
    """Return the numbers of a record's test images, of one class if `of_class` is one."""
    numbers = np.array(record["outcomes"]["images"])
    return numbers if of_class is None else numbers[np.array(record["outcomes"]["labels"]) == of_class]


def contrast(
    records: Sequence[Record],
    weights: Callable[[Record], Weights],
    share: ShareOf,
    of_class: int | None = None,
) -> PointsEstimate:
    """Return a weighted sum of accuracies, in points, mean over seeds, with its 95 % interval.

    Args:
        records: one per seed.
        weights: weight of each key, for a record: 1 and -1 for a difference.
        share: see the module; where a record has no outcomes.
        of_class: the class whose images alone count, None for all.

    Returns:
        With outcomes the interval over seeds and images (`lib.report.statistics`). Without, Student's t interval over
        seeds, or for one seed the normal interval of unpaired shares.
    """
    chosen = [weights(record) for record in records]
    answers = [weigh_answers(record, w, of_class) for record, w in zip(records, chosen)]
    known = [a for a in answers if a is not None]
    reach = [max(sum(max(sign * w, 0.0) for w in each.values()) for each in chosen) for sign in (-1, 1)]
    bounds = -100 * reach[0], 100 * reach[1]  # no difference lies outside
    if len(known) == len(records):
        images = [image_numbers(record, of_class) for record in records]
        estimate = scale_estimate(estimate_images(known, images, resamples=0), 100)
        return PointsEstimate(estimate.value, *np.clip(interval(estimate), *bounds).tolist())
    values = [sum(w * share(record, key) for key, w in each.items()) for record, each in zip(records, chosen)]
    if len(values) > 1:
        mean, *ends = mean_interval(values)
        return PointsEstimate(100 * mean, *np.clip(100 * np.array(ends), *bounds).tolist())
    n = records[0]["metrics"]["n_test"] / (1 if of_class is None else 10)
    variance = sum(w * w * (p := share(records[0], key)) * (1 - p) / n for key, w in chosen[0].items())
    mean, half = 100 * values[0], 196 * math.sqrt(variance)
    return PointsEstimate(mean, *np.clip([mean - half, mean + half], *bounds).tolist())


def difference(records: Sequence[Record], first: Key, second: Key, share: ShareOf) -> PointsEstimate:
    """Return the accuracy of the first key minus that of the second one, paired (`contrast`)."""
    return contrast(records, lambda _: {first: 1.0, second: -1.0} if first != second else {}, share)


def mean_share(records: Sequence[Record], key: Key, share: ShareOf) -> float:
    """Return the mean accuracy over seeds, in [0, 1]."""
    answers = [weigh_answers(record, {key: 1.0}) for record in records]
    return float(np.mean([share(r, key) if a is None else a.mean() for r, a in zip(records, answers)]))


def words(estimate: PointsEstimate, above: str, below: str, unclear: str) -> str:
    """Return the words for a difference: above or below 0 where its interval says so, else `unclear`."""
    return above if estimate.low > 0 else below if estimate.high < 0 else unclear


def points(estimate: PointsEstimate) -> str:
    """Return a difference with its interval as text."""
    return f"{estimate.mean:+.1f} points [{estimate.low:.1f}, {estimate.high:.1f}]"


def percent(share: float) -> str:
    """Return a share in [0, 1] in %."""
    return f"{100 * share:.1f} %"


def pair_text(records: Sequence[Record], first: Key, second: Key, share: ShareOf, estimate: PointsEstimate) -> str:
    """Return both accuracies and their difference as text."""
    values = [percent(mean_share(records, key, share)) for key in (first, second)]
    return f"{values[0]} against {values[1]}, {points(estimate)}"


def interval_note(records: Sequence[Record]) -> str:
    """Return what the brackets of the sentences mean."""
    n = len(records)
    if all("outcomes" in record for record in records):
        over = f"{n} seeds and their images" if n > 1 else "the images of one seed, which says nothing of other seeds"
        return f"In brackets: 95 % intervals over {over} (paired)."
    over = f"{n} seeds (Student's t)" if n > 1 else "the images of one seed (unpaired)"
    return f"In brackets: 95 % intervals over {over}."
