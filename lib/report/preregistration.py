"""Which records confirm: those of the frozen protocol's seeds, all of them, made and decided while it was unchanged.

Claims about any other records are exploratory, whatever claims.yaml says.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from lib.report.claim_tables import TITLES


def list_seeds(seeds: Sequence[int]) -> str:
    """Return seeds in words."""
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}" if seeds else "no seeds"


def exploratory_reason(
    records: Sequence[Mapping[str, Any]], profile: str, experiment: str, protocol: Mapping[str, Any]
) -> str:
    """Return why the records of an experiment do not confirm its claims, an empty string where they do.

    Args:
        records: one per seed, at least one.
        profile: whose records they are.
        experiment: kd, dd, rd, diff or dp.
        protocol: from `lib.utils.protocol.read_protocol`.
    """
    states = [record.get("protocol") or {} for record in records]
    frozen = {key: protocol[key] for key in ("name", "commit")}
    wanted = protocol["seeds"].get(profile, {}).get(experiment, [])
    seeds = [record.get("seed") for record in records]
    if not all(states):
        return f"made before {protocol['name']}"
    if others := [state for state in states if {key: state[key] for key in frozen} != frozen]:
        return f"made under {others[0]['name']} of commit {others[0]['commit'][:7]}"
    if changed := sorted({name for state in states for name in state["changed"]}):
        return f"made after changes to {', '.join(changed)}"
    if len(seeds) != len(wanted) or set(seeds) != set(wanted):
        return f"not those of {protocol['name']}, {list_seeds(wanted)}"
    return f"{', '.join(protocol['changed'])} changed since" if protocol["changed"] else ""


def protocol_text(records: Mapping[str, Sequence[Mapping[str, Any]]], profile: str, protocol: Mapping[str, Any]) -> str:
    """Return what was fixed before the run and which records confirm, as Markdown.

    Args:
        records: of each experiment, one per seed.
        profile: whose records they are.
        protocol: from `lib.utils.protocol.read_protocol`.
    """
    name, changed = protocol["name"], ", ".join(f"`{file}`" for file in protocol["changed"]) or "none"
    head = (
        f"**{name}**, commit `{protocol['commit'][:7]}`, {protocol['date']}: claims, statistics, checks, budgets and "
    )
    head += f"seeds that were fixed before the confirming run. Frozen files that changed since: {changed}."
    lines = []
    for experiment, some in records.items():
        if some and experiment in TITLES and experiment != "speed":
            reason = exploratory_reason(some, profile, experiment, protocol)
            verdict = f"{reason}: exploratory" if reason else f"made under {name}, unchanged"
            lines.append(f"- {TITLES[experiment]}: {list_seeds(sorted(r['seed'] for r in some))}; {verdict}")
    earlier = "\n".join(f"- {sentence}" for sentence in protocol["earlier"])
    parts = [head, "\n".join(lines) or "No records.", f"Decided earlier, with results in sight:\n\n{earlier}"]
    return "\n\n".join(parts)
