"""The attacks: hand-computed steps, measured facts on digits, strength, input checks, wrappers."""

import copy
import math
import subprocess
import sys
import traceback
from functools import partial
from itertools import combinations
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lib import attacks
from lib.attacks import api, autoattack
from lib.attacks.apgd import step_checkpoints
from lib.attacks.api import REGISTRY, attack, attack_options
from lib.attacks.bpda import bpda
from lib.attacks.checks import perturbation_norm
from lib.attacks.common import (
    cross_entropy,
    dlr,
    dlr_targeted,
    get_loss,
    goal_met,
    loss_and_grad,
    margin,
    project,
    random_start,
    step_size,
)
from lib.attacks.eot_pgd import eot_pgd
from lib.attacks.gate import AttackWarning, NoGradientWarning
from lib.attacks.jsma import best_pairs
from lib.attacks.pgd import pgd
from lib.attacks.square import l2_pattern, window_corners
from lib.attacks.transfer import train_surrogate
from lib.models import Ensemble, build_classifier, most_likely
from lib.utils import per_image_rng


class Scores(nn.Module):
    """Logits that are linear in the pixels: z = W x + b, so that every attack can be checked by hand."""

    def __init__(self, weight, bias=None):
        super().__init__()
        self.weight = nn.Parameter(torch.as_tensor(weight, dtype=torch.float32))
        self.bias = nn.Parameter(torch.zeros(len(self.weight)) if bias is None else torch.as_tensor(bias))

    def forward(self, x):
        return F.linear(x.flatten(1), self.weight.to(x.dtype), self.bias.to(x.dtype))


class Scaled(nn.Module):
    """A model whose logits are multiplied by `k`: the scale-only defence."""

    def __init__(self, model, k):
        super().__init__()
        self.model, self.k = model, k

    def forward(self, x):
        return self.k * self.model(x)


def images(*rows):
    return torch.tensor(rows, dtype=torch.float32)[:, None, None, :]


def left(model, x, y):
    """Accuracy in percent."""
    with torch.no_grad():
        return 100 * (model(x).argmax(1) == y).double().mean().item()


def run(name, model, x, y, eps=None, norm=None, **options):
    return attack(name, model, x, y, eps, norm, progress=False, **options)


@pytest.fixture(scope="module")
def points(digits):
    x, y = digits
    return x[-200:], y[-200:]


def test_margin_and_success_are_right_when_all_logits_are_negative():
    z, y = torch.tensor([[-5.0, -3.0, -9.0], [-1.0, -3.0, -2.0]]), torch.tensor([1, 1])
    assert margin(z, y).tolist() == [2.0, -2.0]
    assert margin(z, y, torch.tensor([0, 0])).tolist() == [2.0, -1.0]
    assert goal_met(z, y).tolist() == [False, True]
    assert goal_met(z, y, kappa=2.5).tolist() == [False, False]
    assert goal_met(z, y, torch.tensor([0, 2])).tolist() == [False, False]


def test_dlr_losses_by_hand_and_their_invariance():
    z, y = torch.tensor([[4.0, 1.0, 0.0, -2.0]]), torch.tensor([0])
    assert dlr(z, y).item() == pytest.approx(-3 / 4)
    assert dlr_targeted(z, y, torch.tensor([2])).item() == pytest.approx(-4 / (4 - (0 - 2) / 2))
    assert dlr(1000 * z + 7, y).item() == pytest.approx(-3 / 4, rel=1e-5)
    assert dlr_targeted(z[:, :3], y, torch.tensor([2])).item() == -4
    with pytest.raises(ValueError, match="at least 3 classes"):
        dlr(z[:, :2], y)
    assert get_loss("ce/tau", 10.0)(z, y).item() == pytest.approx(F.cross_entropy(z / 10, y).item())
    with pytest.raises(ValueError, match="unknown loss 'hinge'"):
        get_loss("hinge")


def test_one_step_of_fgsm_and_pgd_by_hand():
    model = Scores([[1.0, -2.0, 0.0], [0.0, 0.0, 0.0]])
    x, y = images([0.9, 0.05, 0.5]), torch.tensor([0])  # z_0 - z_1 = 0.8; the loss grows along (-1, +2, 0)
    assert run("fgsm", model, x, y, 0.2).flatten().tolist() == pytest.approx([0.7, 0.25, 0.5])
    stepped = pgd(model, x, y, 0.2, "L2", steps=1, alpha=0.1, start=False)
    step = torch.tensor([-1.0, 2.0, 0.0]) / math.sqrt(5) * 0.1
    torch.testing.assert_close(stepped, x + step)
    far = pgd(model, x, y, 0.2, "L2", steps=1, alpha=0.5, start=False)  # projected back onto the sphere
    torch.testing.assert_close(far, x + 2 * step)
    assert run("fgsm", model, images([0.05, 0.9, 0.5]), torch.tensor([0]), 0.2).flatten().tolist() == pytest.approx(
        [0.05, 0.9, 0.5]
    )  # misclassified already: left alone


def test_momentum_sums_l1_normalised_gradients():
    model = Scores([[3.0, 1.0], [0.0, 0.0]])
    x, y = images([0.9, 0.9]), torch.tensor([0])
    moved = pgd(model, x, y, 0.5, "L2", steps=2, alpha=0.1, start=False, momentum=1.0)
    torch.testing.assert_close(moved, x - 0.2 * torch.tensor([3.0, 1.0]) / math.sqrt(10))


def test_gradients_are_averaged_over_eot_samples():
    calls = iter([1.0, 3.0])
    _, value, grad = loss_and_grad(
        lambda x: torch.cat([next(calls) * x, 0 * x], 1).flatten(1),
        images([0.5]),
        torch.tensor([1]),
        lambda z, y: z[:, 0],
        2,
    )
    assert value.item() == 1.0 and grad.item() == 2.0


def test_a_model_cut_off_from_autograd_has_the_gradient_zero():
    model = Scores([[2.0, 0.0], [0.0, 2.0]])
    x, y = images([0.7, 0.3]), torch.tensor([0])
    assert loss_and_grad(lambda x: model(x).detach(), x, y, cross_entropy)[2].abs().sum() == 0
    for name in ("fgsm", "pgd", "apgd-ce", "cw", "deepfool", "jsma-f"):
        eps, some = (0.01 if REGISTRY[name].needs_eps else None), {"gamma": 1.0} if name == "jsma-f" else {}
        with pytest.warns(NoGradientWarning, match=f"{name} got no gradient"):
            assert run(name, lambda x: model(x.detach()), x, y, eps, **some).isfinite().all()


def test_projection_onto_ball_and_box():
    x = images([0.0, 0.5, 1.0])
    assert project(x + images([-0.3, 0.3, 0.3]), x, 0.2, "Linf").flatten().tolist() == pytest.approx([0.0, 0.7, 1.0])
    assert project(x + images([0.0, 0.6, 0.0]), x, 0.2, "L2").flatten().tolist() == pytest.approx([0.0, 0.7, 1.0])
    assert torch.equal(project(x, x, 0.0, "L2"), x)


def test_projecting_at_each_step_beats_a_clamp_inside_the_forward_pass(digits, cnn):
    """The clamp's gradient is 0 for pixels outside [0, 1], so that half of the black pixels never come back."""
    x, y = (t[-500:] for t in digits)
    for eps, points in ((0.1, 5), (0.15, 15)):
        delta = eps * (2 * torch.rand(x.shape, generator=torch.Generator().manual_seed(0)) - 1)
        for _ in range(20):
            grad = loss_and_grad(lambda d: cnn((x + d).clamp(0, 1)), delta, y, cross_entropy)[2]
            delta = (delta + eps / 8 * grad.sign()).clamp(-eps, eps)
        inside = left(cnn, (x + delta).clamp(0, 1), y)
        assert left(cnn, run("pgd", cnn, x, y, eps, steps=20), y) <= inside - points


def test_stronger_attacks_are_not_weaker(cnn, points):
    x, y = (t[:100] for t in points)
    for norm, eps in (("Linf", 0.1), ("L2", 0.5)):
        some = {"steps": 20}
        accuracy = {n: left(cnn, run(n, cnn, x, y, eps, norm, **some), y) for n in ("apgd-ce", "apgd-dlr", "apgd-t")}
        accuracy |= {n: left(cnn, run(n, cnn, x, y, eps, norm), y) for n in ("noise", "pgd")}
        accuracy["square"] = left(cnn, run("square", cnn, x, y, eps, norm, queries=200), y)
        accuracy["aa"] = left(cnn, run("autoattack", cnn, x, y, eps, norm, steps=20, queries=20), y)
        assert accuracy["pgd"] < accuracy["noise"] and accuracy["square"] < accuracy["noise"]
        assert accuracy["apgd-t"] <= accuracy["pgd"] + 1 and accuracy["apgd-ce"] <= accuracy["pgd"] + 1
        assert accuracy["aa"] <= min(accuracy.values()) + 1
    assert left(cnn, run("pgd", cnn, x, y, 0.1), y) <= left(cnn, run("fgsm", cnn, x, y, 0.1), y)


def test_more_restarts_and_more_steps_keep_what_was_broken(cnn, points):
    x, y = points
    broken = [cnn(run("pgd", cnn, x, y, 0.08, restarts=r, steps=5)).argmax(1) != y for r in (1, 3)]
    assert (broken[1] | ~broken[0]).all()


def test_restarts_go_on_where_another_run_ended(cnn, points):
    """All restarts in one run break what its parts break, at the points of the first part that breaks an image."""
    x, y = points
    whole = run("pgd", cnn, x, y, 0.06, restarts=12, steps=1)
    parts = [run("pgd", cnn, x, y, 0.06, restarts=r, first=first, steps=1) for r, first in ((2, 0), (10, 2))]
    broken = [cnn(x_adv).argmax(1) != y for x_adv in (whole, *parts)]
    assert torch.equal(broken[0], broken[1] | broken[2])
    later = broken[2] & ~broken[1]
    assert later.any() and torch.equal(whole[later], parts[1][later])


def test_what_resists_is_returned_at_its_highest_loss():
    peak = Scores([[1.0], [1.0]])  # its margin 0.1 + |x - 0.5| is least at 0.5, which steps of 0.19 pass by
    model = lambda x: peak(x) + torch.stack([0.1 + (x.flatten() - 0.5).abs(), 0 * x.flatten()], 1)  # noqa: E731
    x_adv = run("pgd", model, images([0.7]), torch.tensor([0]), 0.4, steps=2, alpha=0.19, start=False)
    assert x_adv.item() == pytest.approx(0.51)  # 0.7, 0.51, 0.32


def test_scaled_logits_kill_cross_entropy_and_nothing_else(cnn, points):
    x, y = points
    masked = Scaled(cnn, 1e4)
    honest = left(cnn, run("pgd", cnn, x, y, 0.15), y)
    with pytest.warns(NoGradientWarning):
        assert left(masked, run("pgd", masked, x, y, 0.15, start=False), y) > honest + 30
    options = {"pgd": {"loss": "margin"}, "apgd-dlr": {"steps": 30}, "square": {"queries": 100}}
    for name, some in options.items():
        both = [left(model, run(name, model, x, y, 0.15, **some), y) for model in (cnn, masked)]
        assert both[0] == pytest.approx(both[1], abs=1.0)
    for loss, divided in (("ce", "ce/tau"), ("dlr", "dlr")):
        both = [run("pgd", m, x, y, 0.15, loss=name, tau=1e4) for m, name in ((cnn, loss), (masked, divided))]
        assert left(cnn, both[0], y) == pytest.approx(left(cnn, both[1], y), abs=1.0)
    distances = [
        perturbation_norm(run("cw", m, x[:30], y[:30], steps=60), x[:30], "L2").mean().item() for m in (cnn, masked)
    ]
    assert distances[0] == pytest.approx(distances[1], rel=0.03)


def test_apgd_reconsiders_its_step_where_the_paper_does_and_closes_in_on_a_peak():
    assert step_checkpoints(100) == {22, 41, 57, 70, 80, 87, 93, 99}  # 0.22, 0.41, 0.57, 0.7, 0.8, 0.87, 0.93, 0.99
    peak = lambda x: torch.cat([0.1 + (x - 0.437).square(), 0 * x], 1).flatten(1)  # noqa: E731
    for norm in ("Linf", "L2"):
        x_adv = run("apgd-ce", peak, images([0.6], [0.3]), torch.tensor([0, 0]), 0.5, norm)
        assert (x_adv - 0.437).abs().max() < 0.005


def test_autoattack_runs_the_official_parts_and_budgets(monkeypatch):
    seen = {}
    monkeypatch.setattr(
        autoattack,
        "run_in_turn",
        lambda *args, parts: seen.update({k: p.keywords for k, p in parts.items()}) or args[1],
    )
    model, x, y = Scores([[2.0, 0.0], [0.0, 2.0], [0.0, 0.0]]), images([0.9, 0.1]), torch.tensor([0])
    run("autoattack", model, x, y, 0.1)
    assert list(seen) == ["apgd-ce", "apgd-t", "fab-t", "square"] and seen["square"] == {"queries": 5000}
    assert seen["apgd-ce"]["steps"] == seen["apgd-t"]["steps"] == seen["fab-t"]["steps"] == 100
    assert seen["apgd-t"]["targets"] == seen["fab-t"]["targets"] == 9
    seen.clear()
    run("autoattack-rand", model, x, y, 0.1)
    assert seen == {f"apgd-{loss}": {"loss": loss, "steps": 100, "eot": 20} for loss in ("ce", "dlr")}
    assert attack_options("apgd-ce")["restarts"] == 1


def test_carlini_wagner_finds_the_distance_to_a_plane_and_keeps_kappa_and_target():
    model = Scores([[3.0, 0.0], [0.0, 4.0], [-9.0, -9.0]], [0.5, 0.0, 0.0])
    x, y = images([0.6, 0.3]), torch.tensor([0])  # z = 2.3, 1.2, -8.1; the plane 3 p + .5 = 4 q is 1.1 / 5 away
    assert perturbation_norm(run("cw", model, x, y, steps=100), x, "L2").item() == pytest.approx(1.1 / 5, rel=0.01)
    confident = run("cw", model, x, y, kappa=1.0, steps=100)
    assert perturbation_norm(confident, x, "L2").item() == pytest.approx(2.1 / 5, rel=0.01)
    assert margin(model(confident), y).item() <= -1.0
    assert torch.equal(run("cw", model, x, y, target=torch.tensor([2]), steps=30), x)  # out of reach: no change
    assert torch.equal(run("cw", model, x, y, target=torch.tensor([0])), x)  # there already


def test_carlini_wagner_searches_c_per_image(cnn, points):
    x, y = (t[:50] for t in points)
    with_search = run("cw", cnn, x, y, steps=80)
    assert left(cnn, with_search, y) == 0
    for c in (1.0, 10.0, 100.0):
        fixed = run("cw", cnn, x, y, steps=80, searches=1, c=c)
        both = (cnn(fixed).argmax(1) != y) & (cnn(x).argmax(1) == y)
        pair = [perturbation_norm(a, x, "L2")[both] for a in (with_search, fixed)]
        assert pair[0].mean() < pair[1].mean() and (pair[0] <= pair[1] * 1.05).double().mean() > 0.95


def test_jsma_by_hand_and_with_five_classes():
    weight = torch.zeros(5, 6)
    weight[3, 1], weight[3, 4], weight[3, 5] = 3.0, 2.0, 1.0  # raise the target
    weight[0, 1], weight[0, 4], weight[0, 5], weight[0, 0] = -1.0, -1.0, -1.0, 1.0  # and lower another class
    model = Scores(weight, [0.4, 0.0, 0.0, 0.0, 0.0])
    x, y = torch.zeros(2, 1, 2, 3), torch.tensor([0, 0])
    for name in ("jsma-z", "jsma-f"):
        x_adv = run(name, model, x, y, target=torch.tensor([3, 3]), gamma=0.5)
        assert x_adv[0].flatten().tolist() == [0, 1, 0, 0, 1, 0]
    assert torch.equal(run("jsma-z", model, x, y, target=torch.tensor([2, 2]), gamma=0.5), x)  # no pair raises class 2
    shrunk = run("jsma-z", Scores(-weight, [-0.5, 0, 0, 0, 0]), torch.ones(1, 1, 2, 3), y[:1], theta=-1.0, eps=2)
    assert shrunk.flatten().tolist() == [1, 0, 1, 1, 0, 1]


def test_saliency_pairs_are_those_of_all_pairs():
    own, others = torch.randn(2, 20, 9, generator=torch.Generator().manual_seed(0))
    free = torch.rand(20, 9, generator=torch.Generator().manual_seed(1)) < 0.5
    pairs, usable = best_pairs(own, others, free)
    for a, b, ok, pair, exists in zip(own, others, free, pairs.tolist(), usable.tolist()):
        candidates = [(p, q) for p, q in combinations(range(9), 2) if ok[p] and ok[q] and a[p] + a[q] > 0 > b[p] + b[q]]
        assert exists == bool(candidates)
        if exists:
            assert tuple(sorted(pair)) == max(
                candidates, key=lambda pq: -(a[list(pq)].sum() * b[list(pq)].sum()).item()
            )


def test_jsma_f_stops_where_softmax_is_flat_and_uses_few_values(cnn, points):
    x, y = points
    fresh = run("jsma-f", cnn, x, y)
    assert left(cnn, fresh, y) < 20 and perturbation_norm(fresh, x, "L0").max() <= 0.145 * 64
    masked = Scaled(cnn, 1e4)
    with pytest.warns(NoGradientWarning):
        assert left(masked, run("jsma-f", masked, x, y), y) > 60


def test_jsma_f_in_float32_is_as_strong_as_in_float64(cnn, points):
    """The gradient of the other classes' probabilities must not be lost to rounding."""
    x, y = points
    fine = copy.deepcopy(cnn).double()
    single, double = left(cnn, run("jsma-f", cnn, x, y, 4), y), left(fine, run("jsma-f", fine, x.double(), y, 4), y)
    assert 0 < single <= double + 1


def test_deepfool_reaches_the_nearest_plane_with_its_overshoot():
    model = Scores([[3.0, 0.0], [0.0, 4.0], [-9.0, -9.0]], [0.5, 0.0, 0.0])
    x, y = images([0.6, 0.3]), torch.tensor([0])
    moved = run("deepfool", model, x, y)
    torch.testing.assert_close(moved - x, images([-3.0, 4.0]) * 1.1 / 25 * 1.02, rtol=1e-4, atol=1e-5)


def test_square_visits_every_pixel_and_its_patterns_are_balanced():
    at = window_corners(per_image_rng.uniform(torch.arange(500), 0, 2), 8, 8, 3)
    assert at.min() == 0 and at.max() == 5
    pattern = l2_pattern(5)
    assert pattern.norm().item() == pytest.approx(1) and (pattern[:2] > 0).all() and (pattern[2:] < 0).all()


def test_noise_is_uniform_normal_and_belongs_to_the_image():
    x = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    key = per_image_rng.image_keys(x, 5)
    u, g = per_image_rng.uniform(key, 0, 40, 40), per_image_rng.normal(key, 1, 40, 40)
    assert u.min() >= 0 and u.max() < 1 and abs(u.mean() - 0.5) < 0.01 and abs(u.var() - 1 / 12) < 0.003
    assert abs(g.mean()) < 0.04 and abs(g.std() - 1) < 0.04
    assert abs(torch.corrcoef(u.flatten(1)).triu(1)).max() < 0.1
    assert torch.equal(per_image_rng.uniform(per_image_rng.image_keys(x[3:4], 5), 0, 40, 40)[0], u[3])
    assert len({int(k) for k in per_image_rng.image_keys(x, 6)} | {int(k) for k in key}) == 12
    assert (
        abs(torch.corrcoef(torch.stack([u[0].flatten(), per_image_rng.uniform(key, 1, 40, 40)[0].flatten()]))[0, 1])
        < 0.1
    )


def test_random_points_of_the_ball_have_the_documented_distribution():
    x = torch.full((500, 1, 2, 2), 0.5) + torch.linspace(0, 1e-3, 500)[:, None, None, None]
    key = per_image_rng.image_keys(x, 0)
    cube = random_start(x, 0.2, "Linf", key, 0) - x
    assert cube.abs().max() <= 0.2 + 1e-6 and abs(cube.mean()) < 0.01
    assert cube.std().item() == pytest.approx(0.4 / math.sqrt(12), abs=0.01)
    for power in (1.0, 1 / 4):
        radius = perturbation_norm(random_start(x, 0.2, "L2", key, 0, power), x, "L2") / 0.2
        assert radius.max() <= 1 + 1e-5 and (radius ** (1 / power)).mean().item() == pytest.approx(0.5, abs=0.05)


def counting(model):
    def call(x):
        call.images += len(x)
        return model(x)

    call.images = 0
    return call


BAD = {
    "pixels above 1": ({"x": lambda x: x * 16}, "pixels must be finite and in"),
    "NaN pixels": ({"x": lambda x: x * float("nan")}, "pixels must be finite"),
    "bytes": ({"x": lambda x: (255 * x).byte()}, "floating-point NCHW"),
    "flat images": ({"x": lambda x: x.flatten(1)}, "floating-point NCHW"),
    "labels of another length": ({"y": lambda y: y[:-1]}, "expected y to be int64 .* got torch.int64 of shape"),
    "float labels": ({"y": lambda y: y.float()}, "expected y to be int64 .* got torch.float32"),
    "one-hot labels": ({"y": lambda y: F.one_hot(y)}, "expected y to be int64 .* got torch.int64 of shape"),
    "eps < 0": ({"eps": -0.1}, "expected eps .* got -0.1"),
    "NaN eps": ({"eps": float("nan")}, "expected eps .* got nan"),
    "no eps": ({"eps": None}, "pgd needs eps"),
    "unknown attack": ({"name": "pgd40"}, "unknown attack 'pgd40': choose one of .*apgd-ce"),
    "unknown norm": ({"norm": "L1"}, "pgd has no norm 'L1': choose one of Linf, L2"),
    "batch size": ({"batch_size": 0}, "expected batch_size to be an integer >= 1, got 0"),
    "mode": ({"mode": "train"}, "expected mode .* got 'train'"),
}
LATER = {
    "label out of range": ({"y": lambda y: y + 10}, "expected y in 0..9, .* got 1"),
    "negative label": ({"y": lambda y: y - 10}, "expected y in 0..9, .* got -"),
    "probabilities": ({"head": lambda z: z.softmax(1)}, "got probabilities .* remove its softmax"),
    "NaN logits": ({"head": lambda z: z * float("nan")}, "got NaN for 8 of 8"),
    "one logit": ({"head": lambda z: z[:, :1]}, "expected logits \\(8, classes >= 2\\) .* got \\(8, 1\\)"),
    "target": ({"name": "cw", "norm": "L2", "target": torch.full((8,), 12)}, "expected target in 0..9, .* got 12..12"),
}


@pytest.mark.parametrize("case", [*BAD, *LATER])
def test_bad_input_is_refused_before_the_first_step(case, cnn, points):
    changes, message = (BAD | LATER)[case]
    head = changes.get("head", lambda z: z)
    model = counting(lambda x: head(cnn(x)))
    call = {"name": "pgd", "x": points[0][:8], "y": points[1][:8], "eps": 0.1, "norm": "Linf"}
    call |= {k: v(call[k]) if callable(v) else v for k, v in changes.items() if k != "head"}
    with pytest.raises(ValueError, match=message):
        attack(call.pop("name"), model, call.pop("x"), call.pop("y"), **call, progress=False)
    assert model.images == (0 if case in BAD else 8)


def test_unknown_options_are_refused_with_the_list_of_valid_ones(cnn, points):
    with pytest.raises(TypeError, match=r"square has no option n_queries: its options are queries, p, restarts"):
        run("square", cnn, *points, 0.1, n_queries=10)
    with pytest.raises(TypeError, match="apgd-ce has no option loss"):
        run("apgd-ce", cnn, *points, 0.1, loss="dlr")
    with pytest.raises(ValueError, match=r"expected pgd's loss to be one of 'ce', .* got 'x'"):
        run("pgd", cnn, *points, 0.1, loss="x")


def test_no_images_is_no_error(cnn, points):
    assert run("pgd", cnn, points[0][:0], points[1][:0], 0.1).shape == (0, 1, 8, 8)


def test_what_left_the_ball_or_the_box_is_never_returned(monkeypatch, cnn, points):
    x, y = points
    rogue = api.AttackEntry(lambda model, x, *rest: x + 0.5, ("Linf", "L0"))
    monkeypatch.setitem(REGISTRY, "rogue", rogue)
    x_adv = run("rogue", cnn, x, y, 0.1)
    assert perturbation_norm(x_adv, x, "Linf").max() <= 0.1 + 1e-6 and x_adv.max() <= 1
    with pytest.raises(RuntimeError, match="got others"):
        run("rogue", cnn, x, y, 3, "L0")


def test_state_is_restored_when_the_model_fails(cnn, points):
    model = build_classifier("cnn", width=4, seed=1)
    model.train()
    model[1].eval()
    calls = iter([True])

    def explode(*_):
        if not next(calls, False):
            raise KeyError("boom")

    handle = model.register_forward_hook(explode)
    state = torch.get_rng_state()
    with pytest.raises(KeyError):
        run("pgd", model, *points, 0.1)
    handle.remove()
    assert model.training and not model[1].training and torch.equal(state, torch.get_rng_state())


def test_bpda_computes_one_function_and_differentiates_another(cnn, points):
    x, y = points

    def quantise(x):
        return (x * 4).round() / 4

    layer = bpda(quantise, lambda x: 3 * x)
    probe = x[:2].clone().requires_grad_()
    out = layer(probe)
    assert torch.equal(out, quantise(x[:2]))
    assert (torch.autograd.grad(out.sum(), probe)[0] == 3).all()
    defended = nn.Sequential(bpda(quantise, lambda x: 0 * x), cnn)
    open_ = run("pgd", nn.Sequential(bpda(quantise), cnn), x, y, 0.2, start=False)
    with pytest.warns(NoGradientWarning):
        masked = run("pgd", defended, x, y, 0.2, start=False)
    assert left(defended, open_, y) < left(defended, masked, y) - 30


class Shifts(nn.Module):
    """A randomised defence: strong Gaussian noise from the global generator on every pixel."""

    def forward(self, x):
        return (x + 0.4 * torch.randn_like(x)).clamp(0, 1)


def test_eot_averages_random_passes(cnn, points):
    x, y = points[0][:100], points[1][:100]
    noisy = nn.Sequential(Shifts(), cnn)
    state, averaged = torch.get_rng_state(), Ensemble([noisy] * 64)
    some = [run("pgd", noisy, x, y, 0.12, loss="margin", kappa=99.0, eot=k) for k in (1, 16)]
    assert torch.equal(state, torch.get_rng_state())
    assert left(averaged, some[1], y) <= left(averaged, some[0], y) + 2


def test_transfer_from_surrogates_given_and_trained_on_labels_only(cnn, digits, points):
    x, y = points
    surrogate = build_classifier("cnn", width=4, seed=7)
    queries = []

    def labels_only(x):
        queries.append(len(x))
        return cnn(x).argmax(1)

    options = {"epochs": 15, "lr": 1e-2, "progress": False}
    trained = train_surrogate(labels_only, digits[0][:400], surrogate, rounds=1, **options)
    assert trained is surrogate and queries == [400, 800]
    with torch.no_grad():
        assert (surrogate(x).argmax(1) == cnn(x).argmax(1)).double().mean() > 0.85
    calls = counting(cnn)
    moved = attack("transfer", calls, x, y, 0.15, progress=False, surrogate=surrogate)
    assert calls.images == len(x)  # the victim is called once: which images are wrong anyway
    assert left(cnn, moved, y) < left(cnn, run("noise", cnn, x, y, 0.15), y) - 20
    timid = run("transfer", cnn, x, y, 0.15, surrogate=surrogate, confidence=0.0)
    assert left(cnn, moved, y) < left(cnn, timid, y)
    with pytest.raises(ValueError, match="needs surrogate"):
        run("transfer", cnn, x, y, 0.1)
    with pytest.raises(ValueError, match="'cw' with norm L2"):
        run("transfer", cnn, x, y, 0.1, surrogate=surrogate, by="cw")
    close = run("transfer", cnn, x[:20], y[:20], 2.0, "L2", surrogate=surrogate, by="cw", confidence=2.0, steps=50)
    assert left(surrogate, close, y[:20]) < 20


def test_soft_predictions_train_a_surrogate_too(cnn, digits):
    surrogate = build_classifier("cnn", width=4, seed=7)
    x = digits[0][:600]
    train_surrogate(lambda x: cnn(x).softmax(1), x, surrogate, epochs=15, lr=1e-2, progress=False)
    assert (surrogate(x).argmax(1) == cnn(x).argmax(1)).double().mean() > 0.9


@pytest.mark.parametrize("kind", ["classes", "probabilities"])
def test_a_surrogate_learns_nothing_from_predictions_that_are_not_finite(kind, cnn, digits):
    x, bad = digits[0][:40], torch.arange(40) % 4 == 0
    queries = []

    def victim(x, spoil=True):
        queries.append(len(x))
        z = cnn(x).softmax(1)
        z = z.masked_fill(bad[:, None], torch.nan) if spoil and len(x) == 40 else z
        return z if kind == "probabilities" else most_likely(z)

    options = {"rounds": 1, "epochs": 2, "progress": False}
    with pytest.warns(AttackWarning, match="not finite for 10 of 40 queries: the surrogate learns nothing") as caught:
        spoilt = train_surrogate(victim, x, build_classifier("cnn", width=4, seed=7), **options)
    assert queries == [40, 60] and len(caught) == 1
    whole = partial(victim, spoil=False)
    clean = train_surrogate(whole, x[~bad], build_classifier("cnn", width=4, seed=7), **options)
    assert all(torch.equal(a, b) for a, b in zip(spoilt.parameters(), clean.parameters(), strict=True))


def test_step_size_is_one_rule_and_the_attacks_use_it(cnn, points):
    x, y = points
    assert step_size(0.1, 20) == 2.5 * 0.1 / 20 and step_size(0.1, 0) == 2.5 * 0.1
    assert step_size(0.1, 20, share=0.25) == 0.1 / 4
    assert torch.equal(*(pgd(cnn, x, y, 0.1, steps=7, alpha=alpha) for alpha in (None, 2.5 * 0.1 / 7)))
    assert torch.equal(*(eot_pgd(cnn, x, y, 0.1, steps=7, alpha=alpha) for alpha in (None, 0.1 / 4)))


def test_the_map_of_the_folder_lists_every_attack_with_its_norms():
    rows = [line.strip("| ").split(" | ") for line in (attacks.__doc__ or "").splitlines() if line.startswith("|")][2:]
    listed = {name: tuple(norms.split(", ")) for names, _, norms, _ in rows for name in names.split(", ")}
    assert listed == {name: entry.norms for name, entry in REGISTRY.items()}


def test_few_functions_lie_between_attack_and_the_model(cnn, points):
    folder, paths = str(Path(api.__file__).parent), set()

    def watched(x):
        codes = [frame.f_code for frame, _ in traceback.walk_stack(sys._getframe())][::-1]
        ours = [c.co_name for c in codes if c.co_filename.startswith(folder) and not c.co_name.startswith("<")]
        paths.add(" > ".join(ours))
        return cnn(x)

    run("pgd", watched, points[0][:4], points[1][:4], 0.1, steps=2, loss="margin", kappa=1e6)
    steps = ("attack > checked_logits", "attack > pgd > loss_and_grad", "attack > pgd > mean_logits")
    assert paths == {f"{step} > __call__ > run" for step in steps}


WITHOUT_TORCHATTACKS = """
import sys

sys.modules["torchattacks"] = None  # an import of it fails
import torch
from lib.attacks.api import attack

x, y = torch.full((2, 1, 2, 2), 0.5), torch.tensor([0, 0])
model = lambda x: x.flatten(1)[:, :2] * 9 + x.new_tensor([1, 0])
assert (model(attack("pgd", model, x, y, 0.2, progress=False)).argmax(1) == 1).all()
try:
    attack("fab-t", model, x, y, 0.2, progress=False)
except ImportError as error:
    print(error)
"""


def test_only_fab_needs_torchattacks_and_says_how_to_install_it():
    call = [sys.executable, "-c", WITHOUT_TORCHATTACKS]
    done = subprocess.run(call, capture_output=True, text=True, cwd=Path(api.__file__).parents[2], check=False)
    assert done.returncode == 0, done.stderr
    assert "needs torchattacks: install it by `python -m lib.pipeline.environment`" in done.stdout
