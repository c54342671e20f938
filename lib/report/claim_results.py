"""All claims of a profile decided: measured in the records, primary only where these confirm, Holm over the primary."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lib.report import statistics
from lib.report.claim_schema import Claim
from lib.report.claim_values import estimate_claim
from lib.report.claim_verdicts import as_result, rule_p
from lib.report.preregistration import exploratory_reason
from lib.utils.files import ROOT
from lib.utils.protocol import read_protocol
from lib.utils.validation import Name, check_value
from lib.utils.yaml_files import read_mapping


def dataset_of(profile: str) -> str:
    """Return the data set of a profile, from its file, that of the profile it is `like`, or the base."""
    chain: list[str] = []
    while profile not in chain:
        chain.append(check_value("a profile", profile, Name))
        settings = read_mapping(ROOT / "profiles" / f"{profile}.yaml")
        dataset = (settings.get("data") or {}).get("dataset")
        if dataset is not None:
            return dataset
        profile = settings.get("like", "base")
    raise ValueError(f"expected a data set in profiles/{chain[0]}.yaml or those it is like, got none in {chain}")


def evaluate_claims(
    records: Mapping[str, Sequence[Mapping[str, Any]]],
    claims: Sequence[Claim],
    profile: str,
    protocol: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Return the results of all claims.

    A primary claim about records that do not confirm is exploratory (`lib.report.preregistration`); Holm's adjustment
    of the others counts it as one without evidence.

    Args:
        records: those of each experiment, one per seed; none for an experiment that the profile leaves out.
        claims: from `load_claims`.
        profile: whose records they are; it says which claims are measured and, by its data set, which margins hold.
        protocol: from `read_protocol`, by default the frozen one.

    Returns:
        One result for each claim, see `as_result`.

    Raises:
        LookupError: for a path, defence, threat or measure that is not in the records.
        ValueError: for operands about other images.
    """
    dataset, protocol = dataset_of(profile), read_protocol() if protocol is None else protocol
    family = [i for i, c in enumerate(claims) if c.kind == "primary" and not (c.profiles and profile not in c.profiles)]
    other = {name for name, some in records.items() if some and exploratory_reason(some, profile, name, protocol)}
    claims = [replace(c, kind="exploratory") if c.of in other else c for c in claims]
    margins = [c.margin.get(dataset) if isinstance(c.margin, Mapping) else c.margin for c in claims]
    estimates = [estimate_claim(c, records.get(c.of, []), profile) for c in claims]
    p_values = [rule_p(*each) for each in zip(claims, estimates, margins)]
    evidence = {i: p for i in family if (p := p_values[i]) is not None and claims[i].kind == "primary"}
    adjusted = statistics.holm([evidence.get(i, 1.0) for i in family])
    holm = {i: a for i, a in zip(family, adjusted) if i in evidence}
    rows = zip(claims, estimates, margins, p_values)
    return [as_result(*row, holm.get(i)) for i, row in enumerate(rows)]
