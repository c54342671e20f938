"""Each fault found in torchattacks 3.5.1: the raw call shows it, ours is free of it; and ours is at least as strong."""

from copy import deepcopy

import pytest
import torch
import torchattacks
from torch import nn
from torch.nn import functional as F

from lib.attacks.api import REGISTRY, attack
from lib.attacks.checks import perturbation_norm
from lib.attacks.common import margin
from lib.attacks.gate import NoGradientWarning
from lib.attacks.square import window_corners
from lib.models import build_classifier
from lib.utils.per_image_rng import uniform


class Head(nn.Module):
    """`model` with its logits changed by `change`; it has one parameter, as torchattacks needs."""

    def __init__(self, change, model=None):
        super().__init__()
        self.change, self.model = change, model or nn.Flatten()
        self.idle = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return self.change(self.model(x))


def ours(name, model, x, y, eps=None, norm=None, **options):
    return attack(name, model, x, y, eps, norm, progress=False, **options)


def left(model, x, y):
    with torch.no_grad():
        return 100 * (model(x).argmax(1) == y).double().mean().item()


@pytest.fixture
def cnn(shared_cnn):
    """A copy, since torchattacks itself leaves gradients and switches modes."""
    return deepcopy(shared_cnn)


@pytest.fixture(scope="module")
def points(digits, shared_cnn):
    """The first 100 of the last 200 digits that the CNN has right."""
    x, y = (t[-200:] for t in digits)
    right = (shared_cnn(x).argmax(1) == y).nonzero().squeeze(1)[:100]
    return x[right], y[right]


@pytest.fixture
def saturated(points):
    """Digits with every pixel at exactly 0 or 1, and a CNN's own predictions as labels."""
    return points[0].round()


def test_cw_is_frozen_on_saturated_pixels(cnn, saturated):
    x, y = saturated[:20], cnn(saturated[:20]).argmax(1)
    raw = torchattacks.CW(cnn, c=100, steps=50)(x, y)
    assert (raw == x).all()
    assert left(cnn, ours("cw", cnn, x, y, steps=100, searches=5), y) == 0


def test_cw_margin_is_wrong_for_negative_logits():
    z, y = torch.tensor([[-5.0, -3.0, -9.0]]), torch.tensor([1])
    raw = torchattacks.CW(Head(lambda z: z), kappa=10)
    assert raw.f(z, y).item() == 0 - 0  # both sides of the margin became 0
    assert margin(z, y).item() == 2.0


def test_cw_gives_up_when_all_logits_are_negative(cnn, points):
    x, y = points[0][:20].clamp(0.01, 0.99), points[1][:20]
    model = Head(lambda z: z - 1000, cnn)
    assert left(model, torchattacks.CW(model, c=10, steps=100)(x, y), y) == 100
    assert left(model, ours("cw", model, x, y, steps=60, searches=6), y) == 0


def test_cw_has_no_search_over_c(cnn, points):
    x, y = points[0][:20].clamp(0.01, 0.99), points[1][:20]
    model = Head(lambda z: z / 1000, cnn)
    assert left(model, torchattacks.CW(model, steps=100)(x, y), y) >= 90
    assert left(model, ours("cw", model, x, y, steps=60, searches=6), y) == 0


def test_cw_stops_all_images_because_of_one():
    """The second image starts in a narrow valley, where Adam's steps raise its cost; the first needs 70 steps."""

    def change(z):
        difference = torch.where(z[:, 1] > 0.75, 1 + 100 * (z[:, 0] - 0.9).abs(), z[:, 0] - 0.5)
        return torch.stack([difference, 0 * difference], 1)

    model, y = Head(change), torch.tensor([0, 0])
    x = torch.tensor([[0.8, 0.5], [0.9001, 0.9]]).reshape(2, 1, 1, 2)
    raw = torchattacks.CW(model, c=5, steps=200, lr=0.01)
    assert left(model, raw(x[:1], y[:1]), y[:1]) == 0
    assert left(model, raw(x, y)[:1], y[:1]) == 100
    alone, both = (ours("cw", model, x[:n], y[:n]) for n in (1, 2))
    assert torch.equal(alone, both[:1]) and left(model, alone, y[:1]) == 0


def test_autoattack_runs_ten_steps_instead_of_one_hundred(cnn):
    raw = torchattacks.AutoAttack(cnn, seed=0)._autoattack.attacks
    assert [a.steps for a in raw if hasattr(a, "steps")] == [10, 10, 10]
    rand = torchattacks.AutoAttack(cnn, version="rand", seed=0)._autoattack.attacks
    assert [a.steps for a in rand] == [10, 10]  # ours: test_attacks.test_autoattack_runs_the_official_parts_and_budgets


RANDOM = {
    "apgd-ce": lambda m: torchattacks.APGD(m, steps=2),
    "apgd-t": lambda m: torchattacks.APGDT(m, steps=2),
    "fab-t": lambda m: torchattacks.FAB(m, steps=2, multi_targeted=True),
    "square": lambda m: torchattacks.Square(m, n_queries=2),
}


@pytest.mark.parametrize("name", RANDOM)
def test_the_global_random_state_is_overwritten(name, cnn, points):
    x, y = points[0][:4], points[1][:4]
    torch.manual_seed(99)
    before = torch.get_rng_state()
    ours(name, cnn, x, y, 0.05, **({"queries": 2} if name == "square" else {"steps": 2}))
    assert torch.equal(before, torch.get_rng_state())
    RANDOM[name](cnn)(x, y)
    raw = torch.get_rng_state()
    torch.manual_seed(99)
    torch.rand(1000)
    RANDOM[name](cnn)(x, y)
    assert torch.equal(raw, torch.get_rng_state())  # whatever came before, the next number is the same


def test_train_and_eval_flags_are_restored_wrongly(points):
    x, y = points[0][:4], points[1][:4]

    def mixed():
        model = build_classifier("cnn", width=4, dropout=0.5, seed=0).train()
        model[1].eval()
        return model, [m.training for m in model.modules()]

    model, flags = mixed()
    torchattacks.FGSM(model)(x, y)
    assert [m.training for m in model.modules()] != flags  # the frozen layer is in train mode now
    model, flags = mixed()
    model.eval()
    model[6].train()  # Monte Carlo dropout
    torchattacks.FGSM(model)(x, y)
    assert not model[6].training
    model, flags = mixed()
    ours("fgsm", model, x, y, 0.1)
    assert [m.training for m in model.modules()] == flags


@pytest.mark.parametrize("name", ["cw", "jsma-z", "fab-t", "deepfool"])
def test_gradients_are_left_in_the_parameters(name, points):
    x, y = points[0][:2], points[1][:2]
    model = build_classifier("cnn", width=4, seed=0).eval()
    y = model(x).argmax(1)
    raws = {
        "cw": torchattacks.CW(model, steps=2),
        "jsma-z": torchattacks.JSMA(model, gamma=0.05),
        "fab-t": torchattacks.FAB(model, steps=2, multi_targeted=True),
        "deepfool": torchattacks.DeepFool(model, steps=2),
    }
    raws[name](x, y)
    assert any(p.grad is not None for p in model.parameters())
    for p in model.parameters():
        p.grad = torch.full_like(p, 7.0)
    held = [p.grad for p in model.parameters()]
    ours(name, model, x, y, 0.05 if name == "fab-t" else None)
    assert all(p.grad is g and (g == 7).all() for p, g in zip(model.parameters(), held))


def test_jsma_has_ten_classes_hard_wired_and_works_image_by_image():
    model = Head(lambda z: z[:, :5] - z[:, :5].sum(1, keepdim=True) / 2)
    x = torch.linspace(0, 0.9, 3 * 16).reshape(3, 1, 4, 4)
    y = model(x).argmax(1)
    assert (y == 4).all()  # the target is (4 + 1) mod 10
    with pytest.raises((IndexError, RuntimeError)):
        torchattacks.JSMA(model, gamma=0.5)(x, y)
    calls = []
    handle = model.register_forward_hook(lambda module, inputs, _: calls.append(len(inputs[0])))
    x_adv = ours("jsma-z", model, x, y, gamma=0.5)
    handle.remove()
    assert left(model, x_adv, y) == 0 and max(calls) == 3


def test_jsma_knows_logits_only(cnn, points):
    x, y = points[0][:10], points[1][:10]
    model = Head(lambda z: 1e5 * z, cnn)
    with pytest.warns(NoGradientWarning, match="jsma-f"):
        moved = [(a != x).flatten(1).any(1).double().mean() for a in (ours(f"jsma-{k}", model, x, y) for k in "fz")]
    assert moved[0] < 0.5 < moved[1]  # F is stopped by the flat softmax, Z is not
    assert not hasattr(torchattacks.JSMA(cnn), "softmax")


def bouncing(width=0.05):
    """Logits that are wrong only in a thin band which a big step enters and leaves again."""
    return Head(lambda z: torch.stack([(z[:, 0] - 0.5).abs() - width, 0 * z[:, 0]], 1))


def test_pgd_loses_what_it_had_broken():
    x, y, options = torch.full((1, 1, 1, 1), 0.7), torch.tensor([0]), {"alpha": 0.19}
    raw = torchattacks.PGD(bouncing(), eps=0.4, steps=2, random_start=False, **options)(x, y)  # 0.7, 0.51, 0.32
    assert left(bouncing(), raw, y) == 100
    assert left(bouncing(), ours("pgd", bouncing(), x, y, 0.4, steps=2, start=False, **options), y) == 0


def test_apgdt_steps_every_image_by_the_first_ones_l2_step_size(cnn, points, monkeypatch):
    x, y = points[0][:12], points[1][:12]
    raw, seen = torchattacks.APGDT(cnn, norm="L2", eps=0.3, steps=40), []
    get_logits = raw.get_logits
    monkeypatch.setattr(raw, "get_logits", lambda x: seen.append(x.detach().clone()) or get_logits(x))
    raw.target_class = 2

    def path(first):
        seen.clear()
        with monkeypatch.context() as fixed:  # each image has a start of its own
            fixed.setattr(torch, "randn", lambda shape: uniform(torch.arange(first, 12), 0, *shape[1:]) - 0.5)
            raw.attack_single_run(x[first:], y[first:])
        return torch.stack(seen[1:])  # the points of all steps, without the clean image

    together, alone = path(0)[:, 1:], path(1)
    torch.testing.assert_close(together[0], alone[0])
    assert not torch.allclose(together, alone, atol=0.01)
    both = [ours("apgd-t", cnn, x[k:], y[k:], 0.1, "L2", steps=40) for k in (0, 1)]
    torch.testing.assert_close(both[0][1:], both[1], atol=1e-4, rtol=0)


def test_apgdt_fails_below_four_classes():
    model = Head(lambda z: z[:, :3])
    x, y = torch.tensor([[0.8, 0.5, 0.2, 0.1]]).reshape(1, 1, 2, 2), torch.tensor([0])
    with pytest.raises(IndexError):
        torchattacks.APGDT(model, eps=0.2, n_classes=3)(x, y)
    for norm in ("Linf", "L2"):
        assert left(model, ours("apgd-t", model, x, y, 0.3, norm), y) == 0
        assert left(model, ours("autoattack", model, x, y, 0.3, norm, queries=10), y) == 0


def test_deepfool_makes_nan_where_the_gradient_is_zero():
    model = Head(lambda z: torch.stack([z[:, 0].clamp_min(0.2), z[:, 1] * 0], 1))
    x, y = torch.full((1, 1, 1, 2), 0.1), torch.tensor([0])
    assert torchattacks.DeepFool(model)(x, y).isnan().any()
    with pytest.warns(NoGradientWarning):
        assert torch.equal(ours("deepfool", model, x, y), x)


def test_fgsm_gradients_underflow_in_big_batches_only():
    """The mean over n images divides a gradient of 1e-44 by n: at n = 100 it is below the least float32."""
    model = Head(lambda z: torch.stack([0 * z[:, 0], 10 * (z[:, 0] - 0.9) - 101], 1))
    x, y = torch.full((100, 1, 1, 1), 0.9), torch.zeros(100, dtype=torch.long)
    assert (torchattacks.FGSM(model, eps=0.05)(x[:1], y[:1]) != x[:1]).all()
    assert (torchattacks.FGSM(model, eps=0.05)(x, y) == x).all()
    assert (ours("fgsm", model, x, y, 0.05) != x).all()


def test_square_never_touches_the_last_row_and_shares_its_squares(monkeypatch):
    shapes = []

    def positions(self, low=0, high=1, shape=(1,)):
        shapes.append((low, high, tuple(shape)))
        return torch.tensor([high - 1 if high > 1 else 0])  # the largest number that random_int can give

    monkeypatch.setattr(torchattacks.Square, "random_int", positions)
    model, x, y = Head(lambda z: F.pad(z[:, :1], (0, 1))), torch.full((3, 1, 8, 8), 0.5), torch.zeros(3).long()
    torchattacks.Square(model, eps=0.1, n_queries=200, p_init=0.1)(x, y)
    assert all(shape == (1,) for *_, shape in shapes)  # one place for all images
    side = 2
    assert any(high == 8 - side for _, high, _ in shapes)  # a square of side 2 starts at most at 5: rows 5 and 6
    at = window_corners(uniform(torch.arange(200), 0, 2), 8, 8, side)
    assert at.max() == 8 - side and len(at.unique(dim=0)) > 30


def test_apgd_noise_depends_on_the_batch(cnn, points):
    x, y = points[0][:6], points[1][:6]
    raw = torchattacks.APGD(cnn, eps=0.02, steps=1)
    pairs = {
        "raw": [raw.attack_single_run(x[rows], y[rows])[0] for rows in (slice(0, 6), slice(3, 6))],
        "ours": [ours("apgd-ce", cnn, x[rows], y[rows], 0.02, steps=1) for rows in (slice(0, 6), slice(3, 6))],
    }
    assert not torch.allclose(pairs["raw"][0][3:], pairs["raw"][1], atol=1e-3)
    torch.testing.assert_close(pairs["ours"][0][3:], pairs["ours"][1])


def test_ours_are_at_least_as_strong_on_the_same_model_points_eps_and_steps(cnn, points):
    x, y = points
    pairs = [
        ("fgsm", "Linf", 0.1, {}, torchattacks.FGSM(cnn, eps=0.1)),
        ("pgd", "Linf", 0.1, {"alpha": 0.0125}, torchattacks.PGD(cnn, eps=0.1, alpha=0.0125, steps=20)),
        ("pgd", "L2", 0.5, {"alpha": 0.0625}, torchattacks.PGDL2(cnn, eps=0.5, alpha=0.0625, steps=20)),
        ("apgd-ce", "Linf", 0.1, {"steps": 50}, torchattacks.APGD(cnn, eps=0.1, steps=50)),
        ("apgd-dlr", "L2", 0.5, {"steps": 50}, torchattacks.APGD(cnn, norm="L2", eps=0.5, steps=50, loss="dlr")),
        ("apgd-t", "Linf", 0.1, {"steps": 12}, torchattacks.APGDT(cnn, eps=0.1, steps=12)),
        ("square", "Linf", 0.1, {"queries": 150}, torchattacks.Square(cnn, eps=0.1, n_queries=150)),
        ("square", "L2", 0.5, {"queries": 150}, torchattacks.Square(cnn, norm="L2", eps=0.5, n_queries=150)),
    ]
    for name, norm, eps, options, raw in pairs:
        assert left(cnn, ours(name, cnn, x, y, eps, norm, **options), y) <= left(cnn, raw(x, y), y) + 1, (name, norm)
    short = {"steps": 10, "queries": 50}
    raw = torchattacks.AutoAttack(cnn, eps=0.1, seed=0)
    raw._autoattack.attacks[3].n_queries = 50
    assert left(cnn, ours("autoattack", cnn, x, y, 0.1, **short), y) <= left(cnn, raw(x, y), y) + 1


def test_our_cw_and_deepfool_are_at_least_as_close(cnn, points):
    x, y = points[0][:50].clamp(1e-3, 1 - 1e-3), points[1][:50]
    fair = ours("cw", cnn, x, y, steps=80)
    raw = torchattacks.CW(cnn, steps=400, lr=0.02)(x, y)
    both = (cnn(raw).argmax(1) != y) & (cnn(fair).argmax(1) != y)
    pair = [perturbation_norm(a[both], x[both], "L2").mean() for a in (fair, raw)]
    assert pair[0] <= 1.02 * pair[1] and left(cnn, fair, y) <= left(cnn, raw, y) + 1
    few = ours("deepfool", cnn, x[:8], y[:8])
    raw = torchattacks.DeepFool(cnn)(x[:8], y[:8])
    both = (cnn(raw).argmax(1) != y[:8]) & (cnn(few).argmax(1) != y[:8])
    assert left(cnn, few, y[:8]) <= left(cnn, raw, y[:8])
    assert (
        perturbation_norm(few[both], x[:8][both], "L2").mean()
        <= 1.02 * perturbation_norm(raw[both], x[:8][both], "L2").mean()
    )


def test_the_registry_has_these_attacks():
    names = "fgsm pgd cw jsma-f jsma-z apgd-ce apgd-dlr apgd-t fab-t square deepfool eotpgd autoattack autoattack-rand"
    assert set(names.split()) | {"noise", "transfer"} == set(REGISTRY)
