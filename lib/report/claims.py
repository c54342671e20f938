"""The project's claims: measured in the records, decided by the rules of claims.yaml.

`python -m lib.claims` prints the claims of the profile in params.yaml, `--check` fails when a primary claim is refuted,
`--readme` writes the computed parts of README.md and docs/results.md. The report notebook writes
`data/<profile>/metrics/claims.json`.
"""

import argparse
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from lib.report import readme
from lib.report.captions import figure_captions
from lib.report.claim_results import dataset_of, evaluate_claims
from lib.report.claim_schema import load_claims
from lib.report.claim_tables import claims_table, compare_profiles, format_estimate
from lib.report.claim_verdicts import DIFFERENT, REFUTED, VERDICTS
from lib.report.preregistration import protocol_text
from lib.utils.artifacts import results_dir
from lib.utils.files import ROOT, read_json, to_jsonable, write_json, write_text
from lib.utils.processes import print_in_any_locale
from lib.utils.protocol import read_protocol
from lib.utils.yaml_files import active_profile

SPEED = "data/speed.json"
EXPERIMENTS = ("kd", "dd", "rd", "diff", "dp")


def speed_records(profile: str) -> list[dict]:
    """Return what `make bench` measured of this profile's purifiers, one record per round; none if it did not run.

    It is a file of its own, since timings differ from run to run: only `make bench` changes it.
    """
    rounds = read_json(ROOT / SPEED).get(profile, [])
    return [{"metrics": metrics} for metrics in rounds]


def saved_records(profile: str) -> dict[str, list[dict]]:
    """Return every record of a profile on disk, by experiment, and what `make bench` measured."""
    folder = results_dir(profile, "records")
    records = {name: [read_json(file) for file in sorted(folder.glob(f"{name}-s*.json"))] for name in EXPERIMENTS}
    return records | {"speed": speed_records(profile)}


def save_results(profile: str, results: Sequence[Mapping[str, Any]]) -> None:
    """Write `data/<profile>/metrics/claims.json`."""
    write_json(results_dir(profile, "metrics") / "claims.json", {"claims": results})


def load_results(profile: str) -> list[dict]:
    """Return the results that `save_results` wrote; FileNotFoundError or ValueError says how to compute them."""
    path = results_dir(profile, "metrics") / "claims.json"
    if not path.exists():
        raise FileNotFoundError(f"{path.relative_to(ROOT)} is missing: run `make reproduce PROFILE={profile}`")
    results = read_json(path)
    rows = results.get("claims") if isinstance(results, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "agrees" in row for row in rows):
        raise ValueError(f"expected the claims' results in {path}, got other JSON: run `dvc repro report@{profile}`")
    return rows


def check_results(profile: str, results: Sequence[Mapping[str, Any]]) -> None:
    """Decide the claims anew; LookupError or ValueError for a claim that errs, and for results that are not these."""
    decided = to_jsonable(evaluate_claims(saved_records(profile), load_claims(), profile))
    changed = [new["id"] for new, old in zip(decided, results) if new != old]
    if changed or len(decided) != len(results):
        which = ", ".join(changed) or "other claims"
        remedy = f"run `dvc repro report@{profile}`"
        raise ValueError(f"expected what claims.yaml and the records give, got other results of {which}: {remedy}")


def count_verdicts(results: Sequence[Mapping[str, Any]]) -> str:
    """Return how many claims have each verdict, in words."""
    counts = Counter(r["verdict"] for r in results)
    return ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS if counts[verdict])


def main() -> None:
    """Print the claims and their verdicts."""
    print_in_any_locale()
    parser = argparse.ArgumentParser(prog="python -m lib.claims", description=main.__doc__)
    parser.add_argument("--profile", help="default: the one in params.yaml")
    parser.add_argument("--second", help="another profile, next to it in the table of --readme")
    check = "exit 1 when a primary claim is refuted or different, when a claim names what is not in the records, or "
    check += "when claims.json is not what claims.yaml and the records give"
    parser.add_argument("--check", action="store_true", help=check)
    parser.add_argument(
        "--readme", action="store_true", help="write the computed parts of README.md and docs, and claims.md"
    )
    options = parser.parse_args()
    try:
        profile = active_profile() if options.profile is None else options.profile
        results = load_results(profile)
        table = claims_table(results)
        if options.second is not None:
            table = compare_profiles({name: load_results(name) for name in (profile, options.second)})
        for r in results:
            print(f"{r['verdict']:12} {r['kind']:11} {r['id']:20} {format_estimate(r)}: {r['statement']}")
        print(f"{len(results)} claims: {count_verdicts(results)}")
        print(f"figures: {ROOT.joinpath('figures', profile).relative_to(ROOT)}/, all numbers: data/{profile}/metrics/")
        if options.readme:
            records, protocol = saved_records(profile), read_protocol()
            blocks = readme.readme_blocks(records, results)
            blocks["short"] = readme.short_answer(results, protocol, profile)
            pages = {name: (ROOT / name).read_text(encoding="utf-8") for name in readme.PAGES}
            for name, text in readme.fill_pages(pages, blocks, figure_captions(records, dataset_of(profile))).items():
                write_text(ROOT / name, text)
            write_text(
                results_dir(profile) / "claims.md",
                readme.claims_page(profile, protocol_text(records, profile, protocol), table),
            )
        if options.check:
            check_results(profile, results)
    except (OSError, ValueError, LookupError) as error:
        raise SystemExit(f"lib.claims: {error.args[0] if isinstance(error, LookupError) else error}") from None
    failed = [r["id"] for r in results if r["kind"] == "primary" and r["verdict"] in (REFUTED, DIFFERENT)]
    if options.check and failed:
        raise SystemExit(f"refuted: {', '.join(failed)}")


if __name__ == "__main__":
    main()
