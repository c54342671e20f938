"""Experiment 5's claims, decided on pieces of GPU minutes: one seed, an interval over its images, all exploratory.

Each is measured in the piece of the students where that holds all it is about, else in the teacher's, of fewer images.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lib.report.claim_results import evaluate_claims
from lib.report.claim_schema import Claim, load_claims
from lib.report.piece_files import STUDENTS_PIECE, TEACHER_PIECE
from lib.utils.protocol import read_protocol

LEFT_OUT = ("clean-2", "adaptive-2", "undistilled-adaptive-1", "trades-wide")  # defences of records, in no piece
LONG = ("sde-100", "ddim-100")  # in the teacher's piece alone
Records = Mapping[str, Mapping[str, Any]]  # pieces of the matched set


def holds(record: Mapping[str, Any], claim: Claim) -> bool:
    """Say whether a record has the answers of every defence and threat that a claim is about."""
    correct = record["outcomes"]["correct"]
    return all(o.threat in correct.get(o.defence, {}) for o in (claim.plus, claim.minus) if o)


def choose_piece(claim: Claim, records: Records, profile: str) -> tuple[str, str]:
    """Return the piece that measures a claim, or an empty string and why none does.

    Args:
        claim: about experiment 5.
        records: of `lib.report.piece_files.matched_record`, by the names of the finished pieces.
        profile: whose settings the pieces have.

    Raises:
        ValueError: for a defence or threat that no piece has or leaves out on purpose.
    """
    if claim.plus.path:
        return "", f"about {'speed' if claim.of == 'speed' else 'other numbers than outcomes'}: in no piece"
    if not records:
        return "", f"neither {STUDENTS_PIECE} nor {TEACHER_PIECE} is done"
    everything = [record["outcomes"]["correct"] for record in records.values()]
    defences = {name for correct in everything for name in correct}
    threats = {threat for correct in everything for answers in correct.values() for threat in answers}
    operands = [o for o in (claim.plus, claim.minus) if o]
    for kind, names, known in (
        ("defence", {o.defence for o in operands}, {*defences, *LEFT_OUT, *LONG}),
        ("threat", {o.threat for o in operands}, threats),
    ):
        if unknown := sorted(names - known):
            expected = f"expected a {kind} of the matched set, {', '.join(sorted(known))}"
            raise ValueError(f"claim {claim.id}: {expected}, got {', '.join(unknown)}: correct it in claims.yaml")
    if claim.profiles and profile not in claim.profiles:
        return "", f"for other profiles: {', '.join(claim.profiles)}"
    for name in (STUDENTS_PIECE, TEACHER_PIECE):
        if name in records and holds(records[name], claim):
            return name, ""
    lacking = sorted({o.defence for o in operands} - defences) or sorted({o.threat for o in operands})
    where = "in no piece" if {*lacking} - {*LONG} or TEACHER_PIECE in records else f"in {TEACHER_PIECE}, not done"
    return "", f"{', '.join(lacking)}: {where}"


def decide_claims(records: Records, profile: str, claims: Sequence[Claim] | None = None) -> list[dict[str, Any]]:
    """Return the results of all claims of experiment 5, as `lib.report.claim_results.evaluate_claims` does.

    Args:
        records: see `choose_piece`.
        profile: likewise; its data set says which margins hold.
        claims: by default those of claims.yaml whose names begin with "dp.".

    Returns:
        One result for each claim, with the `piece` that measures it, or `why` none does.
    """
    protocol, out = read_protocol(), []
    for claim in [c for c in load_claims() if c.id.startswith("dp.")] if claims is None else claims:
        piece, why = choose_piece(claim, records, profile)
        some = {claim.of: [records[piece]]} if piece else {}
        (result,) = evaluate_claims(some, [replace(claim, kind="exploratory")], profile, protocol)
        out.append(result | {"piece": piece, "why": why})
    return out
