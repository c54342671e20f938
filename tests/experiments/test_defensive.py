"""Experiment 2's measurements against cases worked by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from lib.data import Split, load_dataset
from lib.evaluation.robust_accuracy import robust_accuracy
from lib.experiments import defensive, defensive_strong
from lib.models import build_classifier
from lib.report.figures import defensive as figures
from lib.utils.draws import unpack_draws
from lib.utils.record_keys import run_key, run_parts, temperature_key, temperature_of

SMALL = defensive.NetworkRecipe("cnn", width=4, epochs=1, lr=1e-3, batch_size=256)


class Linear(nn.Module):
    """Two classes with logits ±scale · (2x − 1) of the one pixel."""

    def __init__(self, scale: float):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, x):
        z = self.scale * (2 * x.flatten(1)[:, :1] - 1)
        return torch.cat([z, -z], 1)


@pytest.fixture
def one():
    return Split(torch.ones(3, 1, 1, 1), torch.zeros(3, dtype=torch.int64))


def test_gradients_at_one_pixel_are_those_worked_by_hand(one):
    for scale in (1.0, 10.0):  # d CE / d x = -4 scale / (1 + exp(2 scale)), the margin is 2 scale
        norms = defensive.gradient_norms(Linear(scale), *one, torch.float64)
        expected = torch.full((3,), 4 * scale / (1 + torch.tensor(2 * scale, dtype=torch.float64).exp()).item())
        torch.testing.assert_close(norms, expected.double(), rtol=1e-6, atol=0)
    scaled = defensive.gradient_norms(Linear(10.0), *one, torch.float64, tau=10.0)
    torch.testing.assert_close(
        scaled, defensive.gradient_norms(Linear(1.0), *one, torch.float64) * 1.0, rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("scale, zeros", [(10.0, (0.0, 0.0)), (100.0, (1.0, 0.0)), (400.0, (1.0, 1.0))])
def test_zero_gradients_come_with_the_margin_and_the_precision(one, scale, zeros):
    why = defensive.gradient_statistics(Linear(scale), *one)
    assert (why["zero_float32"], why["zero_float64"]) == zeros
    assert why["logit_mean"] == pytest.approx(scale) and why["margin_median"] == pytest.approx(2 * scale)


def test_networks_of_all_temperatures_start_alike_and_are_repeatable():
    data = load_dataset("digits", n_labels=50)
    still = replace(SMALL, lr=1e-12)
    models = defensive.train_distilled(data, 3, [1.0, 20.0], still)
    assert list(models) == ["T1", "T20"] and not any(m.training for m in models.values())
    start = build_classifier("cnn", **data.spec(), width=4, seed=3).state_dict()
    for model in models.values():
        torch.testing.assert_close(model.state_dict(), start, atol=1e-6, rtol=0)
    first, second = (defensive.train_distilled(data, 3, [20.0], SMALL)["T20"].state_dict() for _ in range(2))
    assert all(torch.equal(first[k], second[k]) for k in first)
    other = defensive.train_natural(data, 3, SMALL).state_dict()
    assert any(not torch.equal(other[k], start[k]) for k in start)


def test_the_proxy_learns_the_victims_predictions_and_not_the_labels():
    data = load_dataset("digits", n_labels=100)

    class Stubborn(nn.Module):
        def forward(self, x):
            return torch.nn.functional.one_hot(torch.full((len(x),), 7), 10).float() * 9

    proxy = defensive.train_proxy(data, 0, Stubborn(), replace(SMALL, epochs=20, lr=1e-2))
    assert (proxy(data.test.x).argmax(1) == 7).all()


def test_evaluation_summary_and_figures_of_a_tiny_run():
    data = load_dataset("digits", n_labels=200)
    test = Split(data.test.x[:12], data.test.y[:12])
    recipe = replace(SMALL, width=8, epochs=25, lr=1e-2, batch_size=32)
    models = defensive.train_distilled(data, 0, [1.0, 100.0], recipe)
    models |= {"kd-soft": models["T1"], "kd-hard": models["T1"]}
    surrogate = defensive.train_natural(data, 0, recipe)
    budget = defensive.EvaluationBudget(
        {"large": 0.2, "small": 0.1}, steps=5, queries=10, cw={"steps": 60, "searches": 4}, jsma_targets=1
    )
    attacks = defensive.linf_attacks(100.0, surrogate, surrogate, budget)
    min_distance = defensive.min_distance_attacks(budget)
    results, everything = {}, {}
    for name, model in models.items():
        scalars, records = defensive.evaluate_network(model, test, 0, attacks, min_distance, budget.eps)
        results[name] = scalars | {"why": defensive.gradient_statistics(model, *test)}
        for ball in ("large", "small"):
            left = [v for k, v in scalars[ball].items() if k not in ("worst", "eps")]
            assert scalars[ball]["worst"] <= min(left) <= max(left) <= scalars["clean"]
        assert set(records) == {"large", "small", "free"} and scalars["success"]["cw"] > 0.9
        everything[name] = records
    ends = {name: (tau, models[name]) for name, tau in (("T1", 1.0), ("T100", 100.0))}
    effort = defensive_strong.StrongBudget(steps=5, restarts=1)
    strong = defensive_strong.attack_ends(ends, data, test, 0, recipe, budget.eps, everything, effort)
    correct = defensive_strong.defensive_outcomes(everything, strong, budget.eps)
    share = {key: unpack_draws(bits).mean() for key, bits in correct["T100"].items()}
    scalars = results["T100"]
    assert share["clean"] == scalars["clean"] and share["worst@0.1"] == scalars["small"]["worst"]
    assert share["fgsm@0.2"] == scalars["large"]["fgsm"] and share["strong@0.1"] <= share["worst@0.1"]
    assert share["cw"] == pytest.approx(scalars["clean"] * (1 - scalars["success"]["cw"])) and "worst" not in share
    assert "strong@0.1" not in correct["kd-soft"] and set(strong["T1"]["small"]) == {"accuracy", "broke"}
    numbers = defensive.defensive_summary(results, strong)
    assert numbers["strong_small"] == strong["T100"]["small"]["accuracy"] - strong["T1"]["small"]["accuracy"]
    assert numbers["apparent_fgsm"] == results["T100"]["large"]["fgsm"] - results["T1"]["large"]["fgsm"]
    assert numbers["kd_worst_small"] == 0
    arrays = {"temperatures": [1.0, 100.0]}
    record = {"seed": 0, "metrics": {"models": results, "strong": strong}, "arrays": arrays}
    for draw in (figures.dd_original_attacks, figures.dd_unmasked, figures.dd_worst, figures.dd_why, figures.dd_puzzle):
        assert draw([record, record]).axes
    assert figures.defensive_table(results, "large").shape == (12, 4)


def test_the_stronger_attack_breaks_what_hides_its_gradients_and_no_robust_network(one):
    """On the pixel 1 the class changes at 0.5, so that a ball of 0.6 holds other classes and one of 0.4 none."""
    hidden = Linear(1e4)
    plain = {"pgd": {"name": "pgd", "loss": "ce", "steps": 20}}
    weak = robust_accuracy(hidden, plain, *one, eps=0.6, progress=False)
    assert weak["robust"]["accuracy"] == 1 and weak["attacks"]["pgd"]["no_gradient"] == 3
    attacks = defensive_strong.strong_attacks(hidden, 1e4, {"t": Linear(1.0)}, defensive_strong.StrongBudget(20, 1))
    two_classes = {k: v for k, v in attacks.items() if "apgd-dlr" not in k}
    scaled = [attacks[name]["model"] for name in ("pgd-margin", "apgd-ce/T", "apgd-dlr", "apgd-t")]
    assert all((defensive.gradient_norms(m, *one, torch.float32) > 0.1).all() for m in scaled)
    assert (defensive.gradient_norms(hidden, *one, torch.float32) == 0).all()
    for eps, left in ((0.6, 0), (0.4, 2)):
        right = np.array([True, False, True])
        bits, broke = defensive_strong.attack_survivors(hidden, one, 0, eps, two_classes, right)
        assert bits.sum() == left and sum(broke.values()) == 2 - left and not bits[1]


def test_the_soft_proxy_learns_the_victims_probabilities():
    data = load_dataset("digits", n_labels=100)

    class Even(nn.Module):
        """Ranks class 7 above class 3; both have nearly half of the probability at T = 100."""

        def forward(self, x):
            return torch.tensor([0.0, 0, 0, 700, 0, 0, 0, 710, 0, 0]).repeat(len(x), 1)

    proxy = defensive_strong.train_soft_proxy(data, 0, Even(), 100.0, replace(SMALL, epochs=30, lr=1e-2))
    p = proxy(data.test.x).softmax(1).mean(0).tolist()
    assert p[3] == pytest.approx(0.475, abs=0.06) and p[7] == pytest.approx(0.525, abs=0.06)


def test_without_experiment_1_a_student_is_trained_here():
    data = load_dataset("digits", n_labels=50)
    fit = defensive.fit_student(data, 0, width=4, steps=2, batch_size=50, lr=1e-3)
    teacher = build_classifier("cnn", **data.spec(), width=4, seed=1)
    students, source = defensive.classic_students(data, 0, "no-such-profile", teacher, fit, 4, T=4.0, alpha=0.9)
    assert source == "trained here" and set(students) == {"kd-soft", "kd-hard"}
    assert not any(m.training for m in students.values())


def test_keys_of_networks_are_read_as_they_are_written():
    assert [temperature_of(temperature_key(t)) for t in (1.0, 0.5, 100.0)] == [1.0, 0.5, 100.0]
    assert temperature_of("kd-soft") is None
    assert run_key("tau", 30.0) == "tau/30" and run_parts(run_key("teacher", "rslad", "weak")) == (
        "teacher",
        "rslad",
        "weak",
    )
