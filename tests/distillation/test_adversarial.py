"""Losses of robust distillation: hand computations, reductions, and one test per bug of public code."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lib.attacks.api import attack
from lib.data import load_dataset
from lib.distillation.adversarial import (
    INNER_OBJECTIVES,
    METHODS,
    AdversarialBatch,
    Method,
    inner_maximisation,
    kl_divergence,
    robust_loss,
)
from lib.models import build_classifier
from lib.training import train
from lib.utils.random_state import attack_mode
from lib.utils.seeds import seeded_generator

EPS = 0.15
NEED_TEACHER = [name for name, method in METHODS.items() if method.teacher]


def normalised(seed: int, width: int = 4) -> nn.Module:
    """A small network with batch normalisation and dropout, whose two modes differ."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3)
        return nn.Sequential(*layers, nn.Linear(64 * width, 10))


class Certain(nn.Module):
    """Answers the given labels, beyond doubt."""

    def __init__(self, y):
        super().__init__()
        self.y = y

    def forward(self, z):
        return 100.0 * F.one_hot(self.y, 10).to(z.dtype)


@pytest.fixture
def nets():
    return build_classifier("cnn", width=4, seed=1), build_classifier("cnn", width=8, seed=2)


@pytest.fixture(scope="module")
def points(digits):
    return digits[0][:24], digits[1][:24]


def value(method, student, teacher, x, y, epoch=0, **options):
    settings = {"eps": EPS, "epochs": 10, "steps": 3} | options
    return robust_loss(method, teacher, **settings)(student, x, y, generator=seeded_generator(0, "test"), epoch=epoch)[
        0
    ]


def softmax(z):
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def divergence(p, q):
    return (p * np.log(p / q)).sum(1)


def by_hand(name, s, s_adv, t, t_adv, s_mirror, t_mirror, y, share):
    """Each outer minimum once more, from logits, in NumPy."""
    rows = np.arange(len(y))
    ps, pa, pt, pta = softmax(s), softmax(s_adv), softmax(t), softmax(t_adv)
    ce, ce_adv = -np.log(ps[rows, y]), -np.log(pa[rows, y])
    others = pa.copy()
    others[rows, y] = 0
    each = {
        "natural": ce,
        "pgd-at": ce_adv,
        "trades": ce + 3 * divergence(ps, pa),
        "trades-at": ce + 3 * (0.8 * divergence(ps, pa) + 0.2 * ce_adv),
        "mart": ce_adv - np.log(1 - others.max(1)) + 5 * divergence(ps, pa) * (1 - ps[rows, y]),
        "kd": 0.7 * 4 * divergence(softmax(t / 2), softmax(s / 2)) + 0.3 * ce,
        "ard": 0.6 * 9 * divergence(softmax(t / 3), softmax(s_adv / 3)) + 0.4 * ce,
        "rslad": 0.75 * divergence(pt, pa) + 0.25 * divergence(pt, ps),
        "iad": divergence(pt, pa) + (1 - pta[rows, y] ** 0.5) * divergence(ps, pa) * (share >= 0.3),
        "adaad": divergence(pta, pa),
        "igdm": divergence(pta, pa) + 7 * share * divergence(softmax(t_adv - t_mirror), softmax(s_adv - s_mirror)),
        "teach": divergence(pt, ps) + 2 * divergence(ps, pa),
        "guided": ce + 2 * (0.7 * divergence(ps, pa) + 0.3 * divergence(pt, pa)),
    }
    return each[name].mean()


OPTIONS = {
    "trades": {"beta": 3.0},
    "trades-at": {"beta": 3.0, "lam": 0.2},
    "mart": {"lam": 5.0},
    "kd": {"tau": 2.0, "weight": 0.7},
    "ard": {"tau": 3.0, "weight": 0.6},
    "rslad": {"clean": 0.25},
    "iad": {"beta": 0.5},
    "igdm": {"weight": 7.0},
    "teach": {"beta": 2.0},
    "guided": {"beta": 2.0, "lam": 0.3},
}


@pytest.mark.parametrize("share", [0.0, 0.8])
@pytest.mark.parametrize("name", METHODS)
def test_every_outer_minimum_by_hand(name, share, nets, points):
    student, teacher = (net.double() for net in nets)
    x, y = points[0].double(), points[1]
    batch = AdversarialBatch(student, teacher, x, y)
    batch.x_adv = (x + 0.1 * torch.rand(x.shape, generator=seeded_generator(0, "x"))).clamp(0, 1)
    value = METHODS[name].outer(batch, share, **OPTIONS.get(name, {})).item()
    with torch.no_grad():
        logits = [net(images).numpy() for images in (x, batch.x_adv) for net in nets]
        s, t, s_adv, t_adv = logits
        mirrors = [net(2 * x - batch.x_adv).numpy() for net in nets]
    assert value == pytest.approx(by_hand(name, s, s_adv, t, t_adv, *mirrors, y.numpy(), share), rel=1e-9)


def test_without_a_ball_each_loss_is_its_plain_one(nets, points):
    student, teacher = nets
    x, y = points
    ce = F.cross_entropy(student(x), y)
    soft = kl_divergence(teacher(x), student(x)).mean()
    own = kl_divergence(teacher(x), teacher(x) + 1).mean()  # KL does not see a shift of the logits
    assert own.item() == pytest.approx(0, abs=1e-6)
    plain = {"natural": ce, "pgd-at": ce, "trades": ce, "rslad": soft, "adaad": soft, "teach": soft}
    for name, expected in plain.items():
        torch.testing.assert_close(value(name, student, teacher, x, y, eps=0.0), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(value("kd", student, teacher, x, y, weight=0.0), ce)
    torch.testing.assert_close(value("kd", student, teacher, x, y, weight=1.0, tau=1.0), soft)
    torch.testing.assert_close(value("ard", student, teacher, x, y, eps=0.0, tau=1.0), soft)
    with torch.no_grad():
        torch.testing.assert_close(value("ard", student, teacher, x, y, weight=0.0, tau=1.0), ce)
    own, none = value("trades", student, teacher, x, y), value("guided", student, teacher, x, y, lam=0.0)
    torch.testing.assert_close(own, none)
    torch.testing.assert_close(own, value("trades-at", student, teacher, x, y, lam=0.0))
    sure = nn.Sequential(teacher, Certain(y))
    taught, labelled = value("guided", student, sure, x, y, lam=0.4), value("trades-at", student, None, x, y, lam=0.4)
    torch.testing.assert_close(taught, labelled, rtol=1e-4, atol=1e-5)
    late = value("iad", student, teacher, x, y, epoch=9, tau=2.0), value("ard", student, teacher, x, y, tau=2.0)
    early = value("iad", student, teacher, x, y, epoch=2, tau=2.0)
    assert early.item() == pytest.approx(late[1].item()) and late[0] > late[1]
    assert value("igdm", student, teacher, x, y).item() == value("adaad", student, teacher, x, y).item()


@pytest.mark.parametrize("inner", INNER_OBJECTIVES)
def test_the_inner_maximum_climbs_and_uses_its_ball(inner, nets, points):
    batch = AdversarialBatch(*nets, *points)
    options = {"eps": EPS, "alpha": EPS / 4, "start": "uniform"}
    model, objective = INNER_OBJECTIVES[inner](batch)
    x_adv = inner_maximisation(batch, inner, steps=10, generator=seeded_generator(0, "a"), **options)
    begun = inner_maximisation(batch, inner, steps=0, generator=seeded_generator(0, "a"), **options)
    gain = objective(model(x_adv), batch.y) - objective(model(begun), batch.y)
    assert (gain > 0).double().mean() > 0.9
    far = (x_adv - batch.x).abs()
    assert far.max() <= EPS + 1e-6 and x_adv.min() >= 0 and x_adv.max() <= 1
    free = (batch.x > EPS) & (batch.x < 1 - EPS)  # radius and step are not swapped: most pixels reach eps
    assert (far[free] > EPS - 1e-6).double().mean() > 0.7
    one = inner_maximisation(
        batch, inner, steps=1, generator=seeded_generator(0, "a"), eps=EPS, alpha=0.01, start="none"
    )
    assert (one - batch.x).abs().max() <= 0.01 + 1e-6


def test_the_moving_objective_differentiates_through_the_teacher(nets, points):
    student, teacher = (net.double() for net in nets)
    x, y = points[0][:3].double(), points[1][:3]
    model, objective = INNER_OBJECTIVES["moving"](AdversarialBatch(student, teacher, x, y))
    point = (0.8 * x + 0.1).requires_grad_()
    grad = torch.autograd.grad(objective(model(point), y).sum(), point)[0]
    along = torch.randn(x.shape, generator=seeded_generator(0, "d"), dtype=torch.float64)
    with torch.no_grad():
        ends = [kl_divergence(teacher(point + h * along), student(point + h * along)).sum() for h in (1e-6, -1e-6)]
    assert (grad * along).sum().item() == pytest.approx((ends[0] - ends[1]).item() / 2e-6, rel=1e-4)


def test_gradients_flow_through_the_clean_logits_of_trades(nets, points):
    student, (x, y) = nets[0], points
    batch = AdversarialBatch(student, None, x, y)
    batch.x_adv = (x + 0.1).clamp(0, 1)
    own = torch.autograd.grad(METHODS["trades"].outer(batch, 0.0), list(student.parameters()))
    z, z_adv = student(x), student(batch.x_adv)
    for clean, same in ((z, True), (z.detach(), False)):
        p, q = clean.softmax(1), z_adv.softmax(1)
        loss = F.cross_entropy(z, y) + 6 * (p * (p.log() - q.log())).sum(1).mean()
        other = torch.autograd.grad(loss, list(student.parameters()), retain_graph=True)
        assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in zip(own, other, strict=True)) == same


@pytest.mark.parametrize("name", NEED_TEACHER)
def test_the_teacher_is_frozen_and_evaluated_no_more_than_needed(name, points):
    student, teacher = normalised(0), normalised(1)
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    teacher.train()
    calls = []
    teacher.register_forward_hook(lambda module, inputs, output: calls.append(len(output)))
    value(name, student, teacher, *points, epoch=5, steps=3).backward()
    assert len(calls) == {"iad": 2, "adaad": 4, "igdm": 5}.get(name, 1)
    assert not teacher.training and all(not p.requires_grad and p.grad is None for p in teacher.parameters())
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in student.parameters())


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("name", METHODS)
def test_the_attack_leaves_statistics_flags_and_gradients_alone(name, mode, points):
    student, teacher = normalised(0).train(), normalised(1)
    student[4].eval()  # frozen by its user
    x, y = points
    updates, during = [], []
    student[1].register_forward_hook(
        lambda m, i, o: (updates if torch.is_grad_enabled() else during).append(m.training)
    )
    count = student[1].num_batches_tracked.clone()
    value(name, student, teacher, x, y, epoch=5, mode=mode)
    outer = int(student[1].num_batches_tracked - count)  # the outer minimum's own passes, one per kind of image
    assert outer == {"natural": 1, "pgd-at": 1, "kd": 1, "ard": 1, "adaad": 1}.get(name, 2)
    assert [m.training for m in student] == [True] * 4 + [False, True] and student.training
    assert all(p.grad is None for p in student.parameters())
    inside = (updates + during)[: len(updates) + len(during) - outer] if METHODS[name].inner else []
    assert sum(updates) >= outer and (mode == "train" or not any(updates[:-outer])), inside


def test_a_training_attack_in_train_mode_sees_the_statistics_of_its_batch(points):
    student = normalised(0).train()
    mean = student[1].running_mean.clone()
    with attack_mode(student, "train"):
        assert student.training
        student(points[0])
        assert not torch.equal(student[1].running_mean, mean)
    assert torch.equal(student[1].running_mean, mean)
    with pytest.raises(RuntimeError, match="inside"), attack_mode(student, "eval"):
        assert not student.training
        raise RuntimeError("inside")
    assert student.training


def test_a_batch_twice_is_the_same_loss(nets, points):
    x, y = points
    for name in METHODS:
        once = value(name, *nets, x, y, eps=1e-6, epoch=5)
        twice = value(name, *nets, torch.cat([x, x]), torch.cat([y, y]), eps=1e-6, epoch=5)
        torch.testing.assert_close(once, twice, rtol=1e-4, atol=1e-6)


def test_the_losses_train_a_robust_student(digits):
    x, y = (t[:600] for t in digits)
    tests = tuple(t[1297:1497] for t in digits)
    robust = {}
    for name in ("natural", "pgd-at", "trades"):
        model = build_classifier("cnn", width=8, seed=0)
        loss = robust_loss(name, eps=EPS, epochs=12, steps=5)
        train(model, loss, (x, y), epochs=12, lr=1e-2, batch_size=64, progress=False)
        with torch.no_grad():
            robust[name] = (
                (model(attack("pgd", model, *tests, EPS, progress=False)).argmax(1) == tests[1]).float().mean()
            )
    assert robust["natural"] + 0.15 < min(robust["pgd-at"], robust["trades"]), robust


def test_equal_generators_give_equal_losses(nets, points):
    first, again = (value("ard", *nets, *points) for _ in range(2))
    loss = robust_loss("ard", nets[1], eps=EPS, epochs=10, steps=3)
    other = loss(nets[0], *points, generator=seeded_generator(1, "test"), epoch=0)[0]
    assert first.item() == again.item() != other.item()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"method": "rsald"}, "expected method to be one of natural, .*, got 'rsald'"),
        ({"method": "trades", "lam": 1.0}, "expected options of trades among beta, got lam"),
        ({"method": "ard"}, "expected a teacher, got None: ard learns from one"),
        ({"mode": "frozen"}, "expected mode to be one of eval, train, got 'frozen'"),
        ({"method": Method(METHODS["pgd-at"].outer, "cw")}, "expected inner to be one of ce, .*, got 'cw'"),
        ({"method": Method(METHODS["pgd-at"].outer, "ce", start="zero")}, "expected start to be one of .*, got 'zero'"),
        ({"eps": 8.0}, "got eps 8.0"),
        ({"steps": 0}, "steps 0"),
    ],
)
def test_bad_settings_are_refused_before_any_work(change, words):
    with pytest.raises(ValueError, match=words):
        robust_loss(**{"method": "pgd-at", "eps": EPS, "epochs": 2} | change)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_one_step_of_resnet18_under_resnet50_on_cifar10(name):
    try:
        data = load_dataset("cifar10", n_labels=10)
    except OSError as error:
        pytest.skip(f"no CIFAR-10 here: {error}")
    student, teacher = (build_classifier(arch, **data.spec(), seed=0) for arch in ("resnet18", "resnet50"))
    start = [p.detach().clone() for p in student.parameters()]
    loss = robust_loss(name, teacher, eps=8 / 255, epochs=2, steps=2)
    options = {"lr": 0.1, "optimizer": "sgd", "weight_decay": 5e-4, "progress": False}
    result = train(student, loss, tuple(t[:4] for t in data.train), epochs=1, batch_size=4, **options)
    assert result.history[0]["loss"] > 0
    assert all(not torch.equal(a, b) for a, b in zip(start, student.parameters(), strict=True))
