"""The page of one evaluation: `python -m lib report OUT.json REPORT.html`, see `--help`.

One file that asks for nothing outside itself. Every value is that of the record of `python -m lib evaluate --json`.
"""

import argparse
import base64
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import matplotlib.pyplot as plt
import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure
from pydantic import BaseModel, Field, ValidationError

from lib.commands.check_meanings import MEANINGS
from lib.commands.leaderboard import EvaluationFields, first_problem
from lib.commands.measures import REPORTED, interval_over_images, percent_interval
from lib.report.figures import COLOURS, new_figure
from lib.utils.draws import MATCHED, NO_ATTACK, all_of_n, unpack_draws
from lib.utils.files import check_writable, dump_canonical, read_json, shown_path, to_jsonable, write_text
from lib.utils.validation import PositiveInt, Share

TEMPLATE = "report.html"
PngUri = Annotated[str, Field(pattern=r"^data:image/png;base64,[A-Za-z0-9+/=]+$")]


class PackedDraws(BaseModel):
    """Answers by image and draw, see `lib.utils.draws.pack_draws`."""

    draws: PositiveInt
    n: PositiveInt
    correct: str


class Outcomes(BaseModel):
    """Numbers of the images, and the answers to them by condition."""

    images: list[int]
    correct: dict[str, PackedDraws]


class PictureAnswer(BaseModel):
    """Share of right answers to one image, and the class that was answered most."""

    right: Share
    most: int


class PictureRow(BaseModel):
    """One image as pictures, with its label and answers by condition."""

    label: int
    answers: dict[str, PictureAnswer]
    images: dict[str, PngUri]


class CheckRow(BaseModel):
    """One sanity check; `measured` is None where it was not measured."""

    check: Literal[tuple(MEANINGS)]  # pyright: ignore[reportInvalidTypeForm]
    measured: float | None
    threshold: float
    flag: bool
    source: str
    advice: str


class EvaluationRecord(EvaluationFields):
    """What a page shows of an evaluation; pictures and checks may be missing, as in older records."""

    notes: list[str]
    outcomes: Outcomes
    source: dict[str, Any] = Field(default_factory=dict)
    device: str = ""
    torch: str = ""
    python: str = ""
    command: str = ""
    pictures: list[PictureRow] = Field(default_factory=list)
    checks: list[CheckRow] | None = None


def svg_uri(figure: Figure) -> str:
    """Return a figure as the data URI of an SVG file, its text as outlines, and close it."""
    buffer = io.BytesIO()
    with plt.rc_context({"svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    plt.close(figure)
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def attacks_figure(record: EvaluationRecord) -> Figure:
    """Draw the accuracy that each attack leaves as a bar, strongest first; all of them and none as lines."""
    rows = sorted(record.attacks.items(), key=lambda row: row[1].accuracy)
    figure, axes = new_figure(width=5.2, height=0.9 + 0.24 * len(rows))
    colours = [COLOURS[0] if cost.backward else "0.6" for _, cost in rows]
    axes.barh([name for name, _ in rows], [100 * cost.accuracy for _, cost in rows], color=colours, height=0.65)
    for measure, colour, words in (
        (record.measures.robust, "0.1", "worst of all"),
        (record.measures.clean, "0.5", "none"),
    ):
        axes.axvspan(100 * measure.low, 100 * measure.high, color=colour, alpha=0.12, linewidth=0)
        axes.axvline(100 * measure.value, color=colour, linewidth=1, label=words)
    axes.invert_yaxis()
    axes.set(xlim=(0, 100), xlabel="accuracy in %: bars by attack, lines with 95 % interval")
    axes.legend(title="attack", loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


def draws_figure(record: EvaluationRecord) -> Figure:
    """Draw the share of images that are right in each of 1, 2, … draws, without an attack and under it."""
    figure, axes = new_figure(width=5.2, height=2.3)
    for condition, colour, words in ((NO_ATTACK, "0.5", "no attack (control)"), (MATCHED, COLOURS[0], "under attack")):
        packed = record.outcomes.correct[condition]
        right = unpack_draws(packed.model_dump()).sum(0)
        draws = np.arange(1, packed.draws + 1)
        rows = [interval_over_images(all_of_n(right, packed.draws, int(k)), record.outcomes.images) for k in draws]
        value, low, high = (100 * np.array([row[key] for row in rows]) for key in ("value", "low", "high"))
        axes.fill_between(draws, low, high, color=colour, alpha=0.2, linewidth=0)
        axes.plot(draws, value, color=colour, label=words)
    axes.set(xlim=(1, record.draws), ylim=(0, 100), xlabel="draws", ylabel="right in all draws, %")
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


def read_record(result: Any, source: str) -> EvaluationRecord:
    """Return a record of an evaluation, checked.

    Args:
        result: what `python -m lib evaluate --json` writes.
        source: its name in messages.

    Returns:
        The record.

    Raises:
        ValueError: for another one; names the first field that is missing or has no such value.
    """
    try:
        record = EvaluationRecord.model_validate_json(dump_canonical(to_jsonable(result)))  # sorted, as in a file
        for condition in (NO_ATTACK, MATCHED):
            unpack_draws(record.outcomes.correct[condition].model_dump())
    except ValidationError as error:
        expected = "expected a record of `python -m lib evaluate --json`"
        raise ValueError(f"{source}: {expected}: {first_problem(error)}") from None
    except KeyError as error:
        raise ValueError(f"{source}: expected answers of the condition {error}, got none") from None
    return record


def report_page(result: Any, source: str = "the record") -> str:
    """Return the page of an evaluation.

    Args:
        result: see `read_record`.
        source: its name in messages.

    Returns:
        HTML that asks for nothing outside itself.
    """
    record = read_record(result, source)
    shown = [name for name in REPORTED if record.random or name not in ("control", "worst_of_10")]
    measures = {name: percent_interval(getattr(record.measures, name).model_dump()) for name in shown}
    figures = {"attacks": svg_uri(attacks_figure(record))}
    figures |= {"draws": svg_uri(draws_figure(record))} if record.draws > 1 else {}
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    checks = sorted(record.checks or [], key=lambda row: not row.flag)
    return environment.get_template(TEMPLATE).render(
        r=record, measures=measures, words=REPORTED, figures=figures, checks=checks, meanings=MEANINGS
    )


def save_page(path: Path, result: Mapping[str, Any]) -> None:
    """Write the page of an evaluation."""
    write_text(path, report_page(result))


def main() -> int:
    """Write the page of an evaluation from its JSON file, as `evaluate --html` does.

    Exit status: 0; 1 for an error.
    """
    parser = argparse.ArgumentParser(prog="python -m lib report", description=main.__doc__)
    parser.add_argument("source", metavar="OUT.json", type=Path, help="what `python -m lib evaluate --json` wrote")
    parser.add_argument("target", metavar="REPORT.html", type=Path, help="the file to write")
    args = parser.parse_args()
    check_writable(args.target)
    write_text(args.target, report_page(read_json(args.source), shown_path(args.source)))
    print(f"{shown_path(args.target)}: {args.target.stat().st_size / 1000:.0f} kB")
    return 0
