"""The report on pieces of GPU minutes says what is planted in synthetic ones, of all pieces or of some."""

import importlib.util
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lib.pipeline import pieces as pipeline_pieces
from lib.report import captions, figures, piece_claims, piece_files, pieces_report
from lib.report.claim_schema import load_claims
from lib.report.figures.diffpure_defences import defence_label
from lib.utils import artifacts
from lib.utils.draws import pack_draws
from lib.utils.files import read_json, write_json

spec = importlib.util.spec_from_file_location("piece_records", Path(__file__).with_name("piece_records.py"))
planted = importlib.util.module_from_spec(spec)
spec.loader.exec_module(planted)

ATTACKED = {"adaptive-1": 0.5, "clean-1": 0.4, "label-n0-1": 0.45, "trades": 0.45, "sde-100": 0.6, "ddim-100": 0.5}
ROBUST = {"resnet18-trades": 0.5, "resnet18-ard": 0.47, "resnet50-trades": 0.53}
STUDENTS, TEACHER = piece_files.STUDENTS_PIECE, piece_files.TEACHER_PIECE


@pytest.fixture
def place(tmp_path, monkeypatch):
    for module in (artifacts, figures, captions, piece_files, pieces_report):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    return tmp_path


def record(n: int, names=planted.STUDENTS, **changes) -> dict:
    outcomes = planted.planted_outcomes(names, n, ATTACKED) | changes
    return piece_files.matched_record(planted.matched_piece(outcomes, list(range(n))), "cifar10")


def decide(records, **options) -> dict[str, dict]:
    return {r["id"]: r for r in piece_claims.decide_claims(records, "cifar10", **options)}


def report(capsys) -> str:
    pieces_report.main([])
    return capsys.readouterr().out


def refusal(*arguments) -> str:
    with pytest.raises(SystemExit) as stopped:
        pieces_report.main([*arguments])
    return str(stopped.value)


def table_row(page: str, head: str, start: str, after: str = "") -> dict[str, str]:
    """The cells of a row, by column, of the first table that has such a column."""
    lines = page[page.index(after) :].splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("|") and head in line)
    row = next(line for line in lines[first:] if line.startswith(f"| {start} |"))
    return dict(zip(*([cell.strip() for cell in line.split("|")[1:-1]] for line in (lines[first], row)), strict=True))


def random_bits(share: float, n: int, seed: int) -> dict:
    return pack_draws(np.random.default_rng(seed).random((planted.DRAWS["fresh"], n)) < share)


def test_an_effect_of_ten_points_on_512_images_is_supported_and_a_null_is_not():
    noisy = {k: planted.planted_outcomes([k], 512, {})[k] for k in ("clean-1", "ddim-1")}
    for seed, name in enumerate(noisy):
        right = np.random.default_rng(seed).random(512) < 0.4
        noisy[name]["matched"] = pack_draws(np.tile(right, (planted.DRAWS["fresh"], 1)))
    results = decide({STUDENTS: record(512)})
    constraint, null = results["dp.constraint"], results["dp.label_trades"]
    assert constraint["verdict"] == "supported" and constraint["value"] == pytest.approx(100 * 51 / 512)
    assert (constraint["piece"], constraint["n_images"], constraint["n_seeds"]) == (STUDENTS, 512, 1)
    assert constraint["over"] == "images of one seed" and constraint["ci95"][0] > 0
    assert null["verdict"] == "equivalent" and null["value"] == 0
    assert {r["kind"] for r in results.values()} == {"exploratory"}
    assert decide({STUDENTS: record(512, **noisy)})["dp.distillation"]["verdict"] == "inconclusive"


def test_128_images_of_the_teacher_decide_nothing():
    results = decide({TEACHER: record(128, planted.EVERYONE)})
    measured = [r for r in results.values() if r["piece"]]
    assert {r["verdict"] for r in measured} == {"inconclusive"} and len(measured) == 14
    assert results["dp.sde"]["value"] == pytest.approx(10, abs=0.5) and results["dp.sde"]["ci95"][0] > 0


def test_a_claim_is_measured_on_the_students_where_they_have_all_it_is_about():
    both = decide({STUDENTS: record(512), TEACHER: record(128, planted.EVERYONE)})
    assert both["dp.constraint"]["piece"] == STUDENTS and both["dp.sde"]["piece"] == TEACHER
    assert both["dp.student_loss"]["n_images"] == 128
    alone = decide({STUDENTS: record(512)})
    assert alone["dp.sde"]["verdict"] == "not measured" and alone["dp.sde"]["why"].endswith(f"in {TEACHER}, not done")
    assert alone["dp.constraint_few"]["why"] == "adaptive-2, clean-2: in no piece"
    assert alone["dp.speed_1"]["why"] == "about speed: in no piece"
    assert "other numbers than outcomes" in alone["dp.inherits"]["why"]
    assert set(alone) == {claim.id for claim in load_claims() if claim.id.startswith("dp.")}
    assert not any(r["piece"] for r in decide({}).values())


@pytest.mark.parametrize("key, name", [("defence", "adaptve-1"), ("threat", "matchd"), ("defence", "sde-10")])
@pytest.mark.parametrize("part", [STUDENTS, TEACHER])
def test_a_misspelt_name_in_a_claim_is_an_error(key, name, part):
    (claim,) = (c for c in load_claims() if c.id == "dp.constraint")
    wrong = replace(claim, plus=replace(claim.plus, **{key: name}))
    names = planted.STUDENTS if part == STUDENTS else planted.EVERYONE
    with pytest.raises(ValueError, match=f"claim dp.constraint: expected a {key} .* got {name}: correct it"):
        decide({part: record(60, names)}, claims=[wrong])


def test_the_page_has_the_planted_numbers_and_every_figure_its_caption(place, capsys, monkeypatch):
    widths = []
    saved = lambda figure, *names: (widths.append(figure.get_size_inches()[0]), figures.save_figure(figure, *names))  # noqa: E731
    monkeypatch.setattr(pieces_report, "save_figure", saved)
    planted.write_networks(place, "cifar10")
    planted.write_autoattack(place, "cifar10", ROBUST)
    for part, n, names in (("students", 500, planted.STUDENTS), ("teacher", 100, planted.EVERYONE)):
        outcomes = planted.planted_outcomes(names, n, ATTACKED)
        planted.write_matched(place, "cifar10", part, planted.matched_piece(outcomes, list(range(n))))
    ratios = {"float32": {"ratio": 1.0}, "compiled": {"ratio": 2.25}}
    bench = {"device": "an H100", "commit": "abcdef012", "tables": {"training": ratios}}
    write_json(place / "data/cifar10/bench/gpu.json", bench)
    assert "25 claims: " in report(capsys)
    page = (place / "data/cifar10/pieces/README.md").read_text(encoding="utf-8")
    student = table_row(page, "loss (points)", defence_label("adaptive-1"), after=STUDENTS)
    assert [student[k].split()[0] for k in ("clean (%)", "attacked (%)", "loss (points)")] == ["90.0", "50.0", "40.0"]
    assert student["ten draws, no attack (%)"].split()[0] == "90.0" and student["10⁶ multiply-adds"] == "1,500"
    ard = table_row(page, "AutoAttack (%)", "ARD, ResNet-18")
    difference = next(v for k, v in ard.items() if "minus TRADES" in k)
    assert ard["AutoAttack (%)"].startswith("47.0 [43.") and difference.startswith("-3.0 [-4.")
    assert table_row(page, "AutoAttack (%)", "TRADES, ResNet-50")["AutoAttack (%)"].startswith("53.0")
    assert table_row(page, "distance", defence_label("sde-100"))["accuracy on purified images (%)"][:4] == "87.1"
    assert table_row(page, "protocol", "attack on the bare classifier")[defence_label("adaptive-1")] == "80.0"
    assert table_row(page, "compiled", "training")["compiled"] == "2.25"
    assert table_row(page, "minutes", "all", after="## Minutes")["minutes"] == f"{18 * 4 + 2 * 8:.1f}"
    assert "Not done: `autoattack/resnet18-pgd-at`, `autoattack/resnet18-rslad`, " in page
    assert "- `resnet18-ard`: a weak one" in page
    written = read_json(place / "data/cifar10/pieces/claims.json")["claims"]
    assert next(r for r in written if r["id"] == "dp.constraint")["value"] == pytest.approx(10)
    few = sum(r["n_images"] == 100 for r in written)
    assert few == 5 and "5 of 14 rest on fewer than 400 images" in page
    shown = re.findall(r"!\[\w+\]\(\.\./\.\./\.\./(figures/cifar10/\w+)\.png\)\n\n(.+)", page)
    assert len(shown) == 10 and all((place / f"{name}.{form}").exists() for name, _ in shown for form in ("svg", "png"))
    texts = dict(shown)
    assert len(widths) == 10 and max(widths) <= 7.25  # two columns of a paper
    assert "1 seed × 500 images" in texts["figures/cifar10/matched_students_headline"]
    assert "1 seed × 100 images" in texts["figures/cifar10/matched_teacher_inflation"]
    assert "Not attacked: natural, ResNet-18, PGD-AT, ResNet-18" in texts["figures/cifar10/classifiers"]
    head = (place / "figures/cifar10/captions.md").read_text(encoding="utf-8")
    assert f"Written by `{pieces_report.COMMAND} --profile cifar10`" in head and "Data set: cifar10." in head


def test_one_piece_makes_a_page_and_all_others_are_named(place, capsys):
    write_json(place / "data/pretrained/cifar10/resnet18/card.json", planted.classifier_card("natural", 0.95))
    assert "25 not measured" in report(capsys)
    page = (place / "data/cifar10/pieces/README.md").read_text(encoding="utf-8")
    assert ", ".join(f"`{name}`" for name in piece_files.PLANNED[1:]) in page
    assert table_row(page, "AutoAttack", "natural, ResNet-18")["clean (%)"].startswith("95.0 [94.")
    outcomes = planted.planted_outcomes(planted.STUDENTS, 60, ATTACKED)
    planted.write_matched(place, "cifar10", "students", planted.matched_piece(outcomes, list(range(60))))
    report(capsys)
    page = (place / "data/cifar10/pieces/README.md").read_text(encoding="utf-8")
    assert f"`{STUDENTS}`" not in page.partition("Not done")[2].partition("\n")[0] and "- Evidence" not in page


def test_distillation_has_its_tables(place, capsys):
    students = {
        f"{kind}/100/s{s}": {"clean": planted.share_bits(share, 200)}
        for kind, share in (("hard", 0.5), ("soft", 0.6))
        for s in range(3)
    }
    answers = {"clean": planted.share_bits(0.9, 200), "fgsm@0.1": planted.share_bits(0.7, 200)}
    answers["worst@0.1"] = planted.share_bits(0.02, 200)
    for name, correct in (
        ("kd-labels", students | {"teacher": {"clean": planted.share_bits(0.95, 200)}}),
        ("dd-temperatures", {"T100": answers}),
    ):
        outcomes = {"images": list(range(200)), "correct": correct}
        entry = planted.LABEL | {"recipe": {}, "metrics": {}, "outcomes": outcomes}
        write_json(place / f"data/cifar10/pieces/{name}.json", entry)
    report(capsys)
    page = (place / "data/cifar10/pieces/README.md").read_text(encoding="utf-8")
    row = table_row(page, "soft minus hard", "100")
    assert [v.split()[0] for v in row.values()] == ["100", "50.0", "60.0", "+10.0"]
    assert "3 seeds of students × 200 test images" in page and "whose accuracy is 95.0 %" in page
    row = table_row(page, "all attacks, ε = 0.1", "T100")
    assert [v.split()[0] for v in row.values()] == ["T100", "90.0", "70.0", "2.0"] and "[0.0, " in row.popitem()[1]


def test_what_is_not_there_or_does_not_fit_is_refused_in_one_line(place):
    assert refusal() == (
        "lib.report.pieces_report: expected pieces in data/pretrained/cifar10 or data/cifar10/pieces, got none: "
        "run `python -m lib.pipeline.pieces NAME …`"
    )
    path = place / "data/pretrained/cifar10/resnet18/card.json"
    card = planted.classifier_card("natural", 0.95)
    write_json(path, card | {"command": "python -m lib.pipeline.publish digits 20"})
    assert "got none" in refusal()
    write_json(path, {k: v for k, v in card.items() if k != "minutes"})
    assert f"{path}: expected command, commit, " in refusal() and "got none for minutes: run" in refusal()
    write_json(path, card)
    planted.write_autoattack(place, "cifar10", ROBUST)
    planted.write_autoattack(place, "cifar10", {"resnet18-ard": 0.5}, n=40)
    assert "expected the images and settings of the other pieces" in refusal()
    planted.write_autoattack(place, "cifar10", {"resnet18-ard": 0.5}, n=1)
    assert "autoattack/resnet18-ard: expected two images or more" in refusal()
    assert "cifar11" in refusal("--profile", "cifar11")


def test_the_planned_pieces_are_those_that_the_command_runs():
    assert list(piece_files.PLANNED) == [piece.name for piece in pipeline_pieces.PIECES]
