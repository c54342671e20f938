"""Tables of the pieces on classic and defensive distillation, as Markdown, from their outcomes per image."""

from collections.abc import Mapping

from lib.report.answers import answer_values
from lib.report.claim_tables import markdown_rows
from lib.report.figures.diffpure_defences import estimate_paired
from lib.report.piece_files import Entry
from lib.report.piece_tables import estimate_text
from lib.report.statistics import estimate_images, scale_estimate
from lib.utils.draws import NO_ATTACK
from lib.utils.record_keys import run_key, run_parts


def label_counts_table(piece: Entry) -> str:
    """Return the students' accuracies by number of labels, hard and soft, and their difference over student seeds."""
    correct, images = piece["outcomes"]["correct"], piece["outcomes"]["images"]
    keys = [run_parts(key) for key in correct if len(run_parts(key)) == 3]
    seeds = list(dict.fromkeys(seed for *_, seed in keys))
    rows, over = [], ""
    for count in dict.fromkeys(count for _, count, _ in keys):
        soft, hard = (
            [answer_values(correct[run_key(kind, count, s)], NO_ATTACK, "accuracy") for s in seeds]
            for kind in ("soft", "hard")
        )
        values = {"hard": (hard, ".1f", 0), "soft": (soft, ".1f", 0)}
        values["gain"] = ([a - b for a, b in zip(soft, hard)], "+.1f", -100)
        rows.append([count])
        for arrays, form, least in values.values():
            estimate = estimate_images(arrays, [images] * len(arrays), resamples=0)
            rows[-1].append(estimate_text(scale_estimate(estimate, 100), form, least))
            over = estimate.over
    columns = ["labels", "hard labels (%)", "soft targets (%)", "soft minus hard (points)"]
    note = f"{len(seeds)} seeds of students × {len(images):,} test images, intervals over {over}; one teacher"
    teacher = 100 * float(answer_values(correct["teacher"], NO_ATTACK, "accuracy").mean())
    return f"{note}, whose accuracy is {teacher:.1f} %.\n\n{markdown_rows(columns, rows)}"


def temperatures_table(piece: Entry) -> str:
    """Return each network's accuracy without attack and, for each radius, under FGSM and in the worst case."""
    correct = piece["outcomes"]["correct"]
    conditions = [NO_ATTACK]
    present = list(dict.fromkeys(name for each in correct.values() for name in each))
    conditions += [name for start in ("fgsm@", "worst@") for name in present if name.startswith(start)]
    rows = []
    for name, each in correct.items():
        estimates = [estimate_paired([piece], name, "accuracy", c) if c in each else None for c in conditions]
        rows.append([name, *("–" if e is None else estimate_text(e) for e in estimates)])
    words = [c.replace("@", ", ε = ").replace("fgsm", "FGSM").replace("worst", "all attacks") for c in conditions]
    note = f"One seed, {len(piece['outcomes']['images']):,} test images; accuracy in %, intervals over images"
    return f"{note}; all attacks: worst case per image.\n\n{markdown_rows(['network', *words], rows)}"


DISTILLATION_PIECES = {
    "kd/labels": ("Classic distillation: soft targets by number of labels", label_counts_table),
    "dd/temperatures": ("Defensive distillation", temperatures_table),
}


def distillation_tables(others: Mapping[str, Entry]) -> dict[str, str]:
    """Return the tables of the finished pieces, by their titles."""
    return {title: table(others[name]) for name, (title, table) in DISTILLATION_PIECES.items() if name in others}
