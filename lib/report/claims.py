"""The project's claims: read from claims.yaml, measured in the records, decided by their rules.

`python -m lib.claims` prints the table of the profile in params.yaml, `--check` fails when a claim does not hold,
`--readme` writes the table into README.md. The report notebook writes `data/<profile>/metrics/claims.json`.
"""

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from lib.utils.artifacts import results_dir
from lib.utils.files import ROOT, read_json, write_json, write_text
from lib.utils.intervals import mean_interval
from lib.utils.processes import print_in_any_locale
from lib.utils.validation import Number, fits
from lib.utils.yaml_files import active_profile, read_yaml

CLAIMS = Path(__file__).with_name("claims.yaml")
SPEED = "data/speed.json"
REPRODUCED, NOT_REPRODUCED, NOT_APPLICABLE = "reproduced", "not reproduced", "not applicable"

Rule = Callable[[Sequence[float], float, float, float, float], bool]
RULES: dict[str, Rule] = {  # of the values, their mean, low and high end of the interval, and threshold
    "above": lambda values, mean, low, high, threshold: low > threshold,
    "below": lambda values, mean, low, high, threshold: high < threshold,
    "not above": lambda values, mean, low, high, threshold: low <= threshold,
    "mean": lambda values, mean, low, high, threshold: mean >= threshold,
    "every": lambda values, mean, low, high, threshold: max(values) <= threshold,
}


@dataclass(frozen=True)
class Claim:
    """One statement about one number per seed; claims.yaml explains the fields."""

    id: str
    statement: str
    of: str
    value: str
    rule: str
    threshold: float
    scale: float
    unit: str
    count: str
    expected: str
    source: str
    optional: str = ""


def parse_claim(entry: Mapping[str, Any], name: str) -> Claim:
    """Return one entry of claims.yaml as a claim; ValueError names the claim and the key that is wrong."""
    known = {field.name: field for field in fields(Claim)}
    missing = [key for key, field in known.items() if field.default is MISSING and key not in entry]
    for problem, keys in (("unknown", [key for key in entry if key not in known]), ("missing", missing)):
        if keys:
            raise ValueError(f"claim {name}: {problem} {', '.join(map(str, keys))}: expected {', '.join(known)}")
    for key, value in entry.items():
        expected: type = float if known[key].type is float else str
        right = fits(value, Number) if expected is float else isinstance(value, str) and value != ""
        if not right:
            raise ValueError(f"claim {name}: {key}: expected {expected.__name__}, got {value!r}")
    if entry["rule"] not in RULES:
        raise ValueError(f"claim {name}: rule: expected one of {', '.join(RULES)}, got {entry['rule']!r}")
    return Claim(**entry)


def load_claims(path: Path = CLAIMS) -> list[Claim]:
    """Return the claims of a YAML file; ValueError, naming claim and key, unless each is complete and its id unique."""
    claims: dict[str, Claim] = {}
    entries = read_yaml(path)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"expected a list of claims in {path}, each with {', '.join(f.name for f in fields(Claim))}")
    for i, entry in enumerate(entries, start=1):
        claim = parse_claim(entry, entry.get("id", f"number {i}"))
        if claim.id in claims:
            raise ValueError(f"claim {claim.id}: id: expected a unique one, got it twice")
        claims[claim.id] = claim
    return list(claims.values())


def lookup(claim: Claim, metrics: Mapping[str, Any], path: str) -> float | None:
    """Return the number at a dotted path of the metrics; None for null, and where an optional claim is not measured.

    Raises LookupError for any other path that does not lead to a number.
    """
    node: Any = metrics
    for key in path.split("."):
        if not isinstance(node, Mapping) or key not in node:
            if claim.optional:
                return None
            there = f"the keys {', '.join(node)}" if isinstance(node, Mapping) else f"{node!r}"
            raise LookupError(
                f"claim {claim.id}: {path} is not in the metrics: expected {key!r}, got {there}: correct the path in "
                f"{CLAIMS.name}, or add `optional` with the profiles that do not measure it"
            )
        node = node[key]
    if node is not None and not isinstance(node, int | float):
        raise LookupError(f"claim {claim.id}: {path}: expected a number, got {node!r}")
    return node


def verdict(claim: Claim, values: Sequence[float], mean: float, low: float, high: float) -> str:
    """Return the verdict of the claim's rule; one seed, which has no interval, is not applicable."""
    if math.isnan(low):
        return NOT_APPLICABLE
    return REPRODUCED if RULES[claim.rule](values, mean, low, high, claim.threshold) else NOT_REPRODUCED


def evaluate_claim(claim: Claim, metrics: Sequence[Mapping[str, Any]]) -> dict:
    """Return one claim with its value, interval and verdict, measured in the metrics of each seed."""
    measured = [lookup(claim, m, claim.value) for m in metrics]
    values = [claim.scale * v for v in measured if v is not None]
    result: dict[str, Any] = {"id": claim.id, "statement": claim.statement, "unit": claim.unit, "source": claim.source}
    result |= {"expected": claim.expected, "rule": f"{claim.rule} {claim.threshold:g}", "n_seeds": len(metrics)}
    result["n_examples"] = (lookup(claim, metrics[0], claim.count) or 0) if metrics else 0
    if not values or len(values) < len(measured):
        return result | {"value": None, "ci95": [None, None], "verdict": NOT_APPLICABLE}
    mean, low, high = mean_interval(values)
    if claim.unit == "%" and not math.isnan(low):  # no share lies outside
        low, high = max(low, 0.0), min(high, 100.0)
    return result | {"value": mean, "ci95": [low, high], "verdict": verdict(claim, values, mean, low, high)}


def evaluate_claims(records: Mapping[str, Sequence[Mapping[str, Any]]], claims: Sequence[Claim]) -> list[dict]:
    """Return the results of all claims for the records of each experiment (experiment → records, one per seed)."""
    return [evaluate_claim(c, [record["metrics"] for record in records.get(c.of, [])]) for c in claims]


def format_number(value: float | None, signed: bool = False) -> str:
    """Return a number with two decimals, with its sign if `signed`; a dash for None."""
    return "–" if value is None else f"{value:+.2f}" if signed else f"{value:.2f}"


def format_estimate(result: Mapping[str, Any], signed: bool = False) -> str:
    """Return a result as value, interval and unit."""
    low, high = result["ci95"]
    interval = "" if low is None else f" [{format_number(low, signed)}, {format_number(high, signed)}]"
    return f"{format_number(result['value'], signed)}{interval} {result['unit']}"


def claims_table(results: Sequence[Mapping[str, Any]]) -> str:
    """Return the claims as a Markdown table."""
    lines = [
        "| claim | statement | ours [95 % CI] | n | expected | published | verdict |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in results:
        ours, n = format_estimate(r, r["unit"] == "points"), f"{r['n_seeds']} seeds × {r['n_examples']} images"
        cells = (f"`{r['id']}`", r["statement"], ours, n, r["expected"], r["source"], r["verdict"])
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def replace_between_marks(readme: str, name: str, body: str) -> str:
    """Return the text of README.md with `body` between the marks of lib.<name>; ValueError when they are missing."""
    marks = f"<!-- {name}: written by `python -m lib.{name} --readme` -->", f"<!-- end of {name} -->"
    if any(readme.count(mark) != 1 for mark in marks):
        raise ValueError(f"README.md: expected the lines {marks[0]} and {marks[1]}, once each")
    head, rest = readme.split(marks[0])
    return f"{head}{marks[0]}\n{body}\n{marks[1]}{rest.split(marks[1])[1]}"


def speed_records(profile: str) -> list[dict]:
    """Return what `make bench` measured of this profile's purifiers, one record per round; none if it did not run.

    It is a file of its own, since timings differ from run to run: only `make bench` changes it.
    """
    rounds = read_json(ROOT / SPEED).get(profile, [])
    return [{"metrics": metrics} for metrics in rounds]


def save_results(profile: str, results: Sequence[Mapping[str, Any]]) -> None:
    """Write `data/<profile>/metrics/claims.json`."""
    write_json(results_dir(profile, "metrics") / "claims.json", {"claims": results})


def load_results(profile: str) -> list[dict]:
    """Return the results that `save_results` wrote; FileNotFoundError or ValueError says how to compute them."""
    path = results_dir(profile, "metrics") / "claims.json"
    if not path.exists():
        raise FileNotFoundError(f"{path.relative_to(ROOT)} is missing: run `make reproduce PROFILE={profile}`")
    results = read_json(path)
    if not isinstance(results, dict) or not isinstance(results.get("claims"), list):
        raise ValueError(f"expected the claims' results in {path}, got other JSON: run `dvc repro report@{profile}`")
    return results["claims"]


def main() -> None:
    """Print the claims and their verdicts."""
    print_in_any_locale()
    parser = argparse.ArgumentParser(prog="python -m lib.claims", description=main.__doc__)
    parser.add_argument("--profile", help="default: the one in params.yaml")
    parser.add_argument("--check", action="store_true", help="exit 1 when a claim is not reproduced")
    parser.add_argument("--readme", action="store_true", help="write the table into README.md")
    options = parser.parse_args()
    try:
        profile = active_profile() if options.profile is None else options.profile
        results = load_results(profile)
        for r in results:
            print(f"{r['verdict']:15} {r['id']:20} {format_estimate(r)}: {r['statement']}")
        print(f"figures: {ROOT.joinpath('figures', profile).relative_to(ROOT)}/, all numbers: data/{profile}/metrics/")
        if options.readme:
            readme = ROOT / "README.md"
            text = readme.read_text(encoding="utf-8")
            write_text(readme, replace_between_marks(text, "claims", claims_table(results)))
    except (OSError, ValueError) as error:
        raise SystemExit(f"lib.claims: {error}") from None
    failed = [r["id"] for r in results if r["verdict"] == NOT_REPRODUCED]
    if options.check and failed:
        raise SystemExit(f"not reproduced: {', '.join(failed)}")


if __name__ == "__main__":
    main()
