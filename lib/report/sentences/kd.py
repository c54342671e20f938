"""Conclusions of experiment 1, classic KD."""

from collections.abc import Sequence

import numpy as np

from lib.report.sentences.estimates import (
    Key,
    Record,
    Weights,
    contrast,
    difference,
    interval_note,
    pair_text,
    percent,
    points,
    words,
)
from lib.utils.intervals import mean_interval
from lib.utils.record_keys import run_key, run_parts


def kd_share(record: Record, key: Key) -> float:
    """Return an accuracy of a record's metrics, of a class that was left out the recall."""
    metrics, (defence, condition) = record["metrics"], key
    kind, *rest = run_parts(defence)
    if kind == "omitted":
        return metrics["omitted"][rest[0]]["none" if condition == "clean" else condition]["recall"]
    if kind == "sweep":
        grid = record["arrays"]["sweep"][rest[0]]["grid"]
        return next(row[-1] for row in grid if run_key("sweep", rest[0], *row[:-2]) == defence)
    if kind == "tuned":
        return metrics["tuned"][rest[0]]
    return metrics["students"][rest[0]][kind] if rest else metrics["cost"][defence]["test"]


def kd_label_sentences(records: Sequence[Record]) -> list[str]:
    """Return what soft targets add to the labels, for each number of labels, and how that changes with their number."""
    students, out = records[0]["metrics"]["students"], []
    order = sorted(students, key=lambda name: students[name]["labels"])
    for name in order:
        soft, hard = (run_key("soft", name), "clean"), (run_key("hard", name), "clean")
        gain = difference(records, soft, hard, kd_share)
        verdict = words(
            gain,
            "soft targets give more accuracy than hard labels",
            "soft targets lose: they give less accuracy than hard labels",
            "soft and hard targets do not clearly differ",
        )
        labels = f"{students[name]['labels']:,} labels"
        labels = f"all {labels}" if name == "all" else labels
        out.append(f"With {labels}, {verdict}: {pair_text(records, soft, hard, kd_share, gain)}.")
    if len(order) > 1:
        few, most = order[0], order[-1]
        weights = {(run_key("soft", few), "clean"): 1.0, (run_key("hard", few), "clean"): -1.0}
        weights |= {(run_key("soft", most), "clean"): -1.0, (run_key("hard", most), "clean"): 1.0}
        change = contrast(records, lambda _: weights, kd_share)
        verdict = words(change, "larger than", "smaller than", "not clearly different from")
        counts = [f"{students[name]['labels']:,}" for name in (few, most)]
        out.append(f"The gain with {counts[0]} labels is {verdict} that with {counts[1]}: {points(change)}.")
    return out


def chosen_minus_lowest(record: Record) -> Weights:
    """Return the contrast of the trial that validation chose and the lowest temperature at the same α."""
    tuned, grid = record["metrics"]["tuned"], record["arrays"]["sweep"]["soft"]["grid"]
    lowest = min(row[0] for row in grid)
    if lowest == tuned["T"]:
        return {}
    ends = [run_key("sweep", "soft", T, tuned["alpha"]) for T in (tuned["T"], lowest)]
    return {(ends[0], "clean"): 1.0, (ends[1], "clean"): -1.0}


def kd_temperature_sentences(records: Sequence[Record]) -> list[str]:
    """Return whether the temperature matters, by comparisons that the test images did not choose, and the range."""
    grid = np.array(
        [r["arrays"]["sweep"]["soft"]["grid"] for r in records], dtype=float
    )  # seed, trial, (T, α, val, test)
    ts, alpha = sorted(set(grid[0, :, 0])), max(grid[0, :, 1])
    ends = [(run_key("sweep", "soft", float(T), float(alpha)), "clean") for T in (ts[-1], ts[0])]
    rise = difference(records, ends[0], ends[1], kd_share)
    verdict = words(rise, "rises", "falls", "does not clearly change")
    best = {
        T: max(grid[:, (grid[0, :, 0] == T) & (grid[0, :, 1] == a), 3].mean() for a in set(grid[0, :, 1])) for T in ts
    }
    low, high = min(best, key=best.__getitem__), max(best, key=best.__getitem__)
    out = [
        f"From T = {ts[0]:g} to T = {ts[-1]:g} (α = {alpha:g}) the student's accuracy {verdict}: "
        f"{pair_text(records, ends[0], ends[1], kd_share, rise)}. At the best α of each temperature it runs from "
        f"{percent(best[low])} at T = {low:g} to {percent(best[high])} at T = {high:g}."
    ]
    chosen = sorted({r["metrics"]["tuned"]["T"] for r in records})
    listed = ", ".join(f"{T:g}" for T in chosen)
    if chosen == [ts[0]]:
        return [*out, f"Validation chose the lowest temperature, T = {listed}."]
    gain = contrast(records, chosen_minus_lowest, kd_share)
    verdict = words(gain, "higher than", "lower than", "not clearly different from")
    where = f"At the temperature that validation chose (T = {listed})"
    return [*out, f"{where} it is {verdict} that at T = {ts[0]:g}: {points(gain)}."]


def kd_sentences(records: Sequence[Record]) -> list[str]:
    """Return the conclusions of experiment 1 for the records of one or more seeds."""
    first = records[0]["metrics"]
    out = [*kd_label_sentences(records), *kd_temperature_sentences(records)]
    soft, hard = ("tuned/soft", "clean"), ("tuned/hard", "clean")
    gain = difference(records, soft, hard, kd_share)
    verdict = words(gain, "soft targets win", "soft targets lose", "neither clearly wins")
    out.append(f"With both sides tuned on validation, {verdict}: {pair_text(records, soft, hard, kd_share, gain)}.")

    rhos = {key: [r["metrics"]["relations"][f"rho_{key}"] for r in records] for key in ("T1", "chosen")}
    pairs = len(records[0]["arrays"]["classes"]) * (len(records[0]["arrays"]["classes"]) - 1) / 2
    half = 1.96 / np.sqrt(pairs - 1)  # of Spearman's ρ without any relation
    mean, low, high = mean_interval(rhos["chosen"])
    low, high = (low, high) if len(records) > 1 else (mean - half, mean + half)
    relation = "follows" if low > 0 else "runs against" if high < 0 else "does not clearly follow"
    numbers = f"ρ = {np.mean(rhos['chosen']):.2f} at the chosen temperature, {np.mean(rhos['T1']):.2f} at T = 1"
    out.append(
        f"The order of class pairs in the teacher's soft targets {relation} the similarity of mean images: {numbers}."
    )

    c = first["omitted"]["class"]
    keys = [(run_key("omitted", kind), "prior") for kind in ("soft", "hard")]
    gain = contrast(records, lambda _: {keys[0]: 1.0, keys[1]: -1.0}, kd_share, of_class=c)
    recall = [percent(float(np.mean([kd_share(r, key) for r in records]))) for key in keys]
    verdict = words(gain, "more", "fewer", "not clearly more or fewer")
    name = records[0]["arrays"]["classes"][c]
    out.append(
        f"After prior matching, the soft student recognises {verdict} images of class {name}, which it never saw, than "
        f"the one on hard labels: {recall[0]} against {recall[1]}, {points(gain)}."
    )

    student, teacher = ("student", "clean"), ("teacher", "clean")
    loss = difference(records, student, teacher, kd_share)
    size = first["cost"]["student"]["parameters"] / first["cost"]["teacher"]["parameters"]
    verdict = words(
        loss,
        "more accurate than the teacher",
        "less accurate than the teacher",
        "not clearly more or less accurate than it",
    )
    text = pair_text(records, student, teacher, kd_share, loss)
    out.append(f"The student has {percent(size)} of the teacher's parameters and is {verdict}: {text}.")
    for name in (n for n in first["cost"] if n not in ("student", "teacher")):
        gain = difference(records, (name, "clean"), teacher, kd_share)
        verdict = words(gain, "better than", "worse than", "not clearly different from")
        text = pair_text(records, (name, "clean"), teacher, kd_share, gain)
        out.append(f"The {name}, is {verdict} one teacher: {text}.")
    return [*out, interval_note(records)]
