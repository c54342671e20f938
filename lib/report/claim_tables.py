"""Claims as Markdown tables: those of one profile, grouped by experiment, or of several side by side."""

from collections.abc import Mapping, Sequence
from typing import Any

TITLES = {
    "kd": "Experiment 1: classic knowledge distillation",
    "dd": "Experiment 2: defensive distillation",
    "rd": "Experiment 3: robust distillation",
    "diff": "Experiment 4: diffusion distillation",
    "dp": "Experiment 5: distilled DiffPure",
    "speed": "Experiment 5: speed",
}


def format_number(value: float | None, signed: bool = False) -> str:
    """Return a number with two decimals, with its sign if `signed`; a dash for None."""
    return "–" if value is None else f"{value:+.2f}" if signed else f"{value:.2f}"


def format_estimate(result: Mapping[str, Any]) -> str:
    """Return a result as value, interval and unit, differences in points with their sign; a dash without value."""
    if result["value"] is None:
        return "–"
    signed, (low, high) = result["unit"] == "points", result["ci95"]
    interval = "" if low is None else f" [{format_number(low, signed)}, {format_number(high, signed)}]"
    return f"{format_number(result['value'], signed)}{interval} {result['unit']}"


def format_seeds(result: Mapping[str, Any]) -> str:
    """Return the value of each seed, a dash for none."""
    return ", ".join(f"{value:.3g}" for value in result["per_seed"]) or "–"


def format_size(result: Mapping[str, Any]) -> str:
    """Return seeds and images of each, and what the interval is over."""
    n = result["n_seeds"]
    if n == 0:
        return "–"
    images = f" × {result['n_images'] / n:.0f} images" if result["n_images"] else ""
    return f"{n} seed{'s' if n > 1 else ''}{images}; over {result['over']}"


def format_rule(result: Mapping[str, Any]) -> str:
    """Return a rule and its margin in words."""
    rule, margin = result["rule"], result["margin"]
    if rule == "zero":
        return "0 in every seed"
    words = "no margin" if margin is None else f"{'within ±' if rule == 'equivalent' else f'{rule} '}{margin:g}"
    return f"**{words}**, primary" if result["kind"] == "primary" else words


def format_verdict(result: Mapping[str, Any]) -> str:
    """Return the verdict, for a primary claim with its p-value before and after Holm's adjustment."""
    if result["p_holm"] is None:
        return result["verdict"]
    return f"{result['verdict']}, p = {result['p']:.2g}, {result['p_holm']:.2g} adjusted"


def format_published(result: Mapping[str, Any]) -> str:
    """Return the published figure with its reference, a dash for none."""
    published = result["published"]
    return "–" if published is None else f"{published['reference']}: {published['figure']}"


def markdown_rows(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return rows of text as a Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |" for line in lines)


def by_experiment(results: Sequence[Mapping[str, Any]]) -> dict[str, list[int]]:
    """Return the numbers of the results of each experiment, under its title, in the order of the claims."""
    groups: dict[str, list[int]] = {}
    for i, result in enumerate(results):
        experiment = str(result["experiment"])
        groups.setdefault(TITLES.get(experiment, experiment), []).append(i)
    return groups


def claims_table(results: Sequence[Mapping[str, Any]]) -> str:
    """Return the claims of one profile as Markdown, a table for each experiment."""
    columns = ["claim", "statement", "rule", "ours [95 %]", "per seed", "n", "verdict", "published", "agrees"]
    parts = []
    for title, numbers in by_experiment(results).items():
        rows = [
            [
                f"`{r['id']}`",
                r["statement"],
                format_rule(r),
                format_estimate(r),
                format_seeds(r),
                format_size(r),
                format_verdict(r),
                format_published(r),
                r["agrees"],
            ]
            for r in (results[i] for i in numbers)
        ]
        parts.append(f"**{title}**\n\n{markdown_rows(columns, rows)}")
    return "\n\n".join(parts)


def format_cell(result: Mapping[str, Any]) -> str:
    """Return all of one result in a cell: estimate, values of the seeds, size, rule and verdict."""
    if result["value"] is None:
        return "–"
    parts = [format_estimate(result), format_seeds(result), format_size(result)]
    rule = "" if result["margin"] is None else f"{format_rule(result)}: "
    return "; ".join([*parts, f"{rule}{format_verdict(result)}"])


def compare_profiles(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Return the claims of several profiles side by side, as Markdown, a table for each experiment.

    Args:
        results: of each profile, in the order of the columns.

    Raises:
        ValueError: unless the results are of the same claims.
    """
    first, *others = results.values()
    ids = [[r["id"] for r in some] for some in results.values()]
    if any(other != ids[0] for other in ids):
        raise ValueError(f"expected results of the same claims, got others in one of {', '.join(results)}: decide anew")
    parts = []
    for title, numbers in by_experiment(first).items():
        rows = []
        for i in numbers:
            same = [first[i], *(some[i] for some in others)]
            cells = [format_cell(r) for r in same]
            agrees = ", ".join(r["agrees"] for r in same)
            rows.append([first[i]["statement"], *cells, format_published(first[i]), agrees])
        columns = [f"{name}: estimate [95 %]; per seed; n; verdict" for name in results]
        parts.append(f"**{title}**\n\n{markdown_rows(['statement', *columns, 'published', 'agrees'], rows)}")
    return "\n\n".join(parts)
