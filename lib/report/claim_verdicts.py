"""Verdicts: what the rule of a claim says of its estimate, and whether that agrees with the publication."""

import math
from typing import Any

from lib.report import statistics
from lib.report.claim_schema import Claim

SUPPORTED, REFUTED, INCONCLUSIVE = "supported", "refuted", "inconclusive"
EQUIVALENT, DIFFERENT = "equivalent", "different"
NOT_MEASURED, NO_MARGIN = "not measured", "no margin"  # in this profile, of this data set
VERDICTS = (SUPPORTED, EQUIVALENT, REFUTED, DIFFERENT, INCONCLUSIVE, NO_MARGIN, NOT_MEASURED)
LEVEL = 0.05
FEWEST_IMAGES = 400  # of one seed that an exploratory claim may be decided by


def rule_p(claim: Claim, estimate: statistics.Estimate | None, margin: float | None) -> float | None:
    """Return the p-value of a claim's rule, two-sided, or that of equivalence; None where there is none."""
    if estimate is None or margin is None or claim.rule == "zero" or math.isnan(estimate.standard_error):
        return None
    test = statistics.equivalence_p if claim.rule == "equivalent" else statistics.difference_p
    return test(estimate, margin)


def may_decide(claim: Claim, estimate: statistics.Estimate) -> bool:
    """Say whether an estimate may decide: of two seeds or more, or, for an exploratory claim, of many images of one."""
    if estimate.n_seeds > 1:
        return True
    many = estimate.over == statistics.ONE_SEED and estimate.n_images >= FEWEST_IMAGES
    return many and claim.kind == "exploratory"


def decide(claim: Claim, estimate: statistics.Estimate, margin: float, p_holm: float | None) -> str:
    """Return the verdict of a claim's rule.

    Args:
        claim: its rule and kind.
        estimate: in its unit.
        margin: of the data set.
        p_holm: the adjusted p-value of a primary claim, which has to be below 5 % too.

    Returns:
        supported, refuted or inconclusive; of the rule equivalent: equivalent, different or inconclusive.
    """
    if claim.rule == "zero" and any(estimate.per_seed):
        return REFUTED
    if not may_decide(claim, estimate):
        return INCONCLUSIVE
    if claim.rule == "zero":
        return SUPPORTED
    low, high = statistics.interval(estimate)
    significant = claim.kind == "exploratory" or (p_holm is not None and p_holm < LEVEL)
    if claim.rule == "equivalent":
        inner = statistics.interval(estimate, 1 - 2 * LEVEL)
        if -margin < inner[0] and inner[1] < margin:
            return EQUIVALENT if significant else INCONCLUSIVE
        return DIFFERENT if low > margin or high < -margin else INCONCLUSIVE
    above, below = low > margin, high < margin
    if claim.rule == "below":
        above, below = below, above
    return SUPPORTED if above and significant else REFUTED if below else INCONCLUSIVE


def agrees(claim: Claim, estimate: statistics.Estimate, margin: float, verdict: str) -> str:
    """Return whether the result agrees with the publication: yes, no, or a dash where that is open.

    A publication that says above or below is compared with the margin of such a rule, with 0 for a claim of no effect.
    """
    undecided = not may_decide(claim, estimate) or (claim.kind == "primary" and verdict == INCONCLUSIVE)
    if claim.published is None or undecided:
        return "–"
    says = claim.published["agrees"]
    if claim.rule == "equivalent" and verdict == EQUIVALENT:
        return "yes" if says == EQUIVALENT else "no"
    if says == EQUIVALENT:
        return "no" if verdict == DIFFERENT else "–"
    low, high = statistics.interval(estimate)
    point = 0.0 if claim.rule == "equivalent" else margin
    if low > point or high < point:
        return "yes" if (low > point) == (says == "above") else "no"
    return "–"


def as_result(
    claim: Claim, estimate: statistics.Estimate | None, margin: float | None, p: float | None, p_holm: float | None
) -> dict[str, Any]:
    """Return one claim with its numbers and its verdict, as claims.json holds it."""
    result: dict[str, Any] = {"id": claim.id, "statement": claim.statement, "experiment": claim.of, "kind": claim.kind}
    result |= {"rule": claim.rule, "margin": margin, "unit": claim.unit, "expected": claim.expected}
    result |= {"published": claim.published, "p": p, "p_holm": p_holm, "value": None}
    result |= {"ci95": [None, None], "ci90": [None, None], "bootstrap95": None, "per_seed": [], "n_seeds": 0}
    result |= {"n_images": 0, "over": "", "verdict": NOT_MEASURED, "agrees": "–"}
    if estimate is None:
        return result
    for key, level in (("ci95", 0.95), ("ci90", 0.90)):
        ends = statistics.interval(estimate, level)
        if not math.isnan(ends[0]):
            result[key] = [min(max(e, 0.0), 100.0) for e in ends] if claim.unit == "%" else list(ends)
    result |= {"value": estimate.value, "per_seed": list(estimate.per_seed), "over": estimate.over}
    result |= {"n_seeds": estimate.n_seeds, "n_images": estimate.n_images}
    result["bootstrap95"] = None if estimate.bootstrap95 is None else list(estimate.bootstrap95)
    if margin is None:
        return result | {"verdict": NO_MARGIN}
    verdict = decide(claim, estimate, margin, p_holm)
    return result | {"verdict": verdict, "agrees": agrees(claim, estimate, margin, verdict)}
