"""The conclusions of experiment 5 as sentences computed from its records: no number or verdict is typed by hand.

What a sentence says of a difference is decided by its interval (`difference_word`). Intervals are not corrected for the
number of sentences: claims that were fixed beforehand are in `lib.report.claims`.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from lib.report.figures.diffpure import teacher_of
from lib.report.figures.diffpure_defences import (
    ADAPTIVE_STUDENT,
    ALONE,
    CLEAN_STUDENT,
    GROUPS,
    NONE,
    ONE_STEP_DDIM,
    defence_group,
    defence_label,
    defences_of,
    estimate_paired,
    noise_shares,
)
from lib.report.figures.diffpure_protocols import PROTOCOLS, inflated_defences, protocol_estimate, protocol_order
from lib.report.sentences.diffpure_attacks import outside_sentences, red_check_sentences, worst_attack_sentences
from lib.report.statistics import Estimate, equivalence_p, interval
from lib.utils.draws import NO_ATTACK

MARGIN = 2.0  # points; differences within it count as none
LESS, MORE, ALIKE, OPEN = "less", "more", "equivalent", "open"


def difference_kind(estimate: Estimate) -> str:
    """Return "less" or "more" where the 95 % interval excludes 0, else "equivalent" or "open".

    Equivalent is what two one-sided tests at 5 % put within `MARGIN`.
    """
    low, high = interval(estimate)
    if high < 0:
        return LESS
    if low > 0:
        return MORE
    return ALIKE if equivalence_p(estimate, MARGIN) < 0.05 else OPEN


def difference_word(estimate: Estimate) -> str:
    """Return a difference's kind in words, with what it says within `MARGIN`."""
    kind, (low, high) = difference_kind(estimate), interval(estimate)
    if kind in (LESS, MORE):
        return f"{kind}, but by under {MARGIN:g} points" if equivalence_p(estimate, MARGIN) < 0.05 else kind
    if kind == ALIKE:
        return f"equivalent within {MARGIN:g} points"
    return f"no difference shown within [{low:+.1f}, {high:+.1f}]"


def with_interval(estimate: Estimate, sign: bool = True) -> str:
    """Return "+1.2 [-0.4, +2.8]"; without signs for what is no difference."""
    form = "+.1f" if sign else ".1f"
    low, high = interval(estimate)
    return f"{estimate.value:{form}} [{low:{form}}, {high:{form}}]"


def evidence_sentence(records: Sequence[dict]) -> str:
    """Return what all following sentences rest on."""
    images = sum(len(r["outcomes"]["images"]) for r in records)
    seeds = f"{len(records)} seed{'s' * (len(records) != 1)}"
    metrics, over = records[0]["metrics"], "seeds and images" if len(records) > 1 else "the images of one seed"
    return (
        f"Evidence: {seeds}, {images} images in all, Linf ε = {metrics['eps']:g}. Every defence meets the worst of the "
        f"same attacks per image, measured on fresh draws. In brackets 95 % intervals over {over}, of paired "
        "differences where two defences are compared, not corrected for their number. Loss: accuracy without minus "
        "with attack, in points."
    )


def inheritance_sentences(records: Sequence[dict]) -> list[str]:
    """Return whether students inherit the teacher's robustness, by attack-induced loss."""
    present, teacher, steps = defences_of(records), teacher_of(records), records[0]["metrics"]["steps"]
    students = [n for n in dict.fromkeys((CLEAN_STUDENT, f"clean-{steps}")) if n in present]
    gain = estimate_paired(records, teacher, "loss", minus=NONE)
    out, kinds = [], []
    for name in students:
        difference = estimate_paired(records, name, "loss", minus=teacher)
        kinds.append(difference_kind(difference))
        loss, own = (with_interval(estimate_paired(records, n, "loss"), sign=False) for n in (name, teacher))
        out.append(
            f"{capital(defence_label(name))}: the attack costs it {loss} points of accuracy, its teacher {own}; "
            f"difference {with_interval(difference)}: {difference_word(difference)}."
        )
    shown = f"the teacher's loss minus that of the bare classifier is {with_interval(gain)} points"
    if difference_kind(gain) != LESS:
        answer = f"There is none shown to inherit: {shown}."
    elif all(kind in (LESS, ALIKE) for kind in kinds):
        answer = f"Yes, all of it: {shown}, and no student of clean pairs loses more than the teacher."
    elif all(kind == MORE for kind in kinds):
        answer = f"Not all of it: {shown}, and students of clean pairs lose more than the teacher."
    else:
        answer = f"Not decided for every student of clean pairs: {shown}."
    pairs = {
        (ONE_STEP_DDIM, teacher): "The undistilled network in one step, without any training, minus the teacher",
        (CLEAN_STUDENT, ONE_STEP_DDIM): "What distillation itself adds, student of clean pairs minus undistilled one",
    }
    for (name, minus), words in pairs.items():
        if ONE_STEP_DDIM in present:
            difference = estimate_paired(records, name, "loss", minus=minus)
            out.append(f"{words}: {with_interval(difference)} points of loss: {difference_word(difference)}.")
    return [f"Does the student inherit robustness? {answer}", *out]


def control_sentences(records: Sequence[dict]) -> list[str]:
    """Return how much of what students lead by in ten draws is there without any attack."""
    teacher, steps = teacher_of(records), records[0]["metrics"]["steps"]
    out = []
    for name in dict.fromkeys((CLEAN_STUDENT, ADAPTIVE_STUDENT, f"adaptive-{steps}")):
        if name not in defences_of(records):
            continue
        attacked = estimate_paired(records, name, "worst_of_10", minus=teacher)
        control = estimate_paired(records, name, "worst_of_10", NO_ATTACK, minus=teacher)
        induced = estimate_paired(records, name, "worst_loss", minus=teacher)
        out.append(
            f"{capital(defence_label(name))}, right in ten of ten draws, minus the teacher: {with_interval(attacked)} "
            f"points under attack, {with_interval(control)} without any attack; what the attack costs in ten draws "
            f"differs by {with_interval(induced)}: {difference_word(induced)}."
        )
    return out


def constraint_sentences(records: Sequence[dict]) -> list[str]:
    """Return what the adversarial constraint adds, and what distillation adds to it."""
    present, steps = defences_of(records), records[0]["metrics"]["steps"]
    pairs = {(f"adaptive-{s}", f"clean-{s}"): "The constraint" for s in dict.fromkeys((1, steps))}
    pairs |= {
        (ADAPTIVE_STUDENT, teacher_of(records)): "The student with the constraint against its teacher",
        (ADAPTIVE_STUDENT, "grey-1"): "δ through the student itself in place of the grey box's",
        ("undistilled-adaptive-1", ADAPTIVE_STUDENT): "The constraint from the undistilled network",
    }
    out = []
    for (name, minus), words in pairs.items():
        if name in present and minus in present:
            loss = estimate_paired(records, name, "loss", minus=minus)
            accuracy = estimate_paired(records, name, "accuracy", minus=minus)
            out.append(
                f"{words} ({defence_label(name)} minus {defence_label(minus)}): {with_interval(loss)} points of loss: "
                f"{difference_word(loss)}; accuracy under attack {with_interval(accuracy)}."
            )
    return out


def adversarial_training_sentences(records: Sequence[dict]) -> list[str]:
    """Return what adversarially trained classifiers do beside the purifiers, at which cost."""
    present, out = defences_of(records), []
    defences = records[0]["metrics"]["defences"]
    purifiers = [n for n in present if defence_group(n) == GROUPS[0] and n != NONE]
    for name in (n for n in ALONE if n in present):
        accuracy = estimate_paired(records, name, "accuracy", minus=ADAPTIVE_STUDENT)
        worst = estimate_paired(records, name, "worst_of_10", minus=ADAPTIVE_STUDENT)
        loss = estimate_paired(records, name, "loss", minus=ADAPTIVE_STUDENT)
        ratio = defences[name]["multiply_adds"] / defences[ADAPTIVE_STUDENT]["multiply_adds"]
        kinds = Counter(difference_kind(estimate_paired(records, p, "accuracy", minus=name)) for p in purifiers)
        out.append(
            f"{defence_label(name)}, without a purifier and at {ratio:.2g} times the multiply-adds of "
            f"{defence_label(ADAPTIVE_STUDENT)}, minus that student: accuracy under attack "
            f"{with_interval(accuracy)} on average: {difference_word(accuracy)}; in ten of ten draws "
            f"{with_interval(worst)}; {with_interval(loss)} points of loss. Of {len(purifiers)} purifiers "
            f"{kinds[LESS]} keep less accuracy than it, {kinds[MORE]} more."
        )
    for name in (n for n in present if defence_group(n) == GROUPS[2]):
        classifier = name.partition(" + ")[2]
        if classifier in present:
            average = estimate_paired(records, name, "accuracy", minus=classifier)
            worst = estimate_paired(records, name, "worst_of_10", minus=classifier)
            out.append(
                f"A purifier before it ({defence_label(name)}) minus {defence_label(classifier)} alone: accuracy "
                f"under attack {with_interval(average)}: {difference_word(average)}; in ten of ten draws "
                f"{with_interval(worst)}."
            )
    return out


def noise_sentences(records: Sequence[dict]) -> list[str]:
    """Return how much of the robustness of the student with label term needs its noise."""
    present = defences_of(records)
    shares = sorted((share, name) for name, share in noise_shares(records).items())
    if len(shares) < 2:
        return []
    (least, quiet), (most, noisy) = shares[0], shares[-1]
    accuracy = estimate_paired(records, noisy, "accuracy", minus=quiet)
    worst = estimate_paired(records, noisy, "worst_of_10", minus=quiet)
    clean = estimate_paired(records, noisy, "worst_of_10", NO_ATTACK, minus=quiet)
    answer = {
        LESS: "none of it is noise, which costs accuracy",
        MORE: f"{accuracy.value:.1f} points of it are noise",
        ALIKE: f"none of it is noise, within {MARGIN:g} points",
        OPEN: "not decided",
    }[difference_kind(accuracy)]
    sweep = ", ".join(f"{estimate_paired(records, n, 'accuracy').value:.1f} % at {share:g}" for share, n in shares)
    out = [
        f"How much of the label student's accuracy under attack is noise? {capital(answer)}: share {most:g} minus "
        f"share {least:g} of the noise {with_interval(accuracy)} points on average; in ten of ten draws "
        f"{with_interval(worst)} under attack and {with_interval(clean)} without any. By share of the noise: {sweep}."
    ]
    if "trades" in present:
        for share, name in (shares[-1], shares[0]):
            difference = estimate_paired(records, name, "accuracy", minus="trades")
            out.append(
                f"The label student at noise share {share:g} minus TRADES, accuracy under attack: "
                f"{with_interval(difference)}: {difference_word(difference)}."
            )
    return out


def inflation_sentences(records: Sequence[dict]) -> list[str]:
    """Return by how much publications' protocols inflate the accuracy of one and the same defence."""
    out = []
    for name in inflated_defences(records):
        values = {c: protocol_estimate(records, name, c) for c in protocol_order(records)}
        values = {c: v for c, v in values.items() if np.isfinite(v)}
        if not values:
            continue
        flattering = max(values, key=lambda c: values[c])
        worst, ten = (estimate_paired(records, name, measure) for measure in ("accuracy", "worst_of_10"))
        control = estimate_paired(records, name, "worst_of_10", NO_ATTACK)
        apart = values[flattering] - worst.value
        out.append(
            f"{capital(defence_label(name))}: {values[flattering]:.1f} % under “{PROTOCOLS[flattering]}”, "
            f"{worst.value:.1f} % under the worst attack per image, {apart:.1f} points apart; right in ten of ten "
            f"draws {ten.value:.1f} % under attack, {control.value:.1f} % without any."
        )
    return out


def capital(text: str) -> str:
    """Return a text with a capital as its first letter."""
    return text[:1].upper() + text[1:]


def diffpure_conclusions(records: Sequence[dict]) -> list[str]:
    """Return all computed sentences of experiment 5, the headline first after what they rest on."""
    parts = (inheritance_sentences, control_sentences, constraint_sentences, adversarial_training_sentences)
    parts += (noise_sentences, inflation_sentences, worst_attack_sentences, outside_sentences, red_check_sentences)
    return [evidence_sentence(records), *(sentence for part in parts for sentence in part(records))]
