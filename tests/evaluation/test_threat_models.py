"""Threat models: what each attack goes through, what is counted, and residual perturbations whose size is known."""

import pytest
import torch
from torch import nn

from lib.data import load_dataset
from lib.evaluation import threat_models
from lib.evaluation.adversarial_images import CountingModel, EvaluationSettings
from lib.evaluation.outcomes import passes_per_batch
from lib.evaluation.robust_accuracy import evaluate_attacks
from lib.evaluation.threat_models import AttackBudget
from lib.purify import PurifiedClassifier
from lib.utils.intervals import wilson
from lib.utils.seeds import seeded_generator

FAST = AttackBudget(steps=10, eot=2, draws=4, queries=20)
EPS = 0.15


class Blur(nn.Module):
    """A purifier that keeps a share of every image, and some noise: its residual perturbation is known."""

    evaluations = 1

    def __init__(self, share=0.5, noise=0.0):
        super().__init__()
        self.share, self.noise = share, noise

    def forward(self, x, randn_like=None):
        more = torch.randn_like(x) if randn_like is None else randn_like(x)
        return self.share * x + (1 - self.share) / 2 + self.noise * more


class Stairs(Blur):
    """A purifier without a gradient."""

    def forward(self, x, randn_like=None):
        return (8 * x).round() / 8


@pytest.fixture
def points(cnn):
    data = load_dataset("digits").test
    right = cnn(data.x[:60]).argmax(1) == data.y[:60]
    return data.x[:60][right][:40], data.y[:60][right][:40]


def test_every_threat_model_is_weaker_or_stronger_as_it_should_be(cnn, points):
    defence = PurifiedClassifier(Blur(0.8, 0.05), cnn)
    results = {
        row: threat_models.evaluate_under_attack(row, defence, *points, eps=EPS, budget=FAST)
        for row in threat_models.THREAT_MODELS
    }
    none = results["none"]
    assert none["average"] == none["clean"] and none["worst"] == none["control"] <= none["average"] == none["clean"]
    for row in ("grey", "bpda", "exact", "apgd", "square"):
        assert results[row]["worst"] <= results[row]["average"] <= results[row]["clean"] and results[row]["n"] == 40, (
            row
        )
        assert results[row]["worst"] <= results[row]["control"], row
    assert results["exact"]["average"] < 0.6 * none["average"]
    assert results["exact"]["average"] <= results["square"]["average"] + 0.05
    assert results["fixed"]["average"] == results["fixed"]["worst"]
    exact = results["exact"]
    assert exact["intervals"]["worst"] == pytest.approx(wilson(round(40 * exact["worst"]), 40))
    assert all(low <= exact[name] <= high for name, (low, high) in exact["intervals"].items())
    assert threat_models.evaluate_under_attack("exact", defence, *points, eps=EPS, budget=FAST) == results["exact"]
    assert (
        threat_models.evaluate_under_attack("exact", defence, *points, eps=0.0, budget=FAST)["average"]
        >= none["average"] - 0.05
    )


def test_bpda_finds_what_a_purifier_without_gradient_hides(cnn, points):
    defence = PurifiedClassifier(Stairs(), cnn)
    exact, blind, grey = (
        threat_models.evaluate_under_attack(row, defence, *points, eps=EPS, budget=FAST)["average"]
        for row in ("exact", "bpda", "grey")
    )
    assert blind < 0.6 < exact and grey < 0.6  # rounding moves little, so the classifier's own attack carries over


def test_images_are_made_once_and_scored_on_other_defences(cnn, points):
    seen = []

    class Spy(nn.Module):
        def forward(self, x):
            seen.append(len(x))
            return cnn(x)

    defence, spy = PurifiedClassifier(Blur(1.0), cnn), Spy()
    alone = threat_models.evaluate_under_attack("exact", defence, *points, eps=EPS, budget=FAST)
    results = threat_models.evaluate_under_attack(
        "exact", defence, *points, eps=EPS, budget=FAST, others={"spy": spy, "itself": defence}
    )
    assert {k: v for k, v in results.items() if k != "others"} == {k: v for k, v in alone.items() if k != "others"}
    assert (
        results["others"]["itself"]["average"] == results["average"] < 0.6
    )  # without noise the same images do the same
    assert sum(seen) == 40 * FAST.draws  # final images only: no step of the attack
    with pytest.raises(ValueError, match="choose one of none, grey"):
        threat_models.evaluate_under_attack("white", defence, *points, eps=EPS, budget=FAST)


def test_draws_share_a_batch_only_where_the_noise_is_each_images_own(cnn, points):
    x, purifier = points[0], Blur(0.8, 0.05)
    for graph in (True, False):
        assert passes_per_batch(PurifiedClassifier(purifier, cnn), x, 16, graph=graph) == 16
        assert passes_per_batch(PurifiedClassifier(purifier, cnn, fixed=0), x, 16, graph=graph) == 1  # else one draw
        assert passes_per_batch(cnn, x, 16, graph=graph) == 1
    purifier.evaluations = 100  # the memory of such a graph
    assert passes_per_batch(PurifiedClassifier(purifier, cnn), x, 16, graph=True) == 10**6 // (40 * 64 * 100) == 3
    assert passes_per_batch(PurifiedClassifier(purifier, cnn, votes=4), x, 16, graph=True) == 1


def test_a_foreign_model_gets_batched_draws_by_saying_that_its_noise_is_independent(cnn, points):
    class Foreign(nn.Module):
        sizes = ()

        def forward(self, x):
            self.sizes += (len(x),)
            return cnn(x + 0.01 * torch.randn_like(x))

    x, y = points
    for independent, evaluations, size in ((False, 1, 40), (True, 1, 4 * 40), (True, 200, 40)):
        model = Foreign()
        model.independent_noise, model.evaluations = independent, evaluations
        assert passes_per_batch(CountingModel(model), x, 4, graph=True) == (1 if size == 40 else 4)
        threat_models.score_images(model, [x], y, draws=4, seed=0)
        assert sum(model.sizes) == 160 and max(model.sizes) == (160 if independent else 40)


def test_the_passes_of_every_threat_model_are_counted_where_they_are_made(cnn, points):
    """Each gradient of PGD-EOT is `eot` passes there and back; the last point's loss takes as many more forward."""
    x, y = points
    defence, settings = PurifiedClassifier(Blur(0.8, 0.05), cnn), EvaluationSettings(eps=EPS, draws=FAST.draws)
    for threat, eot in (("grey", 1), ("bpda", FAST.eot), ("exact", FAST.eot)):
        attacks = threat_models.threat_attacks(threat, defence, FAST)
        row = evaluate_attacks(defence, attacks, x, y, settings, progress=False)[0]["attacks"][threat]
        assert row["backward"] == FAST.steps * eot * row["attacked"] > 0, threat
        assert row["forward"] == (FAST.steps + 1) * eot * row["attacked"], threat
    attacks = threat_models.threat_attacks("square", defence, FAST)
    row = evaluate_attacks(defence, attacks, x, y, settings, progress=False)[0]["attacks"]["square"]
    assert row["forward"] > 0 == row["backward"]


def test_the_residual_perturbation_is_the_share_that_is_left(cnn, points):
    x, y = points
    x_adv = (x + EPS * torch.randn(x.shape, generator=seeded_generator(0, "d")).sign()).clamp(0, 1)
    for share in (0.3, 1.0):
        results = threat_models.residual_perturbation(Blur(share, 0.2), cnn, x, x_adv, y)
        assert results["projection"] == pytest.approx(share, abs=1e-5)
        assert results["ratio"] == pytest.approx(share, abs=1e-5)
    results = threat_models.residual_perturbation(Blur(1.0), cnn, x, x_adv, y)
    assert results["damage"] == pytest.approx(results["damage_before"], rel=1e-4)

    class Turned(Blur):
        def forward(self, x, randn_like=None):
            return 1 - x

    turned = threat_models.residual_perturbation(Turned(), cnn, x, x_adv, y)
    assert turned["projection"] == pytest.approx(-1, abs=1e-5) and turned["ratio"] == pytest.approx(1, abs=1e-5)
