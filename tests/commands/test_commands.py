"""`python -m lib`: what a visitor types, with the networks that come with the repository."""

import io
import json
import signal
import sys

import numpy as np
import pytest
import torch
from tqdm.std import tqdm

from lib import __main__ as commands
from lib.commands import check, evaluate, named
from lib.commands.measures import REPORTED
from lib.data import load_dataset
from lib.evaluation import adversarial_images
from lib.evaluation.matched_attacks import LAST
from lib.pretrained import PRETRAINED, load_classifier
from lib.utils.files import ROOT
from lib.utils.images import write_image
from tests.controls import detached_input, nan_off_grid, random_output

BALL = ("--data", "digits", "--eps", "0.1", "--images", "8")
CALL = {"seconds": 0.0, "command": ""}  # of a record: what two calls of one evaluation may differ in


def test_a_purified_classifier_is_evaluated(call, tmp_path):
    out, images = tmp_path / "out.json", tmp_path / "adversarial.npz"
    arguments = ("evaluate", "digits/natural", "--purifier", "digits/adaptive-1", *BALL)
    code, text, _ = call(*arguments, "--json", out, "--adversarial", images)
    result = json.loads(out.read_text())
    assert code == 0 and result["red"] == [] and text.startswith("digits/adaptive-1 before digits/natural: digits")
    assert result["random"] and result["draws"] == 10 and result["n"] == 8 and result["eps"] == 0.1
    measures = result["measures"]
    assert measures.keys() == REPORTED.keys()
    for row in measures.values():
        assert row["low"] <= row["value"] <= row["high"]
    assert measures["attack_induced_loss"]["value"] == pytest.approx(
        measures["clean"]["value"] - measures["robust"]["value"]
    )
    assert measures["worst_of_10"]["value"] <= measures["robust"]["value"] < measures["clean"]["value"]
    assert f"{100 * measures['robust']['value']:.1f} %" in text and "(control)" in text
    assert result["clean_acc"] == f"{100 * measures['clean']['value']:.2f}" and "autoattack_acc" not in result
    assert result["protocol"]["attacks"] == "matched" and result["attacks"]["exact-ce"]["backward"] > 0
    points, numbers = named.load_images("digits", 8, 0)
    assert result["outcomes"]["images"] == numbers
    with np.load(images) as arrays:
        assert np.array_equal(arrays["x"], points.x) and np.array_equal(arrays["y"], points.y)
        x = torch.from_numpy(arrays["x_adv"])
    assert (x - points.x).abs().max() <= 0.1 + 1e-6
    assert x.min() >= 0 and x.max() <= 1 and not torch.equal(x, points.x)


def test_a_deterministic_classifier_meets_autoattack(call, tmp_path, monkeypatch):
    results = {}
    for name in ("natural", "trades"):
        code, text, _ = call("evaluate", f"digits/{name}", *BALL, "--images", 64, "--json", tmp_path / "out.json")
        results[name] = json.loads((tmp_path / "out.json").read_text())
        assert code == 0 and "deterministic" in text and "control" not in text
        assert list(results[name]["attacks"]) == ["apgd-ce", "apgd-t", "fab-t", "square"]
        assert results[name]["measures"]["control"] == results[name]["measures"]["clean"]
        assert results[name]["autoattack_acc"] == f"{100 * results[name]['measures']['robust']['value']:.2f}"
    assert results["trades"]["measures"]["robust"]["value"] > results["natural"]["measures"]["robust"]["value"] + 0.1
    code, _, _ = call("evaluate", "digits/trades", *BALL, "--effort", "quick", "--json", tmp_path / "out.json")
    assert code == 0 and "autoattack_acc" not in json.loads((tmp_path / "out.json").read_text())  # not its budget


def test_models_of_ones_own_and_red_marks(call, own):
    marks = {"plain": None, "network": None, "masked": "no gradient", "broken": "not finite"}
    for name, mark in marks.items():
        code, text, _ = call("evaluate", f"mine:{name}", *BALL, "--json", own / "out.json")
        red = json.loads((own / "out.json").read_text())["red"]
        assert (code, bool(red)) == ((0, False) if mark is None else (evaluate.RED, True)), (name, text)
        assert mark is None or (mark in " ".join(red) and f"RED: {red[0]}" in text)
    code, text, _ = call("evaluate", "mine:noisy", *BALL, "--json", own / "out.json")
    noisy = json.loads((own / "out.json").read_text())
    assert noisy["random"] and noisy["draws"] == 10 and noisy["protocol"]["attacks"] == "matched"
    assert "ten of ten" in text and noisy["measures"]["control"]["value"] <= noisy["measures"]["clean"]["value"]


def test_an_attack_without_gradients_that_does_better_is_red():
    def record(by_gradient, by_queries, noise=None):
        rows = {"apgd": (by_gradient, 9), "pgd": (by_gradient + 0.1, 9), "square": (by_queries, 0)}
        table = {name: {"accuracy": share, "backward": n} for name, (share, n) in rows.items()}
        robust = {"accuracy": min(by_gradient, by_queries)} | ({} if noise is None else {"control_noise": noise})
        return {"attacks": table, "robust": robust, "warnings": ["apgd leaves 50.00%, square only 40.00%"]}

    assert evaluate.red_marks(record(0.5, 0.48)) == [] == evaluate.red_marks(record(0.2, 0.9, noise=0.9))
    (mark,) = evaluate.red_marks(record(0.5, 0.46))
    assert mark.startswith("the best attack by gradients leaves 50.0%, one without gradients 46.0%")
    assert "noise of the same radius only 10.0%" in evaluate.red_marks(record(0.2, 0.9, noise=0.1))[0]


def test_an_interrupted_evaluation_goes_on(call, tmp_path, monkeypatch):
    arguments = ("evaluate", "digits/natural", *BALL, "--resume", tmp_path / "r", "--json", tmp_path / "out.json")
    attacked, real = [], adversarial_images._attack_batch

    def stop(label, *rest):
        attacked.append(label)
        if len(attacked) == 3:
            raise KeyboardInterrupt
        return real(label, *rest)

    monkeypatch.setattr(adversarial_images, "_attack_batch", stop)
    assert call(*arguments)[0] == 130
    assert call(*arguments)[0] == 0
    resumed = json.loads((tmp_path / "out.json").read_text())
    assert attacked[:4] == ["apgd-ce", "apgd-t", "fab-t", "fab-t"]  # the first two are not made again
    monkeypatch.setattr(adversarial_images, "_attack_batch", real)
    assert call(*arguments[:-4], "--json", tmp_path / "out.json")[0] == 0
    whole = json.loads((tmp_path / "out.json").read_text())
    assert resumed | CALL == whole | CALL


def test_images_of_ones_own(own):
    data = load_dataset("digits")
    x, y = data.test.x[:12], data.test.y[:12]
    np.savez(own / "float.npz", x=x.numpy(), y=y.numpy())
    np.savez(own / "bytes.npz", x=(255 * x).round().to(torch.uint8).numpy(), y=y.numpy().astype(np.uint8))
    for k, (image, label) in enumerate(zip(x, y, strict=True)):
        (own / "images" / str(int(label))).mkdir(parents=True, exist_ok=True)
        write_image(image, own / "images" / str(int(label)) / f"{k:02}.png")
    points, numbers = named.load_images(str(own / "float.npz"), 5, 0)
    assert torch.equal(points.x, x[numbers]) and torch.equal(points.y, y[numbers]) and len(set(numbers)) == 5
    rounded, again = named.load_images(str(own / "bytes.npz"), 5, 0)
    assert again == numbers and (rounded.x - points.x).abs().max() <= 0.5 / 255 + 1e-6
    every, places = named.load_images(str(own / "images"), 99, 0, channels=1, size=8)
    classes = sorted(set(map(str, y.tolist())))
    order = [k for name in classes for k in range(12) if str(int(y[k])) == name]
    assert torch.equal(every.y, torch.tensor([classes.index(str(int(y[order[p]]))) for p in places]))
    assert (every.x - x[[order[p] for p in places]]).abs().max() <= 0.5 / 255 + 1e-6


def test_a_check_says_what_is_red(call, own):
    code, text, _ = call("check", "digits/natural", *BALL, "--images", 40, "--json", own / "out.json")
    checks = json.loads((own / "out.json").read_text())["checks"]
    assert code == 0 and "RED" not in text and not any(row["flag"] for row in checks)
    code, text, _ = call("check", "mine:masked", *BALL)
    assert code == evaluate.RED and "RED zero gradients" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("digits/natura",), "expected a classifier 'digits/natura' in data/pretrained, got none: there are digits/"),
        (("absent:f",), "expected a function 'absent:f' that returns a model, got none: No module named 'absent'"),
        (("mine:absent",), "expected a function 'mine:absent' that returns a model"),
        (("mine:number",), "expected 'mine:number' to be a function that returns a model, got int"),
        (("mine:nothing",), "expected 'mine:nothing' to return a function of images, got NoneType"),
        (("robustbench:Standard",), "expected the package robustbench, got none: pip install robustbench"),
        (("digits/natural", "--purifier", "digits/blue-1"), "no purifier 'blue-1'"),
        (("digits/natural", "--purifier", "absent/cd-1"), "expected a purifier such as digits/adaptive-1, of the data"),
        (("digits/natural", "--eps", "x"), "expected a radius such as 8/255 or 0.1, got 'x'"),
        (("digits/natural", "--eps", "0"), "expected --eps to be a finite number > 0, got 0"),
        (("digits/natural", "--images", "0"), "expected --images to be an integer >= 1, got 0"),
        (("digits/natural", "--draws", "9"), "expected --draws to be an integer >= 10, got 9"),
        (("digits/natural", "--data", "absent"), "an .npz file, a folder or module:function, got 'absent'"),
        (("digits/natural", "--data", "mine.py"), "mine.py: expected an .npz file with the arrays x and y"),
        (("mine:noisy", "--attacks", "autoattack"), "expected a deterministic defence for --attacks autoattack"),
        (("digits/natural", "--json", "."), "expected"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_in_one_line(call, own, monkeypatch, arguments, message):
    monkeypatch.setattr(evaluate, "evaluate_defence", lambda *_: pytest.fail("begins"))
    code, _, said = call("evaluate", arguments[0], *BALL, *arguments[1:])
    assert code == 1 and message in said and said.startswith("python -m lib evaluate: ") and "\n" not in said


def test_commands_are_listed_and_others_refused(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lib"])
    commands.main()
    text = capsys.readouterr().out
    assert all(f"\n  {name}" in text for name in commands.COMMANDS)
    monkeypatch.setattr(sys, "argv", ["lib", "evalute"])
    with pytest.raises(SystemExit, match="expected one of these commands, got 'evalute'"):
        commands.main()


def test_networks_of_the_repository_take_at_most_80_mb():
    assert sum(path.stat().st_size for path in (ROOT / PRETRAINED).rglob("*") if path.is_file()) <= 80e6


def test_models_of_controls_are_what_they_are_called(digits):
    model = load_classifier("digits/natural")
    x = digits[0][:4]
    assert torch.equal(detached_input(model)(x), model(x)) and nan_off_grid(model)(x + 0.01).isnan().all()
    assert named.answers_vary(random_output(model, torch.default_generator), x) and not named.answers_vary(model, x)


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_every_command_has_help_with_an_example_of_arguments_that_it_takes(name, capsys, monkeypatch):
    _, words, example = commands.COMMANDS[name]
    monkeypatch.setattr(sys, "argv", ["lib", name, "--help"])
    with pytest.raises(SystemExit) as left:
        commands.main()
    text = capsys.readouterr().out
    assert not left.value.code and text.startswith("usage: ") and words
    assert text.endswith(f"\nexample: python -m lib {name} {example}".rstrip() + "\n")
    assert all(option in text for option in example.split() if option.startswith("--"))


def test_ctrl_c_ends_a_command_with_130_in_one_line(call, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "run_evaluation", lambda *_: signal.raise_signal(signal.SIGINT))
    monkeypatch.setattr(sys, "argv", ["lib", "evaluate", "digits/natural", *BALL])
    with pytest.raises(SystemExit) as left:
        commands.main()
    assert left.value.code == 130 and capsys.readouterr().err == "python -m lib evaluate: interrupted\n"


def test_commands_that_take_long_show_progress_and_what_remains(call, monkeypatch):
    bars = []

    def noted(iterable=None, **options):
        bars.append(tqdm(iterable, **options | {"file": io.StringIO(), "disable": False}))
        return bars[-1]

    for module in (adversarial_images, evaluate, check):
        monkeypatch.setattr(module, "tqdm", noted)
    assert call("evaluate", "digits/natural", *BALL, "--images", 16, "--checks")[0] in (0, 3)
    assert [bar.desc.rstrip(": ") for bar in bars][:1] == ["attacks"]
    assert {"attacks", LAST, "sanity checks"} <= {bar.desc.rstrip(": ") for bar in bars}
    assert all(bar.total and bar.n == bar.total for bar in bars)
    assert 0.5 < check.expected_passes("quick") * 16 / bars[-1].n < 2  # what remains is told from an estimate
