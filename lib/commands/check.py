"""Check a defence for masked gradients and failed attacks: `python -m lib check MODEL`, see `--help`."""

import argparse
from pathlib import Path
from typing import Any

from lib.commands import named
from lib.commands.arguments import RED, add_subject, check_targets, read_subject
from lib.evaluation.sanity_checks import sanity_checks
from lib.utils.files import write_json


def main() -> int:
    """Run the sanity checks on a defence, under one noise where it is random, and say what a red one means.

    Exit status: 0; 1 for an error; 3 if a check is red.
    """
    example = "example: python -m lib check digits/natural --purifier digits/adaptive-1 --data digits --eps 0.1"
    parser = argparse.ArgumentParser(prog="python -m lib check", description=main.__doc__, epilog=example)
    add_subject(parser)
    parser.add_argument("--budget", choices=("quick", "full"), default="quick", help="effort of the checks")
    parser.add_argument("--json", type=Path, help="write the result to this file")
    args = parser.parse_args()
    check_targets(args.json)
    defence, _, points, numbers, eps = read_subject(args, fixed=args.seed)
    at = {"eps": eps, "norm": args.norm, "seed": args.seed, "budget": args.budget}
    table = sanity_checks(defence, points.x, points.y, surrogate=defence.classifier, **at)
    name = named.describe(args.model, args.purifier)
    print(f"{name['name']}: {args.data}, {args.norm}, ε = {eps:g}, {len(numbers)} images, {args.budget}")
    checks: list[dict[str, Any]] = table.to_dict("records")
    for row in checks:
        mark = "RED" if row["flag"] else "   "
        print(f"  {mark} {row['check']:32} {row['measured']:8.3f}  (red above {row['threshold']:g})")
        if row["flag"]:
            print(f"      {row['advice']} [{row['source']}]")
    if args.json:
        about = name | at | {"dataset": args.data, "n": len(numbers)}
        write_json(args.json, about | {"checks": checks})
    return RED if any(row["flag"] for row in checks) else 0
