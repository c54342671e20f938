"""Tables of pieces of GPU minutes, as Markdown: every interval is over the images of one seed."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lib.report.claim_tables import format_estimate, format_published, format_rule, format_size, markdown_rows
from lib.report.figures.diffpure_defences import defence_label, defences_of, estimate_paired
from lib.report.figures.diffpure_protocols import inflation_table
from lib.report.figures.pieces import (
    WORST_CASE,
    baseline_of,
    classifier_label,
    clean_estimate,
    clip_interval,
    purified_by,
    share_estimate,
)
from lib.report.piece_files import Pieces, autoattack_record
from lib.report.statistics import Estimate
from lib.utils.draws import NO_ATTACK
from lib.utils.specs import PurifierSpec

PER_THOUSAND = 1000  # of squared pixel units, in tables
CURVE_ROWS = 8  # of a training


def estimate_text(estimate: Estimate, form: str = ".1f", least: float = 0) -> str:
    """Return an estimate in %, or in points, with its interval, which is cut at `least` and 100."""
    low, high = clip_interval(estimate, (least, 100))
    return f"{estimate.value:{form}} [{low:{form}}, {high:{form}}]"


def number_text(value: float | None, form: str = ".1f") -> str:
    """Return a number, a dash for none."""
    return "–" if value is None or math.isnan(value) else f"{value:{form}}"


def range_text(counts: Sequence[int]) -> str:
    """Return the numbers of images that a column rests on: "1,000", or "40 to 1,000"."""
    low, high = min(counts), max(counts)
    return f"{high:,}" if low == high else f"{low:,} to {high:,}"


def claims_rows(results: Sequence[Mapping[str, Any]]) -> str:
    """Return the claims that a piece measures, with estimate and verdict."""
    columns = ["claim", "statement", "rule", "here [95 %]", "n", "piece", "verdict", "published", "agrees"]
    rows = []
    for r in results:
        cells = [f"`{r['id']}`", r["statement"], format_rule(r), format_estimate(r), format_size(r), f"`{r['piece']}`"]
        rows.append([*cells, r["verdict"], format_published(r), r["agrees"]])
    return markdown_rows(columns, rows)


def unmeasured_rows(results: Sequence[Mapping[str, Any]]) -> str:
    """Return the claims that no piece measures, with the reason."""
    return markdown_rows(["claim", "statement", "why"], [[f"`{r['id']}`", r["statement"], r["why"]] for r in results])


def classifiers_table(pieces: Pieces) -> str:
    """Return all classifiers: accuracy without attack, after a short PGD and under AutoAttack, paired with TRADES.

    Those fine-tuned on purified images are in `purified_classifiers_table`; without others it is empty.
    """
    columns = ["classifier", "epochs", "minutes", "clean (%)", "short PGD (%)", "AutoAttack (%)"]
    columns.append("AutoAttack, minus TRADES of this architecture (points)")
    record = autoattack_record(pieces) if pieces.autoattack else None
    alone, rows = {name: card for name, card in pieces.classifiers.items() if not purified_by(card)}, []
    for name, card in alone.items():
        metrics, robust, difference = card["metrics"], "–", "–"
        if record and name in pieces.autoattack:
            robust = estimate_text(estimate_paired([record], name, "accuracy", WORST_CASE))
            if base := baseline_of(pieces, name):
                paired = estimate_paired([record], name, "accuracy", WORST_CASE, base)
                difference = estimate_text(paired, "+.1f", -100)
        pgd = next((100 * v for k, v in metrics.items() if k.startswith("pgd_")), None)
        cells = [classifier_label(card), f"{card['recipe']['epochs']}", f"{card['minutes']:.1f}"]
        rows.append([*cells, estimate_text(clean_estimate(card)), number_text(pgd), robust, difference])
    if not alone:
        return ""
    images = [f"clean {range_text([card['metrics']['n'] for card in alone.values()])}"]
    images.append(f"short PGD {range_text([card['metrics']['n_pgd'] for card in alone.values()])}")
    if record:
        images.append(f"AutoAttack {range_text([len(record['outcomes']['images'])])}, the same for all")
    return f"Test images: {', '.join(images)}.\n\n{markdown_rows(columns, rows)}"


def purified_classifiers_table(pieces: Pieces) -> str:
    """Return what fine-tuning on purified images changes, beside the classifier that it began as; may be empty."""
    rows = []
    for card in (card for card in pieces.classifiers.values() if purified_by(card)):
        purifier, metrics = purified_by(card), card["metrics"]
        for words, row in ((classifier_label(card), metrics), ("before it", metrics.get("plain"))):
            if row:
                shares = [estimate_text(share_estimate(row[key], row["n"])) for key in ("clean", purifier)]
                rows.append([words, *shares, f"{row['n']:,}"])
    columns = ["classifier", "clean (%)", "purified (%)", "validation images"]
    return markdown_rows(columns, rows) if rows else ""


def network_of(purifier: str) -> str:
    """Return the name of the diffusion network that a purifier runs."""
    kind = PurifierSpec.parse(purifier).kind
    return "teacher" if kind in ("sde", "ddpm", "ode", "ddim") else kind


def purifiers_table(pieces: Pieces) -> str:
    """Return all measured purifiers: accuracy on purified images without attack, and distance to the teacher's path."""
    accuracy: dict[str, tuple[float, int]] = {}
    distance: dict[str, float] = {}
    for card in pieces.networks.values():
        purified = card["metrics"].get("purified", {})
        accuracy |= {name: (share, purified["n"]) for name, share in purified.items() if name != "n"}
        distance |= {
            key.removesuffix("_to_ode_100"): PER_THOUSAND * value
            for key, value in card["metrics"].items()
            if key.endswith("_to_ode_100")
        }
    columns = ["purifier", "network", "minutes of training", "accuracy on purified images (%)", "images"]
    rows = []
    for name in dict.fromkeys([*accuracy, *distance]):
        share, n = accuracy.get(name, (math.nan, 0))
        network, value = network_of(name), estimate_text(share_estimate(share, n)) if n else "–"
        minutes = pieces.networks[network]["minutes"] if network in pieces.networks else None
        cells = [defence_label(name), f"`{network}`", number_text(minutes), value, f"{n:,}" if n else "–"]
        rows.append([*cells, number_text(distance.get(name), ".3g")])
    return markdown_rows([*columns, "distance to the ODE in 100 steps (10⁻³ px²)"], rows)


def curve_table(card: Mapping[str, Any]) -> str:
    """Return the diffusion model's validation error against minutes, some epochs of all."""
    curve = card["metrics"]["curve"]
    chosen = sorted({round(i) for i in np.linspace(0, len(curve) - 1, CURVE_ROWS)})
    rows = [["minutes", *(f"{curve[i]['minutes']:.2f}" for i in chosen)]]
    rows.append(["validation error (10⁻³ px²)", *(f"{PER_THOUSAND * curve[i]['error']:.4g}" for i in chosen)])
    return markdown_rows(["epoch", *(str(i + 1) for i in chosen)], rows)


def networks_section(pieces: Pieces) -> str:
    """Return what was measured of the diffusion networks: purifiers, and the teacher's training."""
    parts = []
    if any(card["metrics"].get("purified") for card in pieces.networks.values()):
        parts.append(f"Validation images, purified once, without attack.\n\n{purifiers_table(pieces)}")
    if teacher := pieces.networks.get("teacher"):
        error = PER_THOUSAND * teacher["metrics"]["validation_error"]
        about = f"The teacher's validation error is {error:.4g} · 10⁻³ px² after {teacher['minutes']:.1f} minutes"
        parts.append(f"{about}, as it is saved. During the training:\n\n{curve_table(teacher)}")
    return "\n\n".join(parts)


def defences_table(record: dict[str, Any]) -> str:
    """Return all defences of a piece of the matched set: accuracies, losses, multiply-adds."""
    columns = ["defence", "clean (%)", "ten draws, no attack (%)", "attacked (%)", "loss (points)"]
    columns += ["ten draws, attacked (%)", "10⁶ multiply-adds"]
    rows = []
    for name in defences_of([record]):
        shown = [("accuracy", NO_ATTACK), ("worst_of_10", NO_ATTACK), ("accuracy",), ("loss",), ("worst_of_10",)]
        estimates = {what: estimate_paired([record], name, *what) for what in shown}
        cells = [estimate_text(e, least=-100 if what == ("loss",) else 0) for what, e in estimates.items()]
        cost = record["metrics"]["defences"][name]["multiply_adds"] / 1e6
        rows.append([defence_label(name), *cells, f"{cost:,.0f}" if cost >= 10 else f"{cost:.2g}"])
    return markdown_rows(columns, rows)


def protocols_table(record: dict[str, Any]) -> str:
    """Return the accuracy in % of the same purifiers under publications' protocols, the most flattering first."""
    table = inflation_table([record])
    rows = [[str(words), *(number_text(value) for value in values)] for words, values in zip(table.index, table.values)]
    return markdown_rows(["protocol", *table.columns], rows)


def speed_table(bench: Mapping[str, Any]) -> str:
    """Return how many times as fast as plain float32 networks run in other forms, one row for each work."""
    kinds = list(dict.fromkeys(way for table in bench["tables"].values() for way in table))
    rows = [
        [work, *(number_text(table.get(way, {}).get("ratio"), ".2f") for way in kinds)]
        for work, table in bench["tables"].items()
    ]
    return markdown_rows(["work", *kinds], rows)


def minutes_table(pieces: Pieces) -> str:
    """Return all finished pieces with their minutes, device and commit, and the minutes of all."""
    cards = dict(pieces.cards())
    rows = [[f"`{k}`", f"{c['minutes']:.1f}", c["device"], f"`{c['commit'][:7]}`"] for k, c in cards.items()]
    rows.append(["all", f"{sum(card['minutes'] for card in cards.values()):.1f}", "", ""])
    return markdown_rows(["piece", "minutes", "device", "commit"], rows)
