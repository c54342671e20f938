"""What a claim is: the entries of claims.yaml, checked; claims.yaml explains the fields."""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from lib.report.answers import LOSSES
from lib.utils.draws import DRAW_MEASURES, NO_ATTACK
from lib.utils.validation import Name, Number, Positive, fits
from lib.utils.yaml_files import read_yaml

CLAIMS = Path(__file__).with_name("claims.yaml")
RULES = ("above", "below", "equivalent", "zero")
CLAIM_KINDS = ("primary", "exploratory")
DIRECTIONS = RULES[:3]  # what a publication may say
MOST_PRIMARY = 8
OUTCOME = ("defence", "threat", "measure")


@dataclass(frozen=True)
class Operand:
    """What a claim adds or subtracts: a number of the metrics at `path`, or a measure of each image's outcomes."""

    path: str = ""
    defence: str = ""
    threat: str = ""
    measure: str = ""


@dataclass(frozen=True)
class Claim:
    """One statement about one number, `plus` minus `minus`."""

    id: str
    statement: str
    of: str
    kind: str
    plus: Operand
    minus: Operand | None
    rule: str
    margin: float | Mapping[str, float] | None
    scale: float
    unit: str
    published: Mapping[str, str] | None
    count: str = ""
    expected: str = ""
    profiles: tuple[str, ...] = ()  # () for all


KEYS = {f.name: f.default is MISSING for f in fields(Claim)} | dict.fromkeys(("plus", "minus", "value"), False)


def expect(claim: str, key: str, right: bool, expected: str, got: Any) -> None:
    """Raise ValueError, which names claim and key, unless `right`."""
    if not right:
        raise ValueError(f"claim {claim}: {key}: expected {expected}, got {got!r}: correct it in {CLAIMS.name}")


def parse_operand(claim: str, key: str, entry: Any) -> Operand:
    """Return an operand: {path} or {defence, threat, measure}; ValueError names claim and key."""
    known = isinstance(entry, dict) and set(entry) in ({"path"}, set(OUTCOME))
    expect(claim, key, known, f"path, or {', '.join(OUTCOME)}", entry)
    for name, value in entry.items():
        expect(claim, f"{key}.{name}", isinstance(value, str) and value != "", "text", value)
    if "measure" in entry:
        measures = (*DRAW_MEASURES, *LOSSES)
        expect(claim, f"{key}.measure", entry["measure"] in measures, f"one of {', '.join(measures)}", entry["measure"])
        pointless = entry["threat"] == NO_ATTACK and entry["measure"] in LOSSES
        expect(claim, f"{key}.threat", not pointless, "a threat, since a loss is clean minus that", entry["threat"])
    return Operand(**entry)


def parse_operands(claim: str, entry: Mapping[str, Any]) -> tuple[Operand, Operand | None]:
    """Return what a claim adds and subtracts, from its `value`, or its `plus` and `minus`."""
    given = [key for key in ("value", "plus", "minus") if key in entry]
    shape = given in (["value"], ["plus"], ["plus", "minus"])
    expect(claim, "operands", shape, "value, or plus, or plus and minus", ", ".join(given) or "none of them")
    if given == ["value"]:
        return parse_operand(claim, "value", {"path": entry["value"]}), None
    operands = [parse_operand(claim, key, entry[key]) for key in given]
    alike = len({bool(operand.path) for operand in operands}) == 1
    expect(claim, "minus", alike, "a path like plus, or outcomes like plus: both of one kind", entry.get("minus"))
    return operands[0], operands[1] if len(operands) == 2 else None


def check_margin(claim: str, rule: str, kind: str, margin: Any) -> None:
    """Raise ValueError unless a margin is a number, one number per data set, or null where nothing is decided."""
    if rule == "zero":
        expect(claim, "margin", margin == 0, "0, which is what the rule says", margin)
        expect(claim, "kind", kind == "exploratory", "exploratory: the rule zero has no p-value", kind)
        return
    numbers = list(margin.values()) if isinstance(margin, dict) else [] if margin is None else [margin]
    number, words = (Positive, "a number above 0") if rule == "equivalent" else (Number, "a number")
    right = all(fits(value, number) for value in numbers) and margin != {}
    expect(claim, "margin", right, f"{words}, one for each data set, or null", margin)
    expect(claim, "margin", kind == "exploratory" or margin is not None, "a margin of a primary claim", margin)


def parse_claim(entry: Mapping[str, Any], name: str) -> Claim:
    """Return one entry of claims.yaml as a claim; ValueError names the claim and the key that is wrong."""
    missing = [k for k, needed in KEYS.items() if needed and k not in entry]
    for problem, keys in (("unknown", [key for key in entry if key not in KEYS]), ("missing", missing)):
        if keys:
            raise ValueError(f"claim {name}: {problem} {', '.join(map(str, keys))}: expected {', '.join(KEYS)}")
    for key in {"id", "statement", "of", "rule", "kind", "unit", "count", "expected"} & set(entry):
        expect(name, key, isinstance(entry[key], str) and entry[key] != "", "text", entry[key])
    for key, known in (("rule", RULES), ("kind", CLAIM_KINDS)):
        expect(name, key, entry[key] in known, f"one of {', '.join(known)}", entry[key])
    expect(name, "scale", fits(entry["scale"], Positive), "a number above 0", entry["scale"])
    check_margin(name, entry["rule"], entry["kind"], entry["margin"])
    published = entry["published"]
    if published is not None:
        keys = isinstance(published, dict) and set(published) == {"figure", "agrees", "reference"}
        expect(name, "published", keys, "figure, agrees and reference, or null", published)
        for key, value in published.items():
            expect(name, f"published.{key}", isinstance(value, str) and value != "", "text", value)
        agrees = published["agrees"]
        expect(name, "published.agrees", agrees in DIRECTIONS, f"one of {', '.join(DIRECTIONS)}", agrees)
        expect(name, "published.agrees", agrees != "equivalent" or entry["rule"] == agrees, "that of the rule", agrees)
    profiles = entry.get("profiles", ["all"])
    names = isinstance(profiles, list) and profiles != [] and all(fits(p, Name) for p in profiles)
    expect(name, "profiles", names, "a list of profiles that measure it", profiles)
    plus, minus = parse_operands(name, entry)
    expect(name, "count", "count" not in entry or plus.path != "", "no count: outcomes say it", entry.get("count"))
    others = {k: v for k, v in entry.items() if k not in ("value", "plus", "minus", "profiles")}
    return Claim(**others, plus=plus, minus=minus, profiles=tuple(entry.get("profiles", ())))


def load_claims(path: Path = CLAIMS) -> list[Claim]:
    """Return the claims of a YAML file.

    Raises ValueError, which names claim and key, unless each is complete, its id unique, and few are primary.
    """
    claims: dict[str, Claim] = {}
    entries = read_yaml(path)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"expected a list of claims in {path}, each with {', '.join(KEYS)}")
    for i, entry in enumerate(entries, start=1):
        claim = parse_claim(entry, entry.get("id", f"number {i}"))
        if claim.id in claims:
            raise ValueError(f"claim {claim.id}: id: expected a unique one, got it twice")
        claims[claim.id] = claim
    primary = [claim.id for claim in claims.values() if claim.kind == "primary"]
    if len(primary) > MOST_PRIMARY:
        got = f"{len(primary)}: {', '.join(primary)}"
        raise ValueError(f"expected at most {MOST_PRIMARY} primary claims, got {got}: make the others exploratory")
    return list(claims.values())
