"""The computed parts of README.md and docs/results.md: conclusions, claims and captions, from one profile's records.

`python -m lib.claims --readme` writes them between their marks, `<!-- kd -->` and `<!-- end of kd -->`; a figure's
caption has the figure's name. The whole table of claims goes to data/<profile>/claims.md.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from lib.report.claim_tables import format_estimate, markdown_rows
from lib.report.preregistration import list_seeds
from lib.report.sentences.defensive import defensive_sentences
from lib.report.sentences.diffpure import diffpure_conclusions
from lib.report.sentences.kd import kd_sentences
from lib.report.sentences.robust_distillation import robust_sentences

PAGES = ("README.md", "docs/results.md")  # that have computed parts
SENTENCES = {"kd": kd_sentences, "dd": defensive_sentences, "rd": robust_sentences, "dp": diffpure_conclusions}


def bullet_list(lines: Sequence[str]) -> str:
    """Return lines as a Markdown list."""
    return "\n".join(f"- {line}" for line in lines)


def claim_lines(results: Sequence[Mapping[str, Any]], experiment: str) -> list[str]:
    """Return the measured claims of an experiment, each with its verdict and estimate."""
    rows = [r for r in results if r["experiment"] == experiment and r["value"] is not None]
    return [f"{r['statement']}: **{r['verdict']}**, {format_estimate(r)}." for r in rows]


def readme_blocks(
    records: Mapping[str, Sequence[dict[str, Any]]], results: Sequence[Mapping[str, Any]]
) -> dict[str, str]:
    """Return the body of each block of conclusions by name.

    Args:
        records: of each experiment, one per seed.
        results: of the claims.

    Returns:
        Markdown by the experiment's name; experiment 4 is told by its claims.
    """
    blocks = {name: bullet_list(sentences(records[name])) for name, sentences in SENTENCES.items() if records[name]}
    return blocks | {"diff": bullet_list(claim_lines(results, "diff"))}


def short_answer(results: Sequence[Mapping[str, Any]], protocol: Mapping[str, Any], profile: str) -> str:
    """Return the primary claims that records confirm or not, each with its verdict and estimate, as Markdown.

    Args:
        results: of the claims.
        protocol: from `lib.utils.protocol.read_protocol`.
        profile: whose results they are.
    """
    rows, name = [r for r in results if r["kind"] == "primary" and r["value"] is not None], protocol["name"]
    if not rows:
        return f"No record was made under {name} unchanged: every claim is exploratory."
    counts = Counter(row["verdict"] for row in rows)
    verdicts = ", ".join(f"{n} {verdict}" for verdict, n in counts.most_common())
    seeds = list_seeds(protocol["seeds"][profile][rows[0]["experiment"]])
    head = (
        f"{len(rows)} claims were fixed in commit `{protocol['commit'][:7]}` ({name}), before the run that decides "
        f"them on {seeds}, which no earlier result had used: {verdicts}, p-values adjusted for their number (Holm)."
    )
    table = markdown_rows(
        ["finding", "verdict", "difference [95 %]"],
        [[row["statement"], f"**{row['verdict']}**", format_estimate(row)] for row in rows],
    )
    return f"{head}\n\n{table}"


def caption_blocks(page: str, captions: Mapping[str, str]) -> dict[str, str]:
    """Return the caption of each figure that a page shows, by the figure's name."""
    shown = re.findall(r"\]\((?:\.\./)*figures/[\w-]+/(\w+)\.png\)", page)
    return {name: captions[name] for name in shown if name in captions}


def replace_blocks(page: str, blocks: Mapping[str, str], name: str = PAGES[0]) -> str:
    """Return the text of a page with each block between its marks.

    Args:
        page: the text, with `<!-- <block> -->` and `<!-- end of <block> -->` once for each block.
        blocks: body by name.
        name: of the page, for messages.

    Returns:
        The new text.

    Raises:
        ValueError: where marks are missing or there twice; names them.
    """
    for block, body in blocks.items():
        marks = f"<!-- {block} -->", f"<!-- end of {block} -->"
        if any(page.count(mark) != 1 for mark in marks):
            raise ValueError(f"{name}: expected the lines {marks[0]} and {marks[1]}, once each: put them in")
        head, rest = page.split(marks[0])
        page = f"{head}{marks[0]}\n{body}\n{marks[1]}{rest.split(marks[1])[1]}"
    return page


def fill_pages(pages: Mapping[str, str], blocks: Mapping[str, str], captions: Mapping[str, str]) -> dict[str, str]:
    """Return pages with their blocks and the captions of their figures.

    Args:
        pages: text by name.
        blocks: body by name, each for the page that has its marks.
        captions: of all figures, by name.

    Returns:
        The new text by name.

    Raises:
        ValueError: for a block that no page has, and marks that are missing or there twice.
    """
    if homeless := [block for block in blocks if not any(f"<!-- {block} -->" in text for text in pages.values())]:
        raise ValueError(f"expected <!-- {homeless[0]} --> in {' or '.join(pages)}, got none: put it in")
    return {
        name: replace_blocks(
            text,
            {b: body for b, body in blocks.items() if f"<!-- {b} -->" in text} | caption_blocks(text, captions),
            name,
        )
        for name, text in pages.items()
    }


def claims_page(profile: str, protocol: str, table: str) -> str:
    """Return data/<profile>/claims.md: the protocol, and every claim of a profile with estimate, seeds and verdict."""
    head = f"# Claims of the profile {profile}\n\nWritten by `python -m lib.claims --readme`."
    return f"{head}\n\n{protocol}\n\n{table}\n"
