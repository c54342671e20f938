"""What an evaluation measures, in numbers with intervals over images, in RobustBench's fields and in lines."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from lib.report import statistics
from lib.report.answers import answer_values
from lib.utils.draws import MATCHED, NO_ATTACK
from lib.utils.intervals import wilson

REPORTED = {  # of the JSON: condition, measure, what it is in words
    "clean": (NO_ATTACK, "accuracy", "no attack, average over draws"),
    "control": (NO_ATTACK, "worst_of_10", "no attack, right in ten of ten draws (control)"),
    "robust": (MATCHED, "accuracy", "under attack, average over draws"),
    "worst_of_10": (MATCHED, "worst_of_10", "under attack, right in ten of ten draws"),
    "attack_induced_loss": (MATCHED, "loss", "attack-induced loss"),
}


def interval_over_images(values: Float[np.ndarray, " n"], numbers: list[int], loss: bool = False) -> dict[str, float]:
    """Return the mean of values per image with its 95 % interval: Wilson's where each is 0 or 1, else Student's.

    Args:
        values: shares, or for a loss differences of shares (n,).
        numbers: of the images.
        loss: whether the ends are cut to [-1, 1] in place of [0, 1].

    Returns:
        value, low, high.
    """
    if np.isin(values, (0, 1)).all():
        low, high = wilson(int(values.sum()), len(values))
    else:
        estimate = statistics.estimate_images([values], [np.asarray(numbers)], resamples=0)
        low, high = np.clip(statistics.interval(estimate), -1.0 if loss else 0.0, 1.0).tolist()
    return {"value": float(values.mean()), "low": low, "high": high}


def measure_answers(answers: Mapping[str, Any], numbers: list[int]) -> dict[str, dict[str, float]]:
    """Return every measure of `REPORTED` with its 95 % interval over images, as shares.

    Args:
        answers: condition → packed draws, see `lib.utils.draws.pack_draws`.
        numbers: of the images.

    Returns:
        Measure → value, low, high: Wilson's interval where each image is right or wrong, else Student's.
    """
    out = {}
    for name, (condition, measure, _) in REPORTED.items():
        out[name] = interval_over_images(answer_values(answers, condition, measure), numbers, name.endswith("loss"))
    return out


def robustbench_fields(result: Mapping[str, Any], official: bool) -> dict[str, str]:
    """Return the accuracies in RobustBench's fields, % as text: `autoattack_acc` by AutoAttack's own budgets alone."""
    shown = {name: f"{100 * result['measures'][name]['value']:.2f}" for name in ("clean", "robust")}
    return {"clean_acc": shown["clean"]} | ({"autoattack_acc": shown["robust"]} if official else {})


def percent_interval(measure: Mapping[str, float]) -> str:
    """Return a measure in % with its interval: 73.3 [60.1, 86.5]."""
    value, low, high = (100 * measure[key] for key in ("value", "low", "high"))
    return f"{value:.1f} [{low:.1f}, {high:.1f}]"


def evaluation_lines(result: Mapping[str, Any]) -> list[str]:
    """Return the result of an evaluation, line by line."""
    head = f"{result['name']}: {result['dataset']}, {result['norm']}, ε = {result['eps']:g}, {result['n']} images, "
    head += f"{result['draws']} draws" if result["random"] else "deterministic"
    lines = [head]
    for name, (_, _, words) in REPORTED.items():
        if not result["random"] and name in ("control", "worst_of_10"):
            continue  # equal to the average
        value, low, high = (100 * result["measures"][name][key] for key in ("value", "low", "high"))
        text = words if result["random"] else words.removesuffix(", average over draws")
        lines.append(f"  {text:48} {value:5.1f} {'points' if name.endswith('loss') else '%':6} [{low:.1f}, {high:.1f}]")
    lines.append(f"  {result['gradients_per_image']:.0f} gradients per image by {', '.join(result['attacks'])}")
    lines += [f"  note: {text}; the worst image of all attacks counts" for text in result["notes"]]
    return [*lines, *(f"  RED: {text}" for text in result["red"])]
