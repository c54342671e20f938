"""No attack leaves more than noise of the same radius without a mark: all attacks, twelve broken defences."""

import pytest
import torch

from lib.attacks.api import REGISTRY
from lib.attacks.common import margin
from lib.evaluation import robust_accuracy as module
from lib.evaluation.noise_control import leaves_more_than_noise, works
from lib.evaluation.robust_accuracy import robust_accuracy
from tests.controls import BROKEN, turned_gradient

EPS, N = 0.15, 12
EFFORT = {
    "autoattack": {"steps": 5, "queries": 20, "targets": 2},
    "autoattack-rand": {"steps": 5, "eot": 2},
    "eotpgd": {"steps": 5, "eot": 2},
    "apgd-t": {"steps": 5, "targets": 2},
    "fab-t": {"steps": 5, "targets": 2},
    "square": {"queries": 50},
    "cw": {"steps": 20, "searches": 1},
    "deepfool": {"steps": 5},
    "transfer": {"steps": 10},
}


@pytest.fixture
def images(digits, cnn):
    """The digits that are nearest to another class, so that noise breaks some."""
    x, y = (t[-300:] for t in digits)
    z = cnn(x).detach()
    near = margin(z, y).masked_fill(z.argmax(1) != y, torch.inf).argsort()[:N]
    return x[near], y[near]


def entry(name, cnn):
    return {"name": name} | EFFORT.get(name, {}) | ({"surrogate": cnn} if name == "transfer" else {})


@pytest.mark.parametrize("defence", BROKEN)
def test_no_attack_leaves_more_than_noise_without_a_mark(cnn, images, defence):
    """All in one list, and PGD alone, against noise in a list of its own; what is no classifier at all is refused."""
    model, options = BROKEN[defence](cnn), {"eps": EPS, "progress": False}
    try:
        noise = robust_accuracy(model, ["noise"], *images, **options)["robust"]["accuracy"]
    except ValueError:
        assert defence in ("softmax output", "in place")
        return
    names = [name for name in REGISTRY if name != "noise"]
    every = robust_accuracy(model, {name: entry(name, cnn) for name in names}, *images, **options)
    alone = robust_accuracy(model, ["pgd"], *images, **options)
    more = [(name, r) for r in (every, alone) for name, row in r["attacks"].items() if row["accuracy"] > noise]
    for name, record in more:
        assert any(f"{name} " in text for text in record["warnings"]), name
    assert more or defence in ("constant logits", "random output")


def test_an_attack_that_works_costs_no_control_and_is_not_marked(cnn, images, monkeypatch):
    monkeypatch.setattr(module, "noise_attack", lambda *rest: pytest.fail("noise was run"))
    for norm, eps in (("Linf", 0.02), ("Linf", 0.05), ("L2", 0.3)):
        record = robust_accuracy(cnn, ["pgd", "apgd-dlr"], *images, eps=eps, norm=norm, progress=False)
        assert not record["warnings"] and "control_noise" not in record["robust"]


def test_the_control_is_the_attack_of_that_name(cnn, images):
    """The same points as in a list with noise, which then needs no control."""
    model = turned_gradient(cnn)
    alone, both = (robust_accuracy(model, a, *images, eps=EPS, progress=False) for a in (["pgd"], ["pgd", "noise"]))
    noise = both["attacks"]["noise"]["accuracy"]
    assert alone["robust"]["control_noise"] == noise < alone["attacks"]["pgd"]["accuracy"]
    assert "control_noise" not in both["robust"]
    for record in (alone, both):
        assert sum("pgd leaves" in text for text in record["warnings"]) == 1
    assert set(alone["attacks"]) == set(alone["examples"]["broken_by"]) == {"pgd"}  # no worst case with it


def test_without_a_ball_there_is_no_noise_of_its_radius(cnn, images):
    for options in ({"eps": None}, {"eps": 0.0}, {"eps": 5.0, "norm": "L0"}):
        record = robust_accuracy(cnn, {"a": entry("cw", cnn)}, *images, **options, progress=False)
        assert "control_noise" not in record["robust"]


def test_gains_by_hand():
    clean, noisy = torch.tensor([3.0, 5.0]), torch.tensor([2.0, 6.0])  # noise moves margins by 1
    assert works(clean, clean - 4.0, noisy) and not works(clean, clean - 3.9, noisy)
    assert not works(clean, torch.tensor([float("nan"), 0.0]), noisy)
    assert not works(clean, clean, clean.clone() + 1)
    table = {"a": {"accuracy": 0.5}, "b": {"accuracy": 0.4}}
    assert leaves_more_than_noise(table, 0.4, "noise") == ["a leaves 50.00%, noise only 40.00%"]
