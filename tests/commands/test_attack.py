"""`python -m lib attack`: the file holds what was attacked, answered and asked for, and is a data set again."""

import json

import numpy as np
import pytest
import torch

from lib.commands import evaluate, named
from lib.commands.evaluate import CONDITIONS
from lib.evaluation.matched_attacks import LAST, correct_draws
from lib.utils.draws import unpack_draws

CALL = ("--data", "digits", "--eps", "0.1", "--images", "8", "--seed", "3")


def test_attacked_images_are_written_with_answers_and_origin(call, tmp_path):
    target, record = tmp_path / "out.npz", tmp_path / "out.json"
    defence = ("digits/natural", "--purifier", "digits/adaptive-1")
    code, text, _ = call("attack", defence[0], target, *defence[1:], *CALL)
    assert code == 0 and text.endswith(f"{target}: 8 attacked images\n") and "attack-induced loss" in text
    call("evaluate", *defence, *CALL, "--json", record, "--adversarial", tmp_path / "same.npz")
    result = json.loads(record.read_text())
    with np.load(target) as arrays, np.load(tmp_path / "same.npz") as same:
        assert arrays.files == same.files
        assert all(np.array_equal(arrays[k], same[k]) for k in arrays.files if k != "command")
        points, numbers = named.load_images("digits", 8, 3)
        assert np.array_equal(arrays["x"], points.x) and np.array_equal(arrays["y"], points.y)
        assert arrays["numbers"].tolist() == numbers == result["outcomes"]["images"]
        x_adv = torch.from_numpy(arrays["x_adv"])
        assert 0 < (x_adv - points.x).abs().max() <= 0.1 + 1e-6 and x_adv.min() >= 0 and x_adv.max() <= 1
        for condition, images in CONDITIONS.items():
            right = arrays[f"answers_{images}"] == arrays["y"]
            assert right.shape == (10, 8)
            assert np.array_equal(right, unpack_draws(result["outcomes"]["correct"][condition]))
        model, _ = named.compose_defence(named.named_model(defence[0], "digits"), defence[2], points.x)
        expected, _ = correct_draws(model, x_adv, points.y, 10, 3, "evaluate/matched")
        assert np.array_equal(right, expected)  # the frozen measurement of experiment 5 answers the same
        assert set(arrays["made_by"]) <= {LAST, *arrays["attacks"]} and len(arrays["made_by"]) == 8
        assert sorted(arrays["attacks"]) == sorted(result["attacks"]) and arrays["name"] == result["name"]
        assert (arrays["eps"], arrays["norm"], arrays["seed"]) == (0.1, "Linf", 3)
        assert str(arrays["command"]).startswith("python -m lib attack digits/natural")


def test_the_file_is_a_data_set_again(call, tmp_path):
    target, record = tmp_path / "out.npz", tmp_path / "out.json"
    assert call("attack", "digits/natural", target, *CALL)[0] == 0
    with np.load(target) as arrays:
        x, x_adv, right = arrays["x"], arrays["x_adv"], arrays["answers_x_adv"] == arrays["y"]
    for source, images in ((f"{target}", x), (f"{target}:x_adv", x_adv)):
        points, rows = named.load_images(source, 99, 0)
        assert np.array_equal(points.x, images[rows])
        assert call("evaluate", "digits/natural", "--data", source, *CALL[2:], "--json", record)[0] == 0
        result = json.loads(record.read_text())
        assert result["n"] == 8 and result["dataset"] == source
    assert result["measures"]["clean"]["value"] == right.mean() < 1  # answers to the attacked images
    code, _, said = call("evaluate", "digits/natural", "--data", f"{target}:z", *CALL[2:])
    assert code == 1 and said.endswith("out.npz: expected the arrays z and y, got no z")


def test_an_attack_is_resumed_and_red_marks_show_in_its_exit_status(call, own, monkeypatch):
    options = (*CALL, "--resume", own / "r")
    assert call("attack", "digits/natural", own / "a.npz", *options)[0] == 0
    monkeypatch.setattr("lib.evaluation.adversarial_images._attack_batch", lambda *_: pytest.fail("attacked again"))
    monkeypatch.setattr(evaluate, "worst_of_set", lambda *_: pytest.fail("reached"))
    with pytest.raises(pytest.fail.Exception, match="reached"):
        call("attack", "digits/natural", own / "a.npz", *options)
    monkeypatch.undo()
    monkeypatch.chdir(own)
    code, text, _ = call("attack", "mine:masked", own / "b.npz", *CALL)
    assert code == 3 and "RED: " in text and (own / "b.npz").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("out.txt",), "expected a file name that ends in .npz, got out.txt"),
        (("mine.py/out.npz",), "expected a folder for mine.py/out.npz, got "),
        (("out.npz", "--eps", "x"), "expected a radius such as 8/255 or 0.1, got 'x'"),
        (("out.npz", "--batch-size", "0"), "expected --batch-size to be an integer >= 1, got 0"),
    ],
)
def test_what_cannot_be_attacked_is_refused_in_one_line(call, own, monkeypatch, arguments, message):
    monkeypatch.setattr(evaluate, "evaluate_defence", lambda *_: pytest.fail("begins"))
    code, _, said = call("attack", "digits/natural", arguments[0], *CALL, *arguments[1:])
    assert code == 1 and message in said and said.startswith("python -m lib attack: ") and "\n" not in said
