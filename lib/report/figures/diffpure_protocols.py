"""Figures of experiment 5 on how defences are measured: publications' protocols, number of queries, share of noise."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lib.report.figures import new_figure
from lib.report.figures.diffpure_defences import (
    ADAPTIVE_STUDENT,
    CLEAN_STUDENT,
    LOOKS,
    NONE,
    ONE_STEP_DDIM,
    defence_label,
    defence_style,
    defences_of,
    estimate_paired,
    estimate_values,
    evidence_note,
    noise_shares,
    point_with_bar,
)
from lib.report.statistics import interval
from lib.utils.draws import MATCHED, NO_ATTACK, all_of_n, unpack_draws

PROTOCOLS = {
    "grey": "attack on the bare classifier",
    "square": "attack without gradient (Square)",
    "bpda": "BPDA, purifier as identity",
    "fixed": "gradient of one fixed noise",
    "from ddim-1": "gradient of a one-step surrogate",
    "exact-ce": "gradient averaged over draws",
}
MOST_QUERIES = 40
MATCHED_ROW, TEN_ROW = "worst attack per image", "… and ten draws"
CONTROL_ROW = "no attack, ten draws"


def inflated_defences(records: Sequence[dict]) -> list[str]:
    """Return the purifiers that are shown under the protocols of publications."""
    wanted = [records[0]["metrics"]["teacher"], ONE_STEP_DDIM, CLEAN_STUDENT, ADAPTIVE_STUDENT]
    return [name for name in wanted if name in defences_of(records)]


def protocol_estimate(records: Sequence[dict], name: str, condition: str, measure: str = "accuracy") -> float:
    """Return what a protocol measures of a defence, in %, NaN where it was not run.

    Args:
        records: one per seed.
        name: of the defence.
        condition: an attack's label, "matched" or "clean".
        measure: see `lib.report.answers.answer_values`.

    Returns:
        The mean over seeds and images.
    """
    if any(condition not in r["outcomes"]["correct"][name] for r in records):
        return float("nan")
    return estimate_paired(records, name, measure, condition).value


def protocol_order(records: Sequence[dict]) -> list[str]:
    """Return the conditions of publications' protocols, from the one that flatters most, on average, to the least."""
    inflation = {}
    for condition in PROTOCOLS:
        names = inflated_defences(records)
        gaps = [protocol_estimate(records, n, condition) - protocol_estimate(records, n, MATCHED) for n in names]
        if np.isfinite(gaps).any():
            inflation[condition] = float(np.nanmean(gaps))
    return sorted(inflation, key=lambda condition: -inflation[condition])


def inflation_table(records: Sequence[dict]) -> pd.DataFrame:
    """Return the accuracy in % of each defence (columns) under each protocol (rows), the most flattering one first."""
    rows = {"no attack": (NO_ATTACK, "accuracy")}
    rows |= {PROTOCOLS[condition]: (condition, "accuracy") for condition in protocol_order(records)}
    rows |= {MATCHED_ROW: (MATCHED, "accuracy"), CONTROL_ROW: (NO_ATTACK, "worst_of_10")}
    rows |= {TEN_ROW: (MATCHED, "worst_of_10")}
    names = inflated_defences(records)
    values = [[protocol_estimate(records, name, *row) for name in names] for row in rows.values()]
    return pd.DataFrame(values, index=list(rows), columns=[defence_label(name) for name in names])


def dp_inflation(records: Sequence[dict]) -> Figure:
    """Draw one and the same purifiers under the protocols of publications and under the matched set of attacks."""
    names, order = inflated_defences(records), protocol_order(records)
    conditions = [NO_ATTACK, *order, MATCHED]
    words = ["no attack", *(PROTOCOLS[c] for c in order), MATCHED_ROW, f"{TEN_ROW} (open: no attack)"]
    figure, axes = new_figure(width=6.2, height=1.2 + 0.36 * len(words))
    for i, name in enumerate(names):
        style, shift = defence_style(name), 0.16 * (i - (len(names) - 1) / 2)
        for row, condition in enumerate(conditions):
            if all(condition in r["outcomes"]["correct"][name] for r in records):
                estimate = estimate_paired(records, name, "accuracy", condition)
                point_with_bar(axes, estimate, row + shift, limits=(0, 100), **style)
        row = len(conditions) + shift
        control = estimate_paired(records, name, "worst_of_10", NO_ATTACK)
        attacked = estimate_paired(records, name, "worst_of_10")
        axes.plot([control.value, attacked.value], [row, row], color=style["color"], linewidth=0.8, zorder=1)
        point_with_bar(axes, control, row, limits=(0, 100), markerfacecolor="white", **style)
        point_with_bar(axes, attacked, row, limits=(0, 100), **style)
    for edge in range(len(words) - 1):
        axes.axhline(edge + 0.5, color="0.9" if edge < len(words) - 3 else "0.4", linewidth=0.6)
    axes.set_yticks(range(len(words)), words, fontsize=7)
    axes.tick_params(axis="y", length=0)
    axes.set(ylim=(len(words) - 0.5, -0.5), xlabel="accuracy of the same defence, by protocol (%)", xlim=(-3, 103))
    axes.set_title(evidence_note(records), fontsize=8)
    handles = [Line2D([], [], linestyle="none", label=defence_label(n), **defence_style(n)) for n in names]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=7)
    sns.despine(figure, left=True)
    return figure


def query_values(record: dict, name: str, condition: str, n_draws: int) -> np.ndarray:
    """Return for each image the chance that so many draws are all right.

    Args:
        record: of one seed.
        name: of the defence.
        condition: an attack's label, "matched" or "clean".
        n_draws: queries of the adversary.

    Returns:
        One number per image.
    """
    correct = unpack_draws(record["outcomes"]["correct"][name][condition])
    return all_of_n(correct.sum(0), len(correct), n_draws)


def query_numbers(records: Sequence[dict], name: str) -> list[int]:
    """Return 1 to `MOST_QUERIES`, or to as many draws as all records have of a random defence."""
    draws = {r["outcomes"]["correct"][name][c]["draws"] for r in records for c in (NO_ATTACK, MATCHED)}
    return list(range(1, 1 + (MOST_QUERIES if draws == {1} else min(MOST_QUERIES, *draws))))


def dp_queries(records: Sequence[dict]) -> Figure:
    """Draw the share of images that is right in N of N queries, against N, with and without attack."""
    wanted = (NONE, records[0]["metrics"]["teacher"], ONE_STEP_DDIM, ADAPTIVE_STUDENT, "trades")
    names = [name for name in wanted if name in defences_of(records)]
    figure, axes = new_figure(width=4.6, height=3.4)
    for name in names:
        style, numbers = defence_style(name), query_numbers(records, name)
        marked = [numbers.index(n) for n in (1, 2, 5, 10, 20, 40) if n in numbers]
        for condition, dashes in ((NO_ATTACK, "--"), (MATCHED, "-")):
            curve = [estimate_values(records, [query_values(r, name, condition, n) for r in records]) for n in numbers]
            look = style | {"linestyle": dashes, "markersize": 4, "markevery": marked, "linewidth": 1.2}
            look |= {"markerfacecolor": "white"} if condition == NO_ATTACK else {"label": defence_label(name)}
            axes.plot(numbers, [e.value for e in curve], **look)
            if condition == MATCHED:
                low, high = np.clip(np.array([interval(e) for e in curve]).T, 0, 100)
                axes.fill_between(numbers, low, high, color=style["color"], alpha=0.15, linewidth=0)
    axes.set_xscale("log")
    axes.set_xticks([1, 2, 5, 10, 20, 40], [1, 2, 5, 10, 20, 40])
    axes.minorticks_off()
    axes.set(xlabel="queries N, each with new noise", ylabel="right in N of N queries (%)", ylim=(-3, 103))
    note = evidence_note(records).replace("bars:", "bands:")
    axes.set_title(f"solid, filled: attacked; dashed, open: no attack\n{note}", fontsize=7)
    figure.legend(loc="outside lower center", ncols=2, fontsize=7)
    sns.despine(figure)
    return figure


def dp_noise(records: Sequence[dict]) -> Figure:
    """Draw what less noise in the student with label term changes, beside adversarial training without purifier."""
    shares = noise_shares(records)
    figure, axes = new_figure(width=4.6, height=3.4)
    if not shares:
        axes.set_axis_off()
        axes.set_title("no students with a label term in this profile")
        return figure
    names, label = sorted(shares, key=lambda name: shares[name]), LOOKS["label"]
    panels = {
        "no attack, average": (NO_ATTACK, "accuracy", "o", "--", "white"),
        "no attack, ten draws (control)": (NO_ATTACK, "worst_of_10", "v", "--", "white"),
        "attacked, average": (MATCHED, "accuracy", "o", "-", label.colour),
        "attacked, ten draws": (MATCHED, "worst_of_10", "v", "-", label.colour),
    }
    for i, (words, (condition, measure, marker, dashes, fill)) in enumerate(panels.items()):
        curve = [estimate_paired(records, name, measure, condition) for name in names]
        low, high = np.clip(np.array([interval(e) for e in curve]).T, 0, 100)
        middle = np.array([e.value for e in curve])
        options = {"marker": marker, "linestyle": dashes, "markerfacecolor": fill, "capsize": 2, "markersize": 5}
        places = [shares[name] + 0.012 * (i - 1.5) for name in names]
        axes.errorbar(places, middle, [middle - low, high - middle], color=label.colour, label=words, **options)
    if "trades" in defences_of(records):
        tint = LOOKS["trades"].colour
        for condition, dashes, words in ((NO_ATTACK, "--", "no attack"), (MATCHED, "-", "attacked")):
            level = estimate_paired(records, "trades", "accuracy", condition).value
            axes.axhline(level, color=tint, linestyle=dashes, linewidth=1, label=f"TRADES, {words}")
    axes.set_xticks(sorted(shares.values()), [f"{share:g}" for share in sorted(shares.values())])
    axes.set(xlabel="share of the noise (0: deterministic)", ylabel="accuracy (%)", ylim=(-3, 103))
    axes.set_title(f"{label.words}, 1 step\n{evidence_note(records)}", fontsize=7)
    figure.legend(loc="outside lower center", ncols=2, fontsize=7)
    sns.despine(figure)
    return figure


def protocol_captions(records: Sequence[dict]) -> dict[str, str]:
    """Return what each figure of this module shows, computed from the records that it draws."""
    first = records[0]["metrics"]
    ball, note = f"Linf, ε = {first['eps']:g} in pixel units", evidence_note(records)
    fresh = f"{first['draws']['fresh']} fresh draws of the defence's noise"
    purifiers = "; ".join(defence_label(name) for name in inflated_defences(records))
    numbers = [query_numbers(records, name)[-1] for name in defences_of(records)]
    shares = sorted(set(noise_shares(records).values()))
    noise = (
        f"Accuracy of {LOOKS['label'].words} in one step against the share of the noise in its output "
        f"({', '.join(f'{s:g}' for s in shares)}; 0 is deterministic), on average over draws and right in ten of ten "
        f"draws, without attack (open, dashed) and under the worst attack per image ({ball}; filled, solid). Lines "
        f"across: TRADES without a purifier, mean. {note}; bars are cut at 0 and 100 %; values of one share stand "
        "side by side."
        if shares
        else f"No students with a label term in this profile. {note.partition(';')[0]}."
    )
    return {
        "dp_inflation": f"The same purifiers ({purifiers}) under the protocols that publications used and under the "
        f"worst attack per image of the matched set ({ball}), accuracy on average over {fresh}; last row: right in "
        f"ten of ten draws, open without attack, filled under attack. {note}; bars are cut at 0 and 100 %; defences "
        "of one row stand one above the other.",
        "dp_queries": "Share of images that a defence classifies correctly in all of N queries, each with new noise, "
        f"N = 1 to {max(numbers)} or to as many as were drawn, without attack (open, dashed) and under the worst "
        f"attack per image ({ball}; filled, solid), estimated from {fresh}. {note.replace('bars:', 'bands:')}, under "
        "attack alone, cut at 0 and 100 %.",
        "dp_noise": noise,
    }
