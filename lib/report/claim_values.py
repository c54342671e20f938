"""What a claim is about, measured in the records: numbers of the metrics, or outcomes per image, one value per seed."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lib.report import statistics
from lib.report.answers import LOSSES, answer_values
from lib.report.claim_schema import CLAIMS, Claim, Operand
from lib.utils.draws import NO_ATTACK


def look_up(claim: Claim, what: str, node: Any, path: Sequence[str]) -> Any:
    """Return what lies at a path of a record.

    Args:
        claim: whose path it is, for messages.
        what: the claim's key, and the place in the record, for messages.
        node: where the path begins.
        path: keys, from there.

    Raises:
        LookupError: for a key that is not there; it names claim, key and what there is.
    """
    for key in path:
        if not isinstance(node, Mapping) or key not in node:
            there = f"the keys {', '.join(node)}" if isinstance(node, Mapping) else f"{node!r}"
            raise LookupError(
                f"claim {claim.id}: {what}: {'.'.join(path)} is not in the records: expected {key!r}, got {there}: "
                f"correct it in {CLAIMS.name}, or name in `profiles` those that measure it"
            )
        node = node[key]
    return node


def look_up_number(claim: Claim, key: str, record: Mapping[str, Any], path: str) -> float | None:
    """Return the number at a dotted path of a record's metrics, None for null; LookupError for anything else."""
    number = look_up(claim, key, record.get("metrics"), path.split("."))
    if number is not None and (isinstance(number, bool) or not isinstance(number, int | float)):
        raise LookupError(f"claim {claim.id}: {key}: {path}: expected a number, got {number!r}")
    return number


def operand_values(
    claim: Claim, key: str, operand: Operand, record: Mapping[str, Any]
) -> tuple[np.ndarray, np.ndarray]:
    """Return an operand's value of each image of one record, and the images' numbers; LookupError if it is not there.

    Raises ValueError where answers and images differ in number.
    """
    outcomes = look_up(claim, key, record, ["outcomes"])
    answers = look_up(claim, f"{key}.defence", outcomes, ["correct", operand.defence])
    images = []
    for condition in (operand.threat, NO_ATTACK) if operand.measure in LOSSES else (operand.threat,):
        packed = look_up(claim, f"{key}.threat", answers, [condition])
        images.append(np.asarray(packed.get("images", outcomes["images"])))
        if len(images[-1]) != packed["n"]:
            where = f"{operand.defence}, {condition}"
            raise ValueError(
                f"claim {claim.id}: {key}: expected answers to {len(images[-1])} images of {where}, got {packed['n']}"
            )
    check_paired(claim, f"{key}.threat", images[-1], images[0])
    return answer_values(answers, operand.threat, operand.measure), images[0]


def check_paired(claim: Claim, key: str, first: np.ndarray, second: np.ndarray) -> None:
    """Raise ValueError unless both operands are about the same images in the same order."""
    if not np.array_equal(first, second):
        raise ValueError(
            f"claim {claim.id}: {key}: expected the images of the other operand, since the difference is paired, got "
            f"{len(second)} images, {len(set(second.tolist()) & set(first.tolist()))} of them among its {len(first)}"
        )


def estimate_outcomes(claim: Claim, records: Sequence[Mapping[str, Any]]) -> statistics.Estimate:
    """Return the estimate of a claim about outcomes per image, in shares."""
    values, images = [], []
    for record in records:
        difference, numbers = operand_values(claim, "plus", claim.plus, record)
        if claim.minus:
            others, other_numbers = operand_values(claim, "minus", claim.minus, record)
            check_paired(claim, "minus", numbers, other_numbers)
            difference = difference - others
        values.append(difference)
        images.append(numbers)
    return statistics.estimate_images(values, images)


def estimate_paths(claim: Claim, records: Sequence[Mapping[str, Any]]) -> statistics.Estimate | None:
    """Return the estimate of a claim about one number per seed; None where one of them is null: it has no value."""
    key = "plus" if claim.minus else "value"
    values = [look_up_number(claim, key, record, claim.plus.path) for record in records]
    if claim.minus:
        others = [look_up_number(claim, "minus", record, claim.minus.path) for record in records]
        values = [None if a is None or b is None else a - b for a, b in zip(values, others)]
    counts = [look_up_number(claim, "count", record, claim.count) or 0 for record in records] if claim.count else [0]
    numbers = [value for value in values if value is not None]
    return None if len(numbers) < len(values) else statistics.estimate_scalars(numbers, int(sum(counts)))


def estimate_claim(claim: Claim, records: Sequence[Mapping[str, Any]], profile: str) -> statistics.Estimate | None:
    """Return a claim's estimate in its unit; None where the profile does not measure it or ran no seed of it."""
    if not records or (claim.profiles and profile not in claim.profiles):
        return None
    estimate = estimate_paths(claim, records) if claim.plus.path else estimate_outcomes(claim, records)
    return None if estimate is None else statistics.scale_estimate(estimate, claim.scale)
