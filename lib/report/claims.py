"""The project's claims: each with its rule, written before the run, and its verdict, decided by the rule alone.

`python -m lib.claims` prints the table of the profile in params.yaml, `--check` fails when a claim does not hold,
`--readme` writes the table into README.md. The report notebook makes `data/<profile>/metrics/claims.json` of records.
"""

import argparse
import json
import math
from collections.abc import Sequence
from functools import reduce

import yaml

from lib.report.claimed import CLAIMS, Claim
from lib.utils.artifacts import results_dir
from lib.utils.files import ROOT, write_json, write_text
from lib.utils.intervals import mean_interval

SPEED = "data/speed.json"
REPRODUCED, NOT_REPRODUCED, NOT_APPLICABLE = "reproduced", "not reproduced", "not applicable"


def lookup(metrics: dict, path: str) -> float | None:
    """Returns the number at a dotted path, or None where this profile does not measure it."""
    return reduce(lambda node, key: node.get(key) if isinstance(node, dict) else None, path.split("."), metrics)


RULES = {  # of the values, their mean, low and high end of the interval, and threshold
    "above": lambda values, mean, low, high, threshold: low > threshold,
    "below": lambda values, mean, low, high, threshold: high < threshold,
    "not above": lambda values, mean, low, high, threshold: low <= threshold,
    "mean": lambda values, mean, low, high, threshold: mean >= threshold,
    "every": lambda values, mean, low, high, threshold: max(values) <= threshold,
}


def verdict(claim: Claim, values: Sequence[float], mean: float, low: float, high: float) -> str:
    """Returns the verdict of the claim's rule; a missing interval (one seed) decides nothing."""
    if claim.rule not in RULES:
        raise ValueError(f"{claim.id}: rule {claim.rule!r} is none of {', '.join(RULES)}")
    if math.isnan(low):
        return NOT_APPLICABLE
    return REPRODUCED if RULES[claim.rule](values, mean, low, high, claim.threshold) else NOT_REPRODUCED


def evaluate_claims(records: dict[str, Sequence[dict]], claims: Sequence[Claim] = CLAIMS) -> list[dict]:
    """Returns one row per claim for the records of each experiment (experiment → records, one per seed)."""
    rows = []
    for claim in claims:
        metrics = [r["metrics"] for r in records.get(claim.of or claim.id.split(".")[0], [])]
        values = [lookup(m, claim.value) for m in metrics]
        row = {"id": claim.id, "statement": claim.statement, "unit": claim.unit, "source": claim.source}
        row |= {"expected": claim.expected, "rule": f"{claim.rule} {claim.threshold:g}", "n_seeds": len(values)}
        row["n_examples"] = (lookup(metrics[0], claim.count) or 0) if metrics else 0
        if not values or None in values:
            rows.append(row | {"value": None, "ci95": [None, None], "verdict": NOT_APPLICABLE})
            continue
        values = [claim.scale * v for v in values]
        mean, low, high = mean_interval(values)
        if claim.unit == "%" and not math.isnan(low):  # no share lies outside
            low, high = max(low, 0.0), min(high, 100.0)
        rows.append(row | {"value": mean, "ci95": [low, high], "verdict": verdict(claim, values, mean, low, high)})
    return rows


def format_number(value: float | None, signed: bool = False) -> str:
    return "–" if value is None else f"{value:+.2f}" if signed else f"{value:.2f}"


def claims_table(rows: Sequence[dict]) -> str:
    """Returns the claims as a Markdown table."""
    lines = [
        "| claim | statement | ours [95 % CI] | n | expected | published | verdict |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        sign = r["unit"] == "points"
        ours = format_number(r["value"], sign)
        if r["ci95"][0] is not None:
            ours += f" [{format_number(r['ci95'][0], sign)}, {format_number(r['ci95'][1], sign)}]"
        n = f"{r['n_seeds']} seeds × {r['n_examples']} images"
        cells = (f"`{r['id']}`", r["statement"], f"{ours} {r['unit']}", n, r["expected"], r["source"], r["verdict"])
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def replace_between_marks(readme: str, name: str, body: str) -> str:
    """Returns the text of README.md with `body` between the marks of lib.<name>; ValueError when they are missing."""
    marks = f"<!-- {name}: written by `python -m lib.{name} --readme` -->", f"<!-- end of {name} -->"
    if any(readme.count(mark) != 1 for mark in marks):
        raise ValueError(f"README.md needs the lines {marks[0]} and {marks[1]}, once each")
    head, rest = readme.split(marks[0])
    return f"{head}{marks[0]}\n{body}\n{marks[1]}{rest.split(marks[1])[1]}"


def speed_records(profile: str) -> list[dict]:
    """Returns what `make bench` measured of this profile's purifiers, each round in a seed's place; none if it did not.

    It is a file of its own, since what a clock says differs from run to run: only `make bench` changes it.
    """
    rounds = json.loads((ROOT / SPEED).read_text()).get(profile, [])
    return [{"metrics": row} for row in rounds]


def write_claims(profile: str, rows: Sequence[dict]) -> None:
    """Writes `data/<profile>/metrics/claims.json`."""
    write_json(results_dir(profile, "metrics") / "claims.json", {"claims": rows})


def read_claims(profile: str) -> list[dict]:
    """Returns the committed or computed claims of a profile; FileNotFoundError says how to compute them."""
    path = results_dir(profile, "metrics") / "claims.json"
    if not path.exists():
        raise FileNotFoundError(f"{path.relative_to(ROOT)} is missing: run `make reproduce PROFILE={profile}`")
    return json.loads(path.read_text())["claims"]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m lib.claims", description="Print the claims and their verdicts.")
    parser.add_argument("--profile", help="default: the one in params.yaml")
    parser.add_argument("--check", action="store_true", help="exit 1 when a claim is not reproduced")
    parser.add_argument("--readme", action="store_true", help="write the table into README.md")
    options = parser.parse_args()
    profile = options.profile or yaml.safe_load((ROOT / "params.yaml").read_text())["profile"]
    rows = read_claims(profile)
    for r in rows:
        interval = "" if r["ci95"][0] is None else f" [{format_number(r['ci95'][0])}, {format_number(r['ci95'][1])}]"
        print(f"{r['verdict']:15} {r['id']:20} {format_number(r['value'])}{interval} {r['unit']}: {r['statement']}")
    print(f"figures: {ROOT.joinpath('figures', profile).relative_to(ROOT)}/, all numbers: data/{profile}/metrics/")
    if options.readme:
        write_text(
            ROOT / "README.md", replace_between_marks((ROOT / "README.md").read_text(), "claims", claims_table(rows))
        )
    failed = [r["id"] for r in rows if r["verdict"] == NOT_REPRODUCED]
    if options.check and failed:
        raise SystemExit(f"not reproduced: {', '.join(failed)}")


if __name__ == "__main__":
    main()
