"""What pieces of GPU minutes say, in one page: `python -m lib.report.pieces_report [--profile cifar10]`.

Reads what `lib.pipeline.pieces` left, all pieces or some, and writes `data/<data set>/pieces/README.md` with tables and
claims, `claims.json` beside it, and the figures with their captions to `figures/<profile>`.
"""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt

from lib.report import piece_tables
from lib.report.captions import save_captions
from lib.report.claim_results import dataset_of
from lib.report.claim_verdicts import FEWEST_IMAGES
from lib.report.claims import count_verdicts
from lib.report.figures import save_figure
from lib.report.figures.diffpure_defences import evidence_note
from lib.report.figures.pieces import piece_figures
from lib.report.piece_claims import decide_claims
from lib.report.piece_distillation import distillation_tables
from lib.report.piece_files import STUDENTS_PIECE, TEACHER_PIECE, Pieces, matched_record, read_pieces
from lib.report.readme import bullet_list
from lib.report.sentences.diffpure import (
    adversarial_training_sentences,
    constraint_sentences,
    control_sentences,
    evidence_sentence,
    inflation_sentences,
    inheritance_sentences,
    noise_sentences,
)
from lib.report.sentences.diffpure_attacks import outside_sentences
from lib.utils.artifacts import results_dir
from lib.utils.files import ROOT, read_json, write_json, write_text
from lib.utils.processes import print_in_any_locale

COMMAND = "python -m lib.report.pieces_report"
ANY_DEFENCES = (constraint_sentences, adversarial_training_sentences, noise_sentences, inflation_sentences)
WITH_TEACHER = (inheritance_sentences, control_sentences)
PARTS = {STUDENTS_PIECE: "all but long purifiers", TEACHER_PIECE: "all defences"}
Result = Mapping[str, Any]


def matched_sentences(record: dict[str, Any]) -> list[str]:
    """Return what a piece of the matched set says, none where it has fewer images than one seed decides by."""
    if len(record["outcomes"]["images"]) < FEWEST_IMAGES:
        return []
    parts = [*ANY_DEFENCES, outside_sentences]
    if record["metrics"]["teacher"] in record["outcomes"]["correct"]:
        parts = [*WITH_TEACHER, *parts]
    return [evidence_sentence([record]), *(sentence for part in parts for sentence in part([record]))]


def claims_section(results: Sequence[Result]) -> str:
    """Return the claims that pieces decide, those on too few images, and those that no piece measures."""
    measured = [r for r in results if r["piece"]]
    parts = ["## Claims of experiment 5"]
    if measured:
        few = [r for r in measured if r["n_images"] < FEWEST_IMAGES]
        parts.append(f"Measured: {count_verdicts(measured)}. All are exploratory, p-values are not adjusted.")
        if few:
            count = f"{len(few)} of {len(measured)} rest on fewer than {FEWEST_IMAGES} images"
            parts.append(f"{count} of one seed, which decide nothing, whatever their interval is.")
        parts.append(piece_tables.claims_rows(measured))
    if others := [r for r in results if not r["piece"]]:
        parts.append(f"Not measured: {len(others)}.\n\n{piece_tables.unmeasured_rows(others)}")
    return "\n\n".join(parts)


def shown_figures(profile: str, captions: Mapping[str, str], *starts: str) -> list[str]:
    """Return the figures whose names begin so, each with its caption, as Markdown."""
    names = [name for name in captions if name.startswith(starts)]
    return [f"![{name}](../../../figures/{profile}/{name}.png)\n\n{captions[name]}" for name in names]


def attack_warnings(pieces: Pieces) -> list[str]:
    """Return what AutoAttack's evaluations warn of, such as an attack that is weaker than a simpler one."""
    stated = {name: measured["metrics"].get("warnings", []) for name, measured in pieces.autoattack.items()}
    return [f"`{name}`: {warning}" for name, warnings in stated.items() for warning in warnings]


def matched_section(name: str, record: dict[str, Any]) -> str:
    """Return tables and sentences of one piece of the matched set."""
    parts = [f"## Experiment 5's defences: `{name}`, {PARTS.get(name, 'other defences')}"]
    eps = f"Linf, ε = {record['metrics']['eps']:g} in pixel units"
    parts.append(f"{evidence_note([record]).partition(';')[0]}; {eps}; in brackets 95 % intervals over these images.")
    parts.append(piece_tables.defences_table(record))
    parts.append(
        "The same purifiers under the protocols of publications, accuracy in %, the most flattering first:\n\n"
        f"{piece_tables.protocols_table(record)}"
    )
    if sentences := matched_sentences(record):
        parts.append(bullet_list(sentences))
    return "\n\n".join(parts)


def pieces_page(
    profile: str,
    pieces: Pieces,
    records: Mapping[str, dict[str, Any]],
    results: Sequence[Result],
    captions: Mapping[str, str],
    bench: Result | None,
) -> str:
    """Return `data/<data set>/pieces/README.md`.

    Args:
        profile: whose settings the pieces have.
        pieces: the finished ones.
        records: of the matched set, by the pieces' names.
        results: of the claims.
        captions: of the figures, by their names.
        bench: what `lib.pipeline.gpu_benchmark` measured, None where it did not run.
    """
    missing = pieces.missing()
    lacking = f"Not done: {', '.join(f'`{name}`' for name in missing)}" if missing else "All pieces are done"
    parts = [f"# {pieces.dataset} in pieces"]
    parts.append(
        f"Written by `{COMMAND} --profile {profile}`. One seed of networks and attacks: intervals of 95 % are over "
        f"images, unless a table says otherwise, and say nothing of other seeds. {lacking}."
    )
    parts.append(claims_section(results))
    if pieces.classifiers:
        tables = (piece_tables.classifiers_table(pieces), piece_tables.purified_classifiers_table(pieces))
        parts += ["## Classifiers", *filter(None, tables), *shown_figures(profile, captions, "classifiers")]
        if warnings := attack_warnings(pieces):
            parts.append(bullet_list(warnings))
    if pieces.networks:
        parts.append(f"## Diffusion networks\n\n{piece_tables.networks_section(pieces)}")
        parts += shown_figures(profile, captions, "diffusion")
    for name, record in records.items():
        parts += [matched_section(name, record), *shown_figures(profile, captions, name.replace("/", "_"))]
    parts += [f"## {title}\n\n{table}" for title, table in distillation_tables(pieces.others).items()]
    if bench:
        about = f"Times as fast as plain float32, on {bench['device']}, commit `{bench['commit'][:7]}`"
        parts.append(f"## Speed\n\n{about}; compiling is not timed.\n\n{piece_tables.speed_table(bench)}")
    parts.append(f"## Minutes\n\n{piece_tables.minutes_table(pieces)}")
    return "\n\n".join(parts) + "\n"


def write_report(profile: str) -> str:
    """Write page, claims and figures of a profile's pieces; return what was written and decided, in words."""
    dataset = dataset_of(profile)
    pieces = read_pieces(dataset)
    records = {name: matched_record(measured, profile) for name, measured in sorted(pieces.matched.items())}
    results = decide_claims(records, profile)
    bench = results_dir(dataset, "bench") / "gpu.json"
    captions = {}
    for name, figure, caption in piece_figures(pieces, records):
        save_figure(figure, profile, name)
        plt.close(figure)
        captions[name] = f"{caption} Data set: {dataset}."
    save_captions(profile, captions, f"`{COMMAND} --profile {profile}` from pieces")
    page = pieces_page(profile, pieces, records, results, captions, read_json(bench) if bench.exists() else None)
    folder = results_dir(dataset, "pieces")
    write_json(folder / "claims.json", {"claims": results})
    write_text(folder / "README.md", page)
    verdicts = f"{len(results)} claims: {count_verdicts(results)}"
    return f"{verdicts}\n{len(captions)} figures: figures/{profile}/\npage: {folder.relative_to(ROOT)}/README.md"


def main(arguments: list[str] | None = None) -> None:
    """Write what the finished pieces of a profile's data set say."""
    print_in_any_locale()
    parser = argparse.ArgumentParser(prog=COMMAND, description=main.__doc__)
    parser.add_argument("--profile", default="cifar10", help="whose settings the pieces have (default: cifar10)")
    args = parser.parse_args(arguments)
    try:
        print(write_report(args.profile))
    except (OSError, ValueError, LookupError) as error:
        raise SystemExit(f"lib.report.pieces_report: {error}") from None


if __name__ == "__main__":
    main()
