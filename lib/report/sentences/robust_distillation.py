"""Conclusions of experiment 3, robust distillation."""

from collections.abc import Sequence

import numpy as np

from lib.report.figures.robust_distillation import METHOD_NAMES
from lib.report.sentences.estimates import (
    Key,
    Record,
    Weights,
    contrast,
    difference,
    interval_note,
    mean_share,
    pair_text,
    percent,
    points,
    words,
)
from lib.utils.intervals import wilson
from lib.utils.record_keys import CURVE_METHODS, run_key, run_parts

MORE_ROBUST = ("more robust than", "less robust than", "not clearly more or less robust than")
PUBLISHED_METHODS = ("ard", "rslad", "iad", "adaad", "igdm")
STRONG_TEACHER = "trades"


def robust_share(record: Record, key: Key) -> float:
    """Return an accuracy of a record's metrics."""
    (defence, condition), metrics = key, record["metrics"]
    kind, *rest = run_parts(defence)
    if condition.startswith("pgd@"):
        radii = [f"{eps:g}" for eps in record["arrays"]["radii"]]
        return record["arrays"]["curves"][defence][radii.index(condition.removeprefix("pgd@"))]
    if kind == "last":
        return metrics["methods"][rest[0]]["last"]
    results = metrics["teachers" if kind == "teachers" else "others" if rest else "methods"]
    row = results[rest[0] if kind == "teachers" else defence]
    if condition == "quick":
        return row.get("quick", row["robust"])
    return (
        row["robust"] if condition == "worst" else row[condition] if condition == "clean" else row["attacks"][condition]
    )


def method_sentence(records: Sequence[Record], first: Key, second: Key, names: tuple[str, str]) -> str:
    """Return which of two networks is more robust."""
    gain = difference(records, first, second, robust_share)
    text = pair_text(records, first, second, robust_share, gain)
    return f"{names[0][0].upper()}{names[0][1:]} is {words(gain, *MORE_ROBUST)} {names[1]}: {text}."


def best_published(record: Record) -> str:
    """Return the published distillation with the best validation score."""
    methods = record["metrics"]["methods"]
    return max((m for m in PUBLISHED_METHODS if m in methods), key=lambda m: methods[m]["score"])


def method_sentences(records: Sequence[Record]) -> list[str]:
    """Return how the distillations compare with adversarial training of the same student."""
    bases = ("pgd-at", "trades", "trades-at")
    names = {m: METHOD_NAMES[m] for m in (*bases, "guided", "kd", "natural")}
    out = [
        method_sentence(records, ("guided", "worst"), (base, "worst"), (names["guided"], names[base])) for base in bases
    ]
    chosen = ", ".join(sorted({METHOD_NAMES[best_published(r)] for r in records}))
    for base in bases[:2]:

        def weights(record: Record, base: str = base) -> Weights:
            return {(best_published(record), "worst"): 1.0, (base, "worst"): -1.0}

        gain = contrast(records, weights, robust_share)
        verdict = words(gain, *MORE_ROBUST)
        out.append(
            f"The published distillation that validation prefers ({chosen}) is {verdict} {names[base]}: {points(gain)}."
        )
    pair = (names["kd"], "training on labels alone")
    return [*out, method_sentence(records, ("kd", "worst"), ("natural", "worst"), pair)]


def ablation_sentences(records: Sequence[Record]) -> list[str]:
    """Return what the teacher's strength, the temperature of ARD and unlabelled images change, as far as measured."""
    others, out = records[0]["metrics"]["others"], []
    for m in ("kd", "rslad", "guided"):
        if (natural := run_key("teacher", m, "natural")) in others:
            ends = (m, "quick"), (natural, "quick")
            gain = difference(records, *ends, robust_share)
            verdict = words(
                gain,
                "makes its student more robust than",
                "makes its student less robust than",
                "is no clear gain over",
            )
            text = pair_text(records, *ends, robust_share, gain)
            out.append(f"With {METHOD_NAMES[m]}, the robust teacher {verdict} a natural one: {text}.")
    ranks = [t for t in ("natural", "weak", "middle") if run_key("teacher", "guided", t) in others]
    if len(ranks) > 1:
        for m in ("kd", "rslad", "guided"):
            keys = {t: (run_key("teacher", m, t), "quick") for t in ranks} | {"strong": (m, "quick")}
            left = [f"{percent(mean_share(records, key, robust_share))} with the {t}" for t, key in keys.items()]
            out.append(f"{METHOD_NAMES[m]}'s student by teacher: {', '.join(left)}.")
    entropy = [
        float(np.mean([r["metrics"]["teachers"][t]["entropy_clean"] for r in records]))
        for t in (STRONG_TEACHER, "natural")
        if t in records[0]["metrics"]["teachers"]
    ]
    if len(entropy) == 2:
        verdict = "softer than" if entropy[0] > entropy[1] else "no softer than"
        text = f"entropy {entropy[0]:.2f} against {entropy[1]:.2f} nats"
        out.append(f"The robust teacher's labels are {verdict} the natural one's: {text}.")
    taus = sorted((float(run_parts(k)[1]), k) for k in others if run_parts(k)[0] == "tau")
    if len(taus) > 1:
        (low, a), (high, b) = taus[0], taus[-1]
        change = difference(records, (b, "quick"), (a, "quick"), robust_share)
        verdict = words(change, "rises", "falls", "does not clearly change")
        text = pair_text(records, (b, "quick"), (a, "quick"), robust_share, change)
        out.append(f"From τ = {low:g} to τ = {high:g} the robustness of ARD's student {verdict}: {text}.")
    if run_key("few", "trades") in others:
        labels = records[0]["metrics"]["few_labels"]
        key = {
            name: (run_key(*name.split()), "quick")
            for name in ("few trades", "transfer trades", "transfer trades-at", "transfer guided")
        }
        pair = ("TRADES with the other images, labelled by the teacher's predicted classes,", "without them")
        out.append(f"With {labels} labels: {method_sentence(records, key['transfer trades'], key['few trades'], pair)}")
        pair = ("guided TRADES with the teacher's soft labels, too,", "TRADES + PGD-AT with its predicted classes")
        out.append(method_sentence(records, key["transfer guided"], key["transfer trades-at"], pair))
    return out


def curve_sentence(records: Sequence[Record]) -> str:
    """Return whether every accuracy curve reaches chance at the largest radius."""
    arrays, n = records[0]["arrays"], records[0]["metrics"]["n_test"] * len(records)
    largest, chance = max(arrays["radii"]), 1 / len(arrays["classes"])
    methods = [m for m in CURVE_METHODS if m in arrays["curves"]]
    left = {m: mean_share(records, (m, f"pgd@{largest:g}"), robust_share) for m in methods}
    above = [m for m, share in left.items() if wilson(round(share * n), n)[0] > chance]
    text = ", ".join(f"{METHOD_NAMES[m]} {percent(share)}" for m, share in left.items())
    if not above:
        return f"At the largest radius, ε = {largest:g}, no curve is above chance, {percent(chance)}: {text}."
    verdict = "every curve is" if len(above) == len(methods) else f"{len(above)} of {len(methods)} curves are"
    return f"At the largest radius, ε = {largest:g}, {verdict} still above chance, {percent(chance)}: {text}."


def check_sentence(records: Sequence[Record]) -> str:
    """Return how many sanity checks are red, and of which network."""
    red = {
        m: sum(sum(map(bool, r["arrays"]["diagnosis"][m].get("flag", []))) for r in records)
        for m in records[0]["arrays"]["diagnosis"]
    }
    if not sum(red.values()):
        return "No sanity check is red."
    listed = ", ".join(f"{count} of {METHOD_NAMES[m]}" for m, count in red.items() if count)
    return f"Sanity checks are red: {listed}."


def robust_sentences(records: Sequence[Record]) -> list[str]:
    """Return the conclusions of experiment 3 for the records of one or more seeds."""
    out = [*method_sentences(records), *ablation_sentences(records), curve_sentence(records)]
    change = difference(records, ("trades", "quick"), (run_key("last", "trades"), "quick"), robust_share)
    verdict = words(change, "more", "less", "not clearly more or less")
    out.append(f"TRADES' best checkpoint by validation is {verdict} robust than its last: {points(change)}.")
    return [*out, check_sentence(records), interval_note(records)]
