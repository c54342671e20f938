"""Threat models: what each attack goes through, what is counted, and residues whose size is known."""

import pytest
import torch
from torch import nn

from lib.data import load_dataset
from lib.evaluation import threat_models
from lib.evaluation.threat_models import AttackBudget
from lib.purify import PurifiedClassifier
from lib.utils.intervals import wilson
from lib.utils.seeds import seeded_generator

FAST = AttackBudget(steps=10, eot=2, draws=4, queries=20)
EPS = 0.15


class Blur(nn.Module):
    """A purifier that keeps a share of every image, and some noise: its residue is known."""

    evaluations = 1

    def __init__(self, share=0.5, noise=0.0):
        super().__init__()
        self.share, self.noise = share, noise

    def forward(self, x, generator=None):
        more = torch.randn(x.shape, generator=generator)
        return self.share * x + (1 - self.share) / 2 + self.noise * more


class Stairs(Blur):
    """A purifier without a gradient."""

    def forward(self, x, generator=None):
        return ((8 * x).round() / 8) + 0 * torch.randn(x.shape, generator=generator)


@pytest.fixture
def points(cnn):
    data = load_dataset("digits").test
    right = cnn(data.x[:60]).argmax(1) == data.y[:60]
    return data.x[:60][right][:40], data.y[:60][right][:40]


def test_every_row_is_weaker_or_stronger_as_it_should_be(cnn, points):
    defence = PurifiedClassifier(Blur(0.8, 0.05), cnn)
    found = {
        row: threat_models.evaluate_under_attack(row, defence, *points, eps=EPS, budget=FAST)
        for row in threat_models.THREAT_MODELS
    }
    none = found["none"]
    assert none["average"] == none["clean"] and none["worst"] == none["control"] <= none["average"] == none["clean"]
    for row in ("grey", "bpda", "exact", "apgd", "square"):
        assert found[row]["worst"] <= found[row]["average"] <= found[row]["clean"] and found[row]["n"] == 40, row
        assert found[row]["worst"] <= found[row]["control"], row
    assert found["exact"]["average"] < 0.6 * none["average"]
    assert found["exact"]["average"] <= found["square"]["average"] + 0.05
    assert found["fixed"]["average"] == found["fixed"]["worst"]
    exact = found["exact"]
    assert exact["intervals"]["worst"] == pytest.approx(wilson(round(40 * exact["worst"]), 40))
    assert all(low <= exact[name] <= high for name, (low, high) in exact["intervals"].items())
    assert threat_models.evaluate_under_attack("exact", defence, *points, eps=EPS, budget=FAST) == found["exact"]
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


def test_images_made_for_one_defence_are_put_to_others_and_made_once(cnn, points):
    seen = []

    class Spy(nn.Module):
        def forward(self, x):
            seen.append(len(x))
            return cnn(x)

    defence, spy = PurifiedClassifier(Blur(1.0), cnn), Spy()
    alone = threat_models.evaluate_under_attack("exact", defence, *points, eps=EPS, budget=FAST)
    found = threat_models.evaluate_under_attack(
        "exact", defence, *points, eps=EPS, budget=FAST, others={"spy": spy, "itself": defence}
    )
    assert {k: v for k, v in found.items() if k != "others"} == {k: v for k, v in alone.items() if k != "others"}
    assert found["others"]["itself"]["average"] == found["average"] < 0.6  # without noise the same images do the same
    assert sum(seen) == 40 * FAST.draws  # final images only: no step of the attack
    with pytest.raises(ValueError, match="choose one of none, grey"):
        threat_models.evaluate_under_attack("white", defence, *points, eps=EPS, budget=FAST)


def test_passes_go_together_only_where_the_noise_is_each_images_own(cnn, points):
    x, purifier = points[0], Blur(0.8, 0.05)
    for graph in (True, False):
        assert threat_models.passes_per_batch(PurifiedClassifier(purifier, cnn), x, 16, graph) == 16
        assert (
            threat_models.passes_per_batch(PurifiedClassifier(purifier, cnn, fixed=0), x, 16, graph) == 1
        )  # else all draws are one
        assert threat_models.passes_per_batch(cnn, x, 16, graph) == 1
    purifier.evaluations = 100  # the memory of such a graph
    assert (
        threat_models.passes_per_batch(PurifiedClassifier(purifier, cnn), x, 16, True) == 10**6 // (40 * 64 * 100) == 3
    )
    assert threat_models.passes_per_batch(PurifiedClassifier(purifier, cnn, votes=4), x, 16, True) == 1


def test_inheritance_measures_the_share_that_is_kept(cnn, points):
    x, y = points
    x_adv = (x + EPS * torch.randn(x.shape, generator=seeded_generator(0, "d")).sign()).clamp(0, 1)
    for share in (0.3, 1.0):
        found = threat_models.residual_perturbation(Blur(share, 0.2), cnn, x, x_adv, y)
        assert found["projection"] == pytest.approx(share, abs=1e-5)
        assert found["ratio"] == pytest.approx(share, abs=1e-5)
    found = threat_models.residual_perturbation(Blur(1.0), cnn, x, x_adv, y)
    assert found["damage"] == pytest.approx(found["damage_before"], rel=1e-4)

    class Turned(Blur):
        def forward(self, x, generator=None):
            return 1 - x

    turned = threat_models.residual_perturbation(Turned(), cnn, x, x_adv, y)
    assert turned["projection"] == pytest.approx(-1, abs=1e-5) and turned["ratio"] == pytest.approx(1, abs=1e-5)
