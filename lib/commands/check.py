"""Check a defence for masked gradients and failed attacks: `python -m lib check MODEL`, see `--help`."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lib.commands import named
from lib.commands.arguments import RED, add_subject, check_outputs, read_subject
from lib.data import Split
from lib.evaluation.sanity_checks import BUDGETS, sanity_checks
from lib.purified_classifier import PurifiedClassifier
from lib.utils.files import write_json
from lib.utils.progress import tqdm

GRID = 5  # radii of the checks that enlarge the ball


def expected_passes(budget: str) -> int:
    """Return about how often the checks of a budget pass an image through the defence, for a bar: by its PGD runs."""
    effort = BUDGETS[budget]
    runs = 3 + 2 * effort.restarts + GRID  # PGD, with twice the steps, all restarts, and at other radii
    return runs * effort.steps + effort.queries + effort.path + effort.points + effort.draws


def run_checks(
    defence: PurifiedClassifier, points: Split, eps: float, norm: str, seed: int, budget: str
) -> list[dict[str, Any]]:
    """Return the rows of the table of sanity checks of a defence, under one noise where it is random.

    Arguments: see `lib.evaluation.sanity_checks.sanity_checks`.
    """
    noise = seed if defence.fixed is None else defence.fixed
    fixed = PurifiedClassifier(defence.purifier, defence.classifier, defence.votes, noise)
    at: dict[str, Any] = {"eps": eps, "norm": norm, "seed": seed, "budget": budget}
    with tqdm(total=expected_passes(budget) * len(points.y), desc="sanity checks", unit="image") as bar:
        fixed.register_forward_hook(lambda _, images, answer: bar.update(len(images[0])) and None)
        table = sanity_checks(fixed, *points, surrogate=defence.classifier, **at)
        bar.total = bar.n
    return table.to_dict("records")


def check_lines(checks: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return checks line by line, those that are red with their remedy."""
    lines = []
    for row in checks:
        mark = "RED" if row["flag"] else "   "
        lines.append(f"  {mark} {row['check']:32} {row['measured']:8.3f}  (red above {row['threshold']:g})")
        lines += [f"      {row['advice']} [{row['source']}]"] if row["flag"] else []
    return lines


def main() -> int:
    """Run the sanity checks on a defence, under one noise where it is random, and say what a red one means.

    Exit status: 0; 1 for an error; 3 if a check is red.
    """
    parser = argparse.ArgumentParser(prog="python -m lib check", description=main.__doc__)
    add_subject(parser)
    parser.add_argument("--budget", choices=("quick", "full"), default="quick", help="effort of the checks")
    parser.add_argument("--json", type=Path, help="write the result to this file")
    args = parser.parse_args()
    check_outputs(args.json)
    defence, _, points, numbers, eps, images = read_subject(args)
    checks = run_checks(defence, points, eps, args.norm, args.seed, args.budget)
    about = named.describe(args.model, args.purifier) | {"dataset": args.data, "eps": eps, "norm": args.norm}
    print(f"{about['name']}: {args.data}, {args.norm}, ε = {eps:g}, {len(numbers)} images, {args.budget}")
    print("\n".join(check_lines(checks)))
    if args.json:
        about |= {"source": images, "seed": args.seed, "budget": args.budget, "n": len(numbers)}
        write_json(args.json, about | {"checks": checks})
    return RED if any(row["flag"] for row in checks) else 0
