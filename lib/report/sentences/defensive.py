"""Conclusions of experiment 2, defensive distillation."""

from collections.abc import Sequence

import numpy as np

from lib.report.sentences.estimates import (
    Key,
    PointsEstimate,
    Record,
    difference,
    interval_note,
    pair_text,
    percent,
    words,
)
from lib.utils.intervals import mean_interval
from lib.utils.record_keys import temperature_key

CHANGES = ("rises", "falls", "does not clearly change")


def defensive_share(record: Record, key: Key) -> float:
    """Return an accuracy of a record's metrics."""
    (defence, condition), metrics = key, record["metrics"]
    model = metrics["models"][defence]
    attack, _, eps = condition.partition("@")
    if not eps:
        return model["clean"] if attack == "clean" else model["clean"] * (1 - (model["success"][attack] or 0.0))
    ball = next(b for b in ("small", "large") if f"{model[b]['eps']:g}" == eps)
    return metrics["strong"][defence][ball]["accuracy"] if attack == "strong" else model[ball][attack]


def temperature_ends(record: Record) -> tuple[float, float]:
    """Return the lowest and the highest temperature."""
    return min(record["arrays"]["temperatures"]), max(record["arrays"]["temperatures"])


def from_end_to_end(records: Sequence[Record], condition: str) -> tuple[PointsEstimate, str]:
    """Return highest minus lowest temperature under a condition, and its text."""
    high, low = ((temperature_key(T), condition) for T in reversed(temperature_ends(records[0])))
    rise = difference(records, high, low, defensive_share)
    return rise, pair_text(records, high, low, defensive_share, rise)


def ball_sentences(records: Sequence[Record], ball: str) -> list[str]:
    """Return what FGSM shows in one ball, what the worst case leaves of it, and what a stronger attack leaves."""
    low, high = temperature_ends(records[0])
    eps = f"{records[0]['metrics']['models'][temperature_key(low)][ball]['eps']:g}"
    fgsm, fgsm_text = from_end_to_end(records, f"fgsm@{eps}")
    worst, worst_text = from_end_to_end(records, f"worst@{eps}")
    span = f"from T = {low:g} to T = {high:g}"
    out = [f"At ε = {eps}, accuracy under FGSM alone {words(fgsm, *CHANGES)} {span}: {fgsm_text}."]
    consequence = ""
    if fgsm.low > 0:
        left = f"{max(worst.low, 0):.1f} to {max(worst.high, 0):.1f} of the {fgsm.mean:.1f} points that FGSM shows"
        masked = "the rest is masked gradients" if worst.high < fgsm.low else "whether gradients are masked stays open"
        consequence = f" {left} are robustness, as far as these attacks see; {masked}."
    out.append(f"In the worst case over all attacks it {words(worst, *CHANGES)}: {worst_text}.{consequence}")
    if all("strong" in record["metrics"] for record in records):
        strong, text = from_end_to_end(records, f"strong@{eps}")
        broke = [sum(r["metrics"]["strong"][temperature_key(high)][ball]["broke"].values()) for r in records]
        verdict = words(
            strong,
            "the highest temperature is more robust still",
            "the highest temperature is less robust",
            "no clear difference between the two ends is left",
        )
        more = f"It broke {sum(broke)} more images at T = {high:g}."
        out.append(f"After the stronger attack on both ends {verdict}: {text}. {more}")
    return out


def gradient_sentences(records: Sequence[Record]) -> list[str]:
    """Return where gradients vanish, and what following the rescaled logits changes."""
    high = temperature_ends(records[0])[1]
    last, models = temperature_key(high), [r["metrics"]["models"] for r in records]
    zero = {
        T: float(np.mean([m[temperature_key(T)]["why"]["zero_float32"] for m in models]))
        for T in sorted(records[0]["arrays"]["temperatures"])
    }
    most = [T for T, share in zero.items() if share > 0.5]
    where = f"on most images from T = {most[0]:g} on" if most else "on most images at no temperature"
    out = [f"The float32 gradient of the cross-entropy is exactly 0 {where}; at T = {high:g} on {percent(zero[high])}."]
    eps = f"{models[0][last]['large']['eps']:g}"
    scaled, plain = (last, f"fgsm/T@{eps}"), (last, f"fgsm@{eps}")
    restored = difference(records, scaled, plain, defensive_share)
    verdict = words(restored, "makes FGSM weaker", "restores FGSM", "makes no clear difference to FGSM")
    text = pair_text(records, scaled, plain, defensive_share, restored)
    out.append(f"At T = {high:g}, dividing the logits by T {verdict}: accuracy {text} (ε = {eps}).")
    if all({"jsma-f", "jsma-z"} <= set(m[last]["success"]) for m in models):
        z, f = (last, "jsma-z"), (last, "jsma-f")
        change = difference(records, z, f, defensive_share)
        verdict = words(
            change, "leaves more accuracy than", "leaves less accuracy than", "does not clearly differ from"
        )
        text = pair_text(records, z, f, defensive_share, change)
        out.append(f"At T = {high:g}, JSMA on logits {verdict} JSMA on probabilities: {text}.")
    return out


def defensive_sentences(records: Sequence[Record]) -> list[str]:
    """Return the conclusions of experiment 2 for the records of one or more seeds."""
    low, high = temperature_ends(records[0])
    out = [sentence for ball in ("large", "small") for sentence in ball_sentences(records, ball)]
    clean, text = from_end_to_end(records, "clean")
    out.append(f"Without an attack, accuracy {words(clean, *CHANGES)} from T = {low:g} to T = {high:g}: {text}.")
    out += gradient_sentences(records)
    models = [r["metrics"]["models"] for r in records]
    keys = [temperature_key(T) for T in records[0]["arrays"]["temperatures"]]
    success = [m[key]["success"]["cw"] for m in models for key in keys if m[key]["success"]["cw"] is not None]
    if success:
        out.append(
            f"C&W breaks {percent(min(success))} of the correctly classified images or more at every temperature."
        )
    ratios = [
        m[temperature_key(high)]["l2"] / m[temperature_key(low)]["l2"]
        for m in models
        if m[temperature_key(low)]["l2"] and m[temperature_key(high)]["l2"]
    ]
    if len(ratios) > 1:
        mean, left, right = mean_interval(ratios)
        verdict = "larger" if left > 1 else "smaller" if right < 1 else "not clearly larger or smaller"
        text = f"{mean:.2f} × [{left:.2f}, {right:.2f}]"
        out.append(f"Its mean distance at T = {high:g} is {verdict} than at T = {low:g}: {text}.")
    elif ratios:
        out.append(f"Its mean distance at T = {high:g} is {ratios[0]:.2f} times that at T = {low:g}.")
    eps = f"{models[0]['kd-soft']['small']['eps']:g}"
    soft, hard = ("kd-soft", f"worst@{eps}"), ("kd-hard", f"worst@{eps}")
    gain = difference(records, soft, hard, defensive_share)
    verdict = words(gain, "more robust than", "less robust than", "not clearly more or less robust than")
    text = pair_text(records, soft, hard, defensive_share, gain)
    out.append(
        f"Experiment 1's student on soft targets is {verdict} the same network on hard labels (ε = {eps}): {text}."
    )
    return [*out, interval_note(records)]
