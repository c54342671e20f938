"""Rank defences, random ones included: `python -m lib leaderboard`.

An entry is the file that `python -m lib evaluate --json` writes, in `docs/leaderboard/entries`, with `about` added by
hand: title, authors and link of whose defence it is. Entries that leave out what a random defence is judged by are
refused.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lib.commands.measures import percent_interval
from lib.report.claim_tables import markdown_rows
from lib.utils.draws import N_DRAWS
from lib.utils.files import ROOT, read_json, shown_path, write_text
from lib.utils.validation import PositiveInt, Share

BOARD = Path("docs/leaderboard")
FEWEST = 100  # images of an entry
Difference = Annotated[float, Field(ge=-1, le=1)]
NonEmpty = Annotated[str, Field(min_length=1)]


class Measured(BaseModel):
    """A share of images with the ends of its 95 % interval."""

    value: Difference
    low: Difference
    high: Difference


class Measures(BaseModel):
    """What `lib.commands.measures.REPORTED` names; a control is what a defence keeps in ten draws without an attack."""

    clean: Measured
    control: Measured
    robust: Measured
    worst_of_10: Measured
    attack_induced_loss: Measured


class AttackCost(BaseModel):
    """What one attack left and took: images sent forward, gradients, and images that got none."""

    accuracy: Share
    forward: Annotated[int, Field(ge=0)]
    backward: Annotated[int, Field(ge=0)]
    no_gradient: Annotated[int, Field(ge=0)] | None


class About(BaseModel):
    """Whose defence an entry is about."""

    title: NonEmpty
    authors: NonEmpty
    link: str = ""


class EvaluationFields(BaseModel):
    """What the JSON of every evaluation says."""

    model_config = ConfigDict(extra="ignore")

    name: NonEmpty
    dataset: NonEmpty
    eps: Annotated[float, Field(gt=0)]
    norm: NonEmpty
    n: PositiveInt
    random: bool
    draws: PositiveInt
    seed: int
    commit: NonEmpty
    protocol: dict[str, Any]
    measures: Measures
    attacks: Annotated[dict[str, AttackCost], Field(min_length=1)]
    red: list[str]
    gradients_per_image: Annotated[float, Field(ge=0)]
    number_forward_passes: PositiveInt
    multiply_adds: int


class LeaderboardEntry(EvaluationFields):
    """What an entry has to say, and what it must not lack: control, draws, seed and gradient counts."""

    about: About
    norm: Literal["Linf", "L2"]
    n: Annotated[int, Field(ge=FEWEST)]
    red: Annotated[list[str], Field(max_length=0)]
    gradients_per_image: Annotated[float, Field(gt=0)]
    multiply_adds: PositiveInt


def first_problem(error: ValidationError) -> str:
    """Return field, expectation and value of the first problem of a record, in one line."""
    first = error.errors()[0]
    place = ".".join(map(str, first["loc"])) or "the file"
    got = "nothing there" if first["type"] == "missing" else f"{first['input']!r:.60}"
    return f"{place}: {first['msg'][:1].lower()}{first['msg'][1:]}, got {got}"


def check_entry_file(path: Path) -> LeaderboardEntry:
    """Return the entry in a file.

    Raises:
        ValueError: for one that leaves out control, draws, seed, gradient counts or another field, has a red mark, or
            was not measured with the standard effort; names file and field.
    """
    try:
        entry = LeaderboardEntry.model_validate(read_json(path))
    except ValidationError as error:
        raise ValueError(f"{shown_path(path)}: {first_problem(error)}") from None
    effort, problem = entry.protocol.get("effort"), ""
    if entry.random and entry.draws < N_DRAWS:
        problem = f"draws: expected at least {N_DRAWS} of a random defence, got {entry.draws}"
    elif effort != "standard":
        problem = f"protocol.effort: expected standard, got {effort!r}: evaluate it again"
    if problem:
        raise ValueError(f"{shown_path(path)}: {problem}")
    return entry


def board_table(entries: Sequence[LeaderboardEntry]) -> str:
    """Return entries of one data set and ball, the most robust in ten draws first, then on average, as Markdown."""
    columns = ["", "defence", "by", "under attack, ten of ten", "under attack, average", "control, ten of ten"]
    columns += ["no attack, average", "attack-induced loss", "evaluations", "10⁶ multiply-adds", "attacks", "gradients"]
    columns.append("n")
    key = lambda entry: (-entry.measures.worst_of_10.value, -entry.measures.robust.value, entry.name)  # noqa: E731
    rows = []
    for rank, entry in enumerate(sorted(entries, key=key), 1):
        m, about = entry.measures, entry.about
        title = f"[{about.title}]({about.link})" if about.link else about.title
        parts = (m.worst_of_10, m.robust, m.control, m.clean, m.attack_induced_loss)
        shares = [percent_interval(part.model_dump()) for part in parts]
        cost = [f"{entry.number_forward_passes}", f"{entry.multiply_adds / 1e6:.2f}"]
        cost += [f"{entry.protocol.get('attacks', '')}", f"{entry.gradients_per_image:.0f}"]
        rows.append([f"{rank}", title, about.authors, *shares, *cost, f"{entry.n}"])
    return markdown_rows(columns, rows)


def board_page(entries: Mapping[str, LeaderboardEntry]) -> str:
    """Return the page of all entries, by data set and ball."""
    parts = [
        "# Leaderboard of random defences",
        "Written by `python -m lib leaderboard` from `entries/`, files of `python -m lib evaluate --json`. RobustBench "
        "leaves random defences out; here they stand beside deterministic ones, in ten draws and on average, each with "
        "what it keeps without an attack in as many draws (control). Shares of images in %, 95 % intervals over them; "
        "a loss in points; gradients per image. Deterministic defences meet AutoAttack's attacks, random ones the "
        "matched set: two sets, so compare across them with care. Every entry is of one network; differences within "
        "the intervals mean nothing. A better attack may leave less.",
    ]
    groups: dict[tuple[str, str, float], list[LeaderboardEntry]] = {}
    for entry in entries.values():
        groups.setdefault((entry.dataset, entry.norm, entry.eps), []).append(entry)
    for (dataset, norm, eps), some in sorted(groups.items()):
        parts.append(f"## {dataset}, {norm}, ε = {eps:.4g}\n\n{board_table(some)}")
    parts.append(
        "## Add yours\n\n`python -m lib evaluate mine:build --data … --eps … --images 500 --json entry.json`, then "
        "`python -m lib leaderboard --check entry.json` and an issue by the form “Evaluate my defence”. An entry needs "
        f"{FEWEST} images, the standard effort, and no red mark."
    )
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Write docs/leaderboard/README.md from its entries, or check a file that is to become one."""
    parser = argparse.ArgumentParser(prog="python -m lib leaderboard", description=main.__doc__)
    parser.add_argument("--check", type=Path, metavar="FILE", help="say whether it can be an entry, and write nothing")
    args = parser.parse_args()
    if args.check:
        entry = check_entry_file(args.check)
        print(f"{entry.about.title}: complete, {entry.n} images")
        return
    files = sorted((ROOT / BOARD / "entries").glob("*.json"))
    if not files:
        raise ValueError(f"expected entries in {BOARD}/entries, got none: write one by `python -m lib evaluate --json`")
    write_text(ROOT / BOARD / "README.md", board_page({path.stem: check_entry_file(path) for path in files}))
    print(f"{len(files)} entries: {BOARD}/README.md")


if __name__ == "__main__":
    main()
