"""Sentences on the attacks of experiment 5: which was worst, whether any was too weak, and which checks are red."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from lib.report.figures.diffpure import teacher_of
from lib.report.figures.diffpure_defences import (
    ADAPTIVE_STUDENT,
    ALONE,
    NONE,
    defence_label,
    defences_of,
    estimate_paired,
)
from lib.utils.draws import OUTSIDE, TRANSFERRED

ATTACK_WORDS = {
    "grey": "the attack on the bare classifier",
    "square": "Square",
    "bpda": "BPDA",
    "fixed": "the gradient of one fixed noise",
    "exact-ce": "the averaged gradient of the cross-entropy",
    "exact-margin": "the averaged gradient of the margin",
    "exact-ten": "the gradient of the draws nearest to failing",
    "apgd": "APGD",
}


def worst_attack_sentences(records: Sequence[dict]) -> list[str]:
    """Return which attack was an image's worst most often, for purifiers and for classifiers alone."""
    out, present = [], defences_of(records)
    groups = {"purified defences": [n for n in present if n not in (NONE, *ALONE)]}
    groups |= {"the teacher": [teacher_of(records)], "classifiers alone": [n for n in present if n in ALONE]}
    for words, names in groups.items():
        counts: Counter[str] = Counter()
        for record in records:
            for name in names:
                counts.update(record["metrics"]["defences"][name]["chosen"])
        total = sum(counts.values())
        if total:
            attack, count = counts.most_common(1)[0]
            moved = sum(c for a, c in counts.items() if a.startswith(TRANSFERRED)) / total
            out.append(
                f"The worst attack on {words} was most often {attack_words(attack)}, for {count / total:.0%} of "
                f"images; images made for other defences together were it for {moved:.0%}."
            )
    return [*out, *choice_sentences(records)]


def choice_sentences(records: Sequence[dict]) -> list[str]:
    """Return whether choosing the worst image by noisy draws made it weaker than the strongest single attack."""
    out = []
    random = [n for n in defences_of(records) if records[0]["metrics"]["defences"][n]["random"]]
    gaps = {}
    for name in random:
        rows = [r["metrics"]["defences"][name] for r in records]
        single = min(float(np.mean([row["attacks"][label] for row in rows])) for label in rows[0]["attacks"])
        gaps[name] = 100 * (float(np.mean([row["accuracy"] for row in rows])) - single)
    if gaps:
        most, mean = max(gaps, key=gaps.__getitem__), float(np.mean(list(gaps.values())))
        verdict = "is weaker than" if mean > 0 else "is no weaker than"
        bias = ", so that what they keep is overstated, beside classifiers alone, whose worst image is certain"
        out.append(
            f"On random defences the worst image, chosen by noisy draws and climbed on from, {verdict} the strongest "
            f"single attack, the least of all attacks' averages: it leaves {mean:+.1f} points on average over "
            f"{len(gaps)} of them, "
            f"at most {gaps[most]:+.1f} ({defence_label(most)}){bias if mean > 0 else ''}."
        )
    times = sum(len(record["metrics"]["weak_attacks"]) for record in records)
    pairs = sum(len(row["attacks"]) for r in records for row in r["metrics"]["defences"].values())
    out.append(
        f"In {times} of {pairs} cases a simpler attack or images made for another defence left less than the exact "
        "gradient, by over half a point of few draws; the records list them."
    )
    return out


def outside_sentences(records: Sequence[dict]) -> list[str]:
    """Return what a smooth perturbation outside the ball leaves, which no worst case includes."""
    names = [n for n in (teacher_of(records), ADAPTIVE_STUDENT, "trades") if n in defences_of(records)]
    left = {n: estimate_paired(records, n, "accuracy", OUTSIDE).value for n in names}
    shown = ", ".join(f"{defence_label(n)} {left[n]:.1f} %" for n in names)
    return [f"Outside the ball, and in no worst case: smooth perturbations of up to 2 ε leave of {shown}."]


def red_check_sentences(records: Sequence[dict]) -> list[str]:
    """Return which sanity checks are red, for which defence and in how many seeds, where any was made."""
    tables = [(name, table) for record in records for name, table in record["arrays"]["diagnosis"].items()]
    red = Counter(
        f"“{check}” of {defence_label(name)}"
        for name, table in tables
        for check, flag in zip(table["check"], table["flag"])
        if flag
    )
    if not tables:
        return []
    listed = ", ".join(f"{words} in {n} of {len(records)} seeds" for words, n in red.most_common())
    return [f"Sanity checks that are red: {listed}." if red else "No sanity check is red."]


def attack_words(attack: str) -> str:
    """Return an attack's label in words."""
    if attack.startswith(TRANSFERRED):
        return f"images made for “{defence_label(attack.removeprefix(TRANSFERRED))}”"
    return ATTACK_WORDS.get(attack, attack)
