"""`python -m lib export`: files answer what torch does for any batch and noise; int8 files are another model."""

import sys

import onnx
import pytest
import torch

from lib import __main__ as commands
from lib.attacks.api import attack
from lib.commands import export, named, onnx_benchmark, onnx_files
from lib.commands.arguments import Effort
from lib.commands.onnx_files import PARITY, OnnxFile, named_parts, onnx_bytes, parity, random_inputs
from lib.evaluation.attack_plan import EvaluationSettings
from lib.evaluation.matched_attacks import AttackEffort, MeasuringDraws, correct_draws
from lib.utils.random_state import seeded_noise

TINY = Effort(AttackEffort(2, 1, 4, 1, 1), MeasuringDraws(2, 1, 2, 10), 2, 2, 4, 2)
PAIR = ("digits/adaptive-1", "digits/natural")


@pytest.fixture(scope="module")
def pair():
    """Parts of the one-step student before the ordinary classifier, their file and its int8 version."""
    parts = named_parts(*PAIR)
    content = onnx_bytes(parts)
    return parts, content, onnx_files.quantized_bytes(content)


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs `python -m lib export`; returns exit status, what it printed, and what it said on leaving."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["lib", "export", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            commands.main()
        code = left.value.code
        return code if isinstance(code, int) else 1, capsys.readouterr().out, "" if isinstance(code, int) else code

    return run


@pytest.mark.parametrize(
    ("name", "draws"),
    [("digits/pd-1", 1), ("digits/cd-3", 4), ("digits/sde-3", 4), ("digits/heun-2", 1), ("digits/label-n0-1", 1)],
)
def test_every_kind_of_purifier_answers_what_torch_does(name, draws):
    """In batches of 1, 3 and 17, on random images and noises."""
    parts = named_parts(name)
    file = OnnxFile(onnx_bytes(parts))
    assert parts.draws == file.draws == draws and file.outputs == ["y"]
    compared = parity(file, parts, seed=7, rounds=2)
    assert compared.difference <= PARITY and compared.images == 2 * (1 + 3 + 17)
    with pytest.raises(ValueError, match="expected a file with logits, got digits/"):
        file(torch.zeros(1, 1, 8, 8))


@torch.no_grad()
def test_a_pair_answers_what_torch_does_and_its_noise_matters(pair):
    parts, content, _ = pair
    file = OnnxFile(content)
    assert parity(file, parts, seed=11).difference <= PARITY
    x, noise = random_inputs(parts, 64)
    one, other = file.run(x, noise), file.run(x, noise.flip(1))
    assert (one["y"] - other["y"]).abs().amax((1, 2, 3)).min() > 1e-3 and one["y"].min() >= 0 and one["y"].max() <= 1
    alone = torch.cat([file.run(x[k : k + 1], noise[:, k : k + 1])["logits"] for k in range(8)])
    assert (alone - one["logits"][:8]).abs().max() <= PARITY  # images of a batch do not mix
    defence, _ = named.compose_defence(named.named_model(PAIR[1], "digits"), PAIR[0], x)
    answers = []
    for model in (defence, file):
        with seeded_noise(model, 5, x.device):
            answers.append(model(x))
    assert (answers[0] - answers[1]).abs().max() <= PARITY  # the same noise from the global random state
    assert named.answers_vary(file, x)


def test_a_file_says_what_it_is(pair):
    parts, content, small = pair
    about = OnnxFile(content).about
    assert about == parts.about | {"draws": "1"}
    assert OnnxFile(small).about == about | {"int8": "weights of MatMul and Conv, by onnxruntime"}
    assert about["name"] == "digits/adaptive-1" and about["classifier"] == "digits/natural" and len(about["commit"]) > 6
    assert len(about["purifier sha256"]) == len(about["classifier sha256"]) == 64
    assert "ε = 0.1" in about["purifier measured"] and about["data set"] == "digits" and about["evaluations"] == "1"
    assert "noise" in onnx.load_from_string(content).doc_string
    shapes = {i.name: i.shape for i in OnnxFile(content).session.get_inputs()}
    assert shapes == {"x": ["n", 1, 8, 8], "noise": [1, "n", 1, 8, 8]}


def test_int8_agrees_with_float_on_clean_images(pair):
    """And is not the same model: its outputs are farther from torch's than a float file's may be."""
    parts, content, small = pair
    assert onnx_files.quantized_share(small) == {"Conv": "27 of 27", "MatMul": "11 of 11"}
    points, _ = named.load_images("digits", 256, 3)
    noise = random_inputs(parts, 256)[1]
    one, two = (OnnxFile(c).run(points.x, noise)["logits"].argmax(-1) for c in (content, small))
    assert (one == two).float().mean() >= 0.95
    assert parity(OnnxFile(small), parts, rounds=1).difference > PARITY


def test_square_attacks_an_int8_file(pair):
    """Without gradients; and what it breaks of the int8 pair is measured on fresh draws."""
    points, _ = named.load_images("digits", 48, 3)
    defence = onnx_benchmark.file_defence(pair[2])
    x = attack("square", defence, *points, 0.1, queries=60, progress=False)
    assert 0 < (x - points.x).abs().max() <= 0.1 + 1e-6
    clean, attacked = (correct_draws(defence, images, points.y, 10, 0, "test")[0].mean() for images in (points.x, x))
    assert clean > 0.9 and attacked <= clean
    again, _ = (correct_draws(defence, points.x, points.y, 10, 0, "test") for _ in range(2))
    assert again[0].mean() == clean  # the noise of a file can be seeded


def test_a_pair_is_compared_with_its_int8_version(pair):
    points, numbers = named.load_images("digits", 12, 0)
    defence, _ = named.compose_defence(named.named_model(PAIR[1], "digits"), PAIR[0], points.x)
    pairs = {onnx_benchmark.EAGER: defence, onnx_benchmark.INT8_FILE: onnx_benchmark.file_defence(pair[2])}
    at = EvaluationSettings(eps=0.1, draws=2)
    accuracy = onnx_benchmark.pair_accuracy(pairs, points, numbers, at, TINY, queries=4)
    for row in accuracy.values():
        clean = {row[condition]["clean"]["value"] for condition in ("matched", "square", "worst")}
        assert len(clean) == 1 and row["worst"]["robust"]["value"] <= clean.pop() and row["same answers"] > 0.9
    rows = onnx_benchmark.accuracy_rows(accuracy)
    assert list(rows) == ["torch", "onnxruntime int8"] and len({tuple(row) for row in rows.values()}) == 1


def test_latencies_are_ratios_of_one_run(monkeypatch):
    monkeypatch.setattr(onnx_benchmark, "compiled_parts", named_parts)  # compiling takes a minute
    rows = onnx_benchmark.latency_rows("digits/natural", rounds=3, batches=(2,))
    assert [name.partition(", ")[2] for name in rows] == list(onnx_benchmark.RUNTIMES)
    assert rows["batch 2, torch"]["× torch"] == 1 and all(r["low"] <= r["× torch"] <= r["high"] for r in rows.values())


def test_the_command_writes_files_that_it_has_compared(call, tmp_path):
    target = tmp_path / "new" / "pair.onnx"
    code, text, _ = call(PAIR[0], target, "--classifier", PAIR[1], "--int8")
    assert code == 0 and "x (n, 1, 8, 8) and noise (1, n, 1, 8, 8) to y and logits" in text
    assert "8-bit weights in 27 of 27 Conv, 11 of 11 MatMul" in text and "not the same model" in text
    assert OnnxFile(target).outputs == OnnxFile(export.int8_path(target)).outputs == ["y", "logits"]
    code, text, _ = call("digits/trades", tmp_path / "c.onnx")
    assert code == 0 and "x (n, 1, 8, 8) to logits" in text and not (tmp_path / "c.int8.onnx").exists()
    assert sorted(p.name for p in tmp_path.rglob("*.onnx")) == ["c.onnx", "pair.int8.onnx", "pair.onnx"]


def test_a_file_that_differs_from_torch_is_not_written(call, tmp_path, monkeypatch):
    real = onnx_files.onnx_bytes

    def other(parts):
        with torch.no_grad():
            content = real(parts)
            next(parts.classifier.parameters()).add_(0.01)
        return content

    monkeypatch.setattr(onnx_files, "onnx_bytes", other)
    code, _, said = call(*PAIR[:1], tmp_path / "x.onnx", "--classifier", PAIR[1])
    assert code == 1 and "expected outputs within 0.0001 of torch's, got" in said and "nothing was written" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("digits/adaptive-1", "x.pt"), "expected a file name that ends in .onnx, got"),
        (("digits/blue-1", "x.onnx"), "no purifier 'blue-1'"),
        (("absent/cd-1", "x.onnx"), "expected a purifier such as digits/adaptive-1, of the data sets digits"),
        (("digits/sde-100", "x.onnx"), "expected at most 20 evaluations of a network"),
        (("digits/natural", "x.onnx", "--classifier", "digits/trades"), "expected a purifier before --classifier"),
        (("digits/cd-1", "x.onnx", "--classifier", "digits/none"), "expected a classifier 'digits/none'"),
    ],
)
def test_what_cannot_be_exported_is_refused_in_one_line(call, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, _, said = call(*arguments)
    assert code == 1 and said.startswith("python -m lib export: ") and message in said and "\n" not in said
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_onnx_file_is_refused(tmp_path):
    (tmp_path / "x.onnx").write_bytes(b"no model")
    with pytest.raises(ValueError, match="expected an ONNX file, got"):
        OnnxFile(tmp_path / "x.onnx")
