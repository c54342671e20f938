"""Robust accuracy: worst case, intervals, refusals, costs, resumption and random models, by hand and brute force."""

import copy
import json
import random

import numpy as np
import pytest
import torch
from torch import nn

from lib.attacks.api import attack
from lib.evaluation import adversarial_images
from lib.evaluation.adversarial_images import EvaluationSettings
from lib.evaluation.outcomes import outcomes, unpack_bits
from lib.evaluation.robust_accuracy import evaluate_attacks, robust_accuracy, weak_attacks
from lib.evaluation.threat_models import AttackBudget, evaluate_under_attack
from lib.models import accuracy, predict_classes
from lib.purify import IdentityPurifier, PurifiedClassifier
from lib.utils.content_hash import content_hash
from lib.utils.intervals import wilson
from tests.controls import BROKEN, random_output, scaled_logits

EPS = 0.1


class Mean(nn.Module):
    """Class 1 when the mean pixel is above 0.5; its margin is linear in it."""

    def forward(self, x):
        v = x.flatten(1).mean(1) - 0.5
        return torch.stack([-v, v], 1)


class IndependentMean(Mean):
    """It says that every image has noise of its own, so that draws may share a batch."""

    independent_noise = True


def up(model, x, y, eps, norm, generator):
    return (x + eps).clamp(0, 1)


def down(model, x, y, eps, norm, generator):
    return (x - eps).clamp(0, 1)


def stay(model, x, y, eps, norm, generator):
    return x


@pytest.fixture
def dull():
    """20 flat images around the boundary, two of them labelled wrongly."""
    x = torch.linspace(0.3, 0.7, 20).reshape(-1, 1, 1, 1).expand(-1, 1, 2, 2).contiguous()
    y = (x[:, 0, 0, 0] > 0.5).long()
    y[[3, 16]] = 1 - y[[3, 16]]
    return x, y


@pytest.fixture
def images(digits):
    """40 digits that no fixture was trained on."""
    return digits[0][-40:], digits[1][-40:]


def run(model, attacks, x, y, **options):
    return robust_accuracy(model, attacks, x, y, **{"eps": EPS, "batch_size": 16, "progress": False} | options)


def timeless(record):
    return {k: v for k, v in record.items() if k != "timing"}


def test_worst_case_is_the_brute_force_one(dull):
    x, y = dull
    record = run(Mean(), {"up": {"name": up}, "down": {"name": down}}, x, y)
    clean = (predict_classes(Mean(), x) == y).numpy()
    survives = {
        k: clean & (predict_classes(Mean(), f(Mean(), x, y, EPS, "Linf", None)) == y).numpy()
        for k, f in (("up", up), ("down", down))
    }
    assert record["clean"]["accuracy"] == clean.mean() == 0.9
    assert record["robust"]["accuracy"] == (survives["up"] & survives["down"]).mean()
    for label, robust in survives.items():
        row = record["attacks"][label]
        assert row["accuracy"] == robust.mean() > record["robust"]["accuracy"]
        assert (unpack_bits(record["examples"]["broken_by"][label]) == ~robust).all()
        assert row["attacked"] == clean.sum() == 18
        assert row["success_rate"] == (clean & ~robust).sum() / 18
        assert row["failures"] == robust.sum()
    assert (unpack_bits(record["examples"]["correct_clean"]) == clean).all()


def test_intervals_are_wilsons(dull):
    record = run(Mean(), {"up": {"name": up}}, *dull)
    for part in (record["clean"], record["robust"], record["attacks"]["up"]):
        assert part["accuracy_interval"] == list(wilson(round(20 * part["accuracy"]), 20))


def test_no_attack_leaves_the_clean_accuracy(dull):
    record = run(Mean(), [], *dull)
    assert record["robust"] == record["clean"]
    assert accuracy(Mean(), *dull) == 0.9


def test_distances_by_hand():
    """Two channels: 0.3 and 0.4 on one pixel is L0 = 1, L2 = 0.5, Linf = 0.4; failures are not averaged in."""

    def one_pixel(model, x, y, eps, norm, generator):
        x = x.clone()
        x[:, 0, 0, 0] += 0.3
        x[:, 1, 0, 0] += 0.4
        return x

    x = torch.full((3, 2, 2, 2), 0.45)
    x[2] = 0.1  # out of the attack's reach
    row = run(Mean(), {"a": {"name": one_pixel}}, x, torch.zeros(3, dtype=torch.int64), eps=None)["attacks"]["a"]
    assert (row["success_rate"], row["failures"]) == (2 / 3, 1)
    for name, value in (("L0", 1), ("L2", 0.5), ("Linf", 0.4)):
        assert row["distance"][name] == pytest.approx({"mean": value, "median": value})


def test_mean_and_median_differ_where_distances_do(dull):
    x, y = dull

    def far(model, x, y, eps, norm, generator):
        return torch.where(y[:, None, None, None] == 0, torch.ones_like(x), torch.zeros_like(x))

    record = run(Mean(), {"far": {"name": far}}, x, y, eps=None)
    right = predict_classes(Mean(), x) == y
    moved = (far(None, x, y, None, "", None) - x).double()[right].flatten(1).norm(dim=1).numpy()
    result = record["attacks"]["far"]["distance"]["L2"]
    assert result == pytest.approx({"mean": moved.mean(), "median": np.median(moved)})
    assert record["robust"]["accuracy"] == 0


def test_without_successes_there_is_no_distance(dull):
    row = run(Mean(), {"stay": {"name": stay}}, *dull)["attacks"]["stay"]
    assert row["distance"] == {"Linf": None, "L2": None, "L0": None}
    assert row["success_rate"] == 0


@pytest.mark.parametrize(
    "cheat, eps, norm, words",
    [
        (
            lambda x, eps: x + 2 * eps,
            0.1,
            "Linf",
            r"'cheat' put example 2 outside the Linf ball of 0.1, at distance 0.2",
        ),
        (lambda x, eps: x + eps, 0.1, "L2", r"example 2 outside the L2 ball of 0.1, at distance 0.2"),
        (lambda x, eps: x - 0.7, None, "Linf", r"example 2 outside the box \[0, 1\] by 0.2"),
        (lambda x, eps: x * float("nan"), None, "Linf", r"example 2 outside the box"),
        (lambda x, eps: x[:1], None, "Linf", r"returned"),
    ],
)
def test_images_outside_ball_or_box_are_refused(cheat, eps, norm, words):
    """Only the second batch is cheated on; the example is named by its place in `x`."""
    x = torch.full((4, 1, 2, 2), 0.5)

    def attack(model, x, y, eps, norm, generator):
        return x if y[0] == 1 else cheat(x, eps)

    class Oracle(nn.Module):
        """Correct on every image: the class is in the last pixel."""

        def forward(self, x):
            v = (x[:, 0, 1, 1] > 0.51).float()
            return torch.stack([1 - v, 2 * v], 1)

    x[:2, :, 1, 1] = 0.52
    y = torch.tensor([1, 1, 0, 0])
    with pytest.raises(RuntimeError, match=words):
        run(Oracle(), {"cheat": {"name": attack}}, x, y, eps=eps, norm=norm, batch_size=2)


def test_a_registered_attack_is_checked_as_well(cnn, images, monkeypatch):
    monkeypatch.setattr(adversarial_images, "attack", lambda name, model, x, *rest, **options: (x + 0.3).clamp(0, 1))
    with pytest.raises(RuntimeError, match="'pgd' put example"):
        run(cnn, ["pgd"], *images)


def test_model_calls_are_counted_in_images(dull):
    def three_and_one(model, x, y, eps, norm, generator):
        with torch.no_grad():
            model(x), model(x[:1])
        x = x.clone().requires_grad_()
        torch.autograd.grad(model(x).sum(), x)
        return x

    x, y = dull
    row = run(Mean(), {"a": {"name": three_and_one}}, x, y, batch_size=32)["attacks"]["a"]
    assert (row["forward"], row["backward"]) == (18 + 1 + 18, 18)


def test_fgsm_takes_one_gradient_per_attacked_image(cnn, images):
    record = run(cnn, ["fgsm"], *images)
    assert record["attacks"]["fgsm"]["backward"] == record["attacks"]["fgsm"]["attacked"]


def test_attacks_of_least_distance_count_by_ball_and_by_success(cnn, images):
    x, y = images
    record = run(cnn, {"cw": {"name": "cw", "steps": 60}}, x[:12], y[:12], eps=1e-3)
    row = record["attacks"]["cw"]
    assert row["own_ball"]
    assert row["success_rate"] > 0.9
    assert row["outside_ball"] == round(row["success_rate"] * row["attacked"])
    assert row["accuracy"] == record["clean"]["accuracy"]
    assert not record["warnings"]


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("noisy", [False, True])
def test_an_interrupted_evaluation_goes_on_to_the_same_record(cnn, images, tmp_path, monkeypatch, noisy):
    model = random_output(cnn, torch.Generator(), 1.0) if noisy else cnn
    attacks, options = {"fgsm": {"name": "fgsm"}, "pgd": {"name": "pgd", "steps": 3}}, {"draws": 1 + noisy}
    whole = run(model, attacks, *images, **options)
    calls, real = [], adversarial_images.attack

    def failing(name, *rest, **more):
        calls.append(name)
        if len(calls) == 5:
            raise Interrupted
        return real(name, *rest, **more)

    monkeypatch.setattr(adversarial_images, "attack", failing)
    with pytest.raises(Interrupted):
        run(model, attacks, *images, resume_dir=tmp_path, **options)
    resumed = run(model, attacks, *images, resume_dir=tmp_path, **options)
    assert timeless(resumed) == timeless(whole)
    assert calls == ["fgsm"] * 3 + ["pgd"] * 4  # three batches each; the one that failed was run again, no other
    again = run(model, attacks, *images, resume_dir=tmp_path, **options)
    assert timeless(again) == timeless(resumed)
    assert len(calls) == 7


@pytest.mark.parametrize("change", ["weights", "data", "eps", "options", "seed", "batch", "scale", "damage", "foreign"])
def test_a_stale_or_foreign_record_is_not_used(cnn, images, tmp_path, monkeypatch, change):
    (x, y), model, options = images, scaled_logits(cnn, 2.0), {"resume_dir": tmp_path}
    run(model, ["fgsm"], x, y, **options)
    calls, real = [], adversarial_images.attack
    monkeypatch.setattr(adversarial_images, "attack", lambda *a, **k: calls.append(1) or real(*a, **k))
    attacks = ["fgsm"]
    if change == "weights":
        model = copy.deepcopy(model)
        next(model.parameters()).data.view(-1)[0] += 1e-6
    elif change == "data":
        x = x.clone()
        x[-1, 0, 0, 0] += 0.01
    elif change == "options":
        attacks = {"fgsm": {"name": "fgsm", "loss": "margin"}}
    elif change == "scale":
        model = scaled_logits(cnn, 3.0)
    elif change in ("eps", "seed", "batch"):
        options |= {"eps": {"eps": 0.11}, "seed": {"seed": 1}, "batch": {"batch_size": 20}}[change]
    for path in tmp_path.iterdir():
        if change == "damage":
            path.write_bytes(path.read_bytes()[:-30])
        if change == "foreign":
            batch = torch.load(path, weights_only=True)
            torch.save(batch | {"rows": batch["rows"] + 1, "images": 0 * batch["images"]}, path)
    record = run(model, attacks, x, y, **options)
    assert len(calls) == (2 if change == "batch" else 3)
    del options["resume_dir"]
    assert timeless(record) == timeless(run(model, attacks, x, y, **options))


def test_the_record_is_json_repeatable_and_leaves_no_trace(cnn, images):
    model = copy.deepcopy(cnn)
    model[5].train()
    state = torch.get_rng_state()
    first, second = (run(model, ["noise", "fgsm", "pgd"], *images) for _ in range(2))
    assert json.loads(json.dumps(first, allow_nan=False)) == first
    assert timeless(first) == timeless(second)
    assert set(first["timing"]) == {"clean", "noise", "fgsm", "pgd"}
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == [m is model[5] for m in model.modules()]
    assert all(p.grad is None for p in model.parameters())


def test_votes_by_hand():
    votes = np.array([[0, 1, 0, 2], [0, 0, 1, 1], [0, 1, 2, 0], [0, 1, 0, 0]])
    result = outcomes(votes, np.array([0, 1, 0, 1]))
    assert result["accuracy"].tolist() == [1, 0.75, 0.5, 0.25]
    assert result["worst_of_n"].tolist() == [1, 0, 0, 0]
    assert result["majority"].tolist() == [1, 1, 1, 0]
    assert outcomes(np.array([[0], [1]]), np.array([0]))["majority"].tolist() == [0]  # a tie is lost


def test_draws_change_nothing_for_a_deterministic_model(dull):
    attacks = {"up": {"name": up}, "down": {"name": down}}
    once, often = (run(Mean(), attacks, *dull, draws=n) for n in (1, 3))
    together = run(IndependentMean(), attacks, *dull, draws=3)
    assert (often["settings"]["at_once"], together["settings"]["at_once"]) == (1, 3)
    assert {k: v for k, v in together.items() if k not in ("timing", "settings", "model")} == {
        k: v for k, v in often.items() if k not in ("timing", "settings", "model")
    }
    for part, more in ((once["clean"], often["clean"]), (once["robust"], often["robust"])):
        assert more["accuracy"] == more["worst_of_n"] == more["majority"] == part["accuracy"]
    assert often["robust"]["control_worst_of_n"] == once["clean"]["accuracy"]
    assert once["examples"] == often["examples"]


class Coin(nn.Module):
    """Right (class 0) with probability 0.8, whatever it sees."""

    def __init__(self, independent_noise=False):
        super().__init__()
        self.generator, self.independent_noise = torch.Generator(), independent_noise

    def forward(self, x):
        wrong = (torch.rand(len(x), generator=self.generator) < 0.2).float()
        return torch.stack([1 - wrong, 2.0 * wrong - 0.5], 1)


@pytest.mark.parametrize("independent", [False, True])
def test_draws_of_a_random_model_and_its_control_without_attack(independent):
    """p = 0.8: one draw 0.8, all of 5 draws 0.33, the vote of 5 0.94; two idle attacks ask 10 times: 0.11."""
    x, y = torch.full((1000, 1, 1, 1), 0.5), torch.zeros(1000, dtype=torch.int64)
    attacks = {"a": {"name": stay}, "b": {"name": stay}}
    record = run(Coin(independent), attacks, x, y, draws=5, batch_size=500)
    for part in (record["clean"], record["attacks"]["a"], record["attacks"]["b"]):
        assert part["accuracy"] == pytest.approx(0.8, abs=0.02)
        assert part["worst_of_n"] == pytest.approx(0.8**5, abs=0.04)
        assert part["majority"] == pytest.approx(0.942, abs=0.02)
    assert record["robust"]["worst_of_n"] == pytest.approx(0.8**10, abs=0.03)
    assert record["robust"]["control_worst_of_n"] == pytest.approx(record["robust"]["worst_of_n"], abs=0.04)
    broken = [unpack_bits(record["examples"]["broken_by"][k]) for k in "ab"]
    assert (broken[0] != broken[1]).any()  # each attack's images are classified anew


def test_one_draw_of_a_random_model_is_warned_of():
    x, y = torch.full((16, 1, 1, 1), 0.5), torch.zeros(16, dtype=torch.int64)
    assert any("random" in text for text in run(Coin(), [], x, y)["warnings"])
    assert not run(Coin(), [], x, y, draws=2)["warnings"]


def test_a_stronger_attack_that_does_worse_is_named():
    def row(name, accuracy, own_ball=False):
        return {"name": name, "accuracy": accuracy, "own_ball": own_ball}

    fine = {"fgsm": row("fgsm", 0.5), "pgd": row("pgd", 0.4), "square": row("square", 0.45), "cw": row("cw", 0.9, True)}
    assert weak_attacks(fine) == []
    assert weak_attacks(fine | {"apgd": row("apgd-ce", 0.501)}) == []  # within 0.2 points; PGD is below Square
    assert weak_attacks(fine | {"apgd": row("apgd-ce", 0.51)}) == ["apgd leaves 51.00%, fgsm only 50.00%"]
    assert weak_attacks(fine | {"square": row("square", 0.39)}) == ["pgd leaves 40.00%, square only 39.00%"]


def test_masked_gradients_are_named_in_the_record(cnn, images):
    x, y = images
    attacks = {"pgd": {"name": "pgd"}, "square": {"name": "square", "queries": 200}}
    assert run(scaled_logits(cnn, 1e4), attacks, x, y, eps=0.2)["warnings"][0].startswith("pgd leaves")
    assert not run(cnn, attacks, x, y, eps=0.2)["warnings"]


def test_a_content_hash_knows_weights_settings_code_and_random_states(cnn):
    assert content_hash(copy.deepcopy(cnn)) == content_hash(cnn)
    assert (
        content_hash(scaled_logits(cnn, 2.0))
        == content_hash(scaled_logits(cnn, 2.0))
        != content_hash(scaled_logits(cnn, 3.0))
    )
    assert content_hash(lambda x: x + 1) != content_hash(lambda x: x + 2)
    assert content_hash(nn.Dropout(0.1)) != content_hash(nn.Dropout(0.2))
    assert (
        content_hash([cnn, cnn]) == content_hash([cnn, copy.deepcopy(cnn)]) != content_hash([cnn, nn.Identity()])
    )  # met before or not
    a, b = Coin(), Coin()
    b.generator.manual_seed(9)
    assert content_hash(a) != content_hash(b)
    assert content_hash({"a": 1, "b": [2]}) != content_hash({"a": [1, "b", 2]})
    assert (
        content_hash(torch.zeros(2))
        != content_hash(torch.zeros(2, 1))
        != content_hash(torch.zeros(2, dtype=torch.int32))
    )


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"attacks": ["pgdd"]}, ValueError, "unknown attack 'pgdd'"),
        ({"attacks": {"a": {"name": "pgd", "stepz": 3}}}, TypeError, "stepz"),
        ({"attacks": {"clean": {"name": "pgd"}}}, ValueError, "clean"),
        ({"attacks": {"a": {}}}, ValueError, "name"),
        ({"eps": -0.1}, ValueError, "eps"),
        ({"norm": "L3"}, ValueError, "L3"),
        ({"draws": 0}, ValueError, "draws"),
        ({"x": torch.full((2, 1, 8, 8), 2.0)}, ValueError, "pixels"),
        ({"x": torch.zeros(0, 1, 8, 8), "y": torch.zeros(0, dtype=torch.int64)}, ValueError, "at least 1"),
        ({"y": torch.tensor([0, 10])}, ValueError, "classes"),
        ({"model": nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.Softmax(1))}, ValueError, "probabilities"),
    ],
)
def test_bad_input_is_refused_before_the_first_step(cnn, monkeypatch, change, error, words):
    monkeypatch.setattr(adversarial_images, "attack", lambda *rest, **options: pytest.fail("an attack was started"))
    call = {"model": cnn, "attacks": ["pgd"], "x": torch.rand(2, 1, 8, 8), "y": torch.tensor([1, 2])} | change
    with pytest.raises(error, match=words):
        run(**call)


def test_a_surrogate_is_attacked_explicitly_and_its_passes_are_counted(cnn, images):
    """The images are the surrogate's own; the model is scored on them."""
    x, y = images
    weak = scaled_logits(cnn, 1e4)  # its gradients vanish
    settings = EvaluationSettings(eps=EPS, batch_size=16)
    plain, own = evaluate_attacks(weak, {"fgsm": {"name": "fgsm"}}, x, y, settings, progress=False)
    record, images = evaluate_attacks(weak, {"fgsm": {"name": "fgsm", "model": cnn}}, x, y, settings, progress=False)
    row = record["attacks"]["fgsm"]
    assert row["forward"] >= row["backward"] == row["attacked"] > 0
    assert row["options"]["model"].startswith("Sequential ")
    assert row["accuracy"] < plain["attacks"]["fgsm"]["accuracy"]
    correct = cnn(x).argmax(1) == y
    expected = attack("fgsm", cnn, x[correct], y[correct], EPS, progress=False)
    torch.testing.assert_close(images["fgsm"][correct], expected)
    assert torch.equal(images["fgsm"][~correct], x[~correct]) and not torch.equal(own["fgsm"], images["fgsm"])


def test_images_are_data_that_any_model_can_be_scored_on(dull):
    x, y = dull
    record, images = evaluate_attacks(
        Mean(), {"up": {"name": up}}, x, y, EvaluationSettings(eps=EPS, draws=2), progress=False
    )
    assert accuracy(Mean(), images["up"], y) == record["attacks"]["up"]["accuracy"]


def marks_of(record, label):
    return [text for text in record["warnings"] if label in text]


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_fault_01_the_record_is_the_same_inside_inference_mode(cnn, images, mode):
    attacks = ["pgd", "apgd-ce", "square"]
    attacks = {a: {"name": a} | ({"queries": 20} if a == "square" else {"steps": 10}) for a in attacks}

    def steep(model, x, y, eps, norm, generator):
        """An adaptive attack that relies on autograd being on."""
        point = x.clone().requires_grad_()
        torch.nn.functional.cross_entropy(model(point), y).backward()
        return (x + eps * point.grad.sign()).clamp(0, 1)

    attacks["own"] = {"name": steep}
    outside = run(cnn, attacks, *images)
    with mode():
        inside = run(cnn, attacks, *images)
        made_inside = run(cnn, attacks, *(t.clone() for t in images))
    assert timeless(inside) == timeless(made_inside) == timeless(outside)
    assert inside["robust"]["accuracy"] < 0.7 < inside["clean"]["accuracy"] and not inside["warnings"]
    assert inside["attacks"]["pgd"]["backward"] > 0 == inside["attacks"]["own"]["no_gradient"]


def test_fault_01_weights_of_inference_mode_are_refused_before_any_attack():
    with torch.inference_mode():
        model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    with pytest.raises(ValueError, match="inference"):
        run(model, ["pgd"], torch.rand(3, 1, 2, 2), torch.tensor([0, 1, 2]))


@pytest.mark.parametrize("defence", ["no_grad", "detached", "quantised input", "scaled logits"])
def test_fault_02_an_attack_that_got_no_gradient_is_marked(cnn, images, defence):
    record = run(BROKEN[defence](cnn), {"pgd": {"name": "pgd", "steps": 3}, "own": {"name": gradient_step}}, *images)
    for label in ("pgd", "own"):
        row = record["attacks"][label]
        assert row["no_gradient"] == row["attacked"] > 0
        assert any("got no gradient" in text for text in marks_of(record, label))


def gradient_step(model, x, y, eps, norm, generator):
    """An attack by `autograd.grad` that survives a model without a graph."""
    point = x.clone().requires_grad_()
    z = model(point)
    loss = torch.nn.functional.cross_entropy(z, y, reduction="sum")
    grad = torch.autograd.grad(loss, point, allow_unused=True)[0] if loss.requires_grad else None
    return x if grad is None else (x + eps * grad.sign()).clamp(0, 1)


def test_fault_02_gradients_are_counted_by_image_and_by_attack(cnn, images):
    """Images above a brightness have none; attacks that ask for none have no count."""
    x, y = images

    class Partly(nn.Module):
        def forward(self, x):
            bright = x.detach()[:, :, :2].mean((1, 2, 3)) > 0.15
            return torch.where(bright[:, None], cnn(x.detach()), cnn(x))

    right = cnn(x).argmax(1) == y
    blind = int((right & (x[:, :, :2].mean((1, 2, 3)) > 0.15)).sum())
    attacks = {"fgsm": {"name": "fgsm"}, "square": {"name": "square", "queries": 5}, "noise": {"name": "noise"}}
    record = run(Partly(), attacks, x, y)
    assert 0 < blind < right.sum() and record["attacks"]["fgsm"]["no_gradient"] == blind
    assert record["attacks"]["square"]["no_gradient"] is record["attacks"]["noise"]["no_gradient"] is None
    assert marks_of(record, f"fgsm got no gradient on {blind} of {int(right.sum())}")
    assert run(cnn, ["fgsm", "pgd"], x, y)["attacks"]["pgd"]["no_gradient"] == 0


def test_fault_02_a_surrogate_without_a_gradient_is_marked(cnn, images):
    attacks = {
        "far": {"name": "transfer", "surrogate": BROKEN["no_grad"](cnn), "steps": 3},
        "own": {"name": "pgd", "model": BROKEN["no_grad"](cnn), "steps": 3},
        "near": {"name": "transfer", "surrogate": cnn, "steps": 3},
    }
    record = run(cnn, attacks, *images)
    assert marks_of(record, "far got no gradient") and marks_of(record, "own got no gradient")
    assert not marks_of(record, "near got no gradient") and record["attacks"]["near"]["no_gradient"] == 0


def test_fault_02_the_threat_models_carry_the_mark(cnn, images):
    class Blind(nn.Module):
        evaluations = 1

        @torch.no_grad()
        def forward(self, x, randn_like=None):
            return x.clone()

    x, y = (t[:12] for t in images)
    budget = AttackBudget(steps=3, eot=2, draws=2, queries=5)
    blind, open_eyes = (PurifiedClassifier(p, cnn) for p in (Blind(), IdentityPurifier()))
    marks = evaluate_under_attack("exact", blind, x, y, eps=EPS, budget=budget)["marks"]
    assert any("exact got no gradient on" in text for text in marks)
    assert evaluate_under_attack("bpda", blind, x, y, eps=EPS, budget=budget)["marks"] == []
    assert evaluate_under_attack("exact", open_eyes, x, y, eps=EPS, budget=budget)["marks"] == []


def test_fault_33_an_answer_that_is_not_finite_is_wrong_and_counted(digits):
    """All images are of class 0, NaN's argmax; the model answers NaN, infinity or -infinity to those that moved."""
    x = torch.full((12, 1, 2, 2), 0.5)
    y = torch.zeros(12, dtype=torch.int64)
    for value in (float("nan"), float("inf"), -float("inf")):

        class Broken(nn.Module):
            def forward(self, x, value=value):
                moved = (x != 0.5).flatten(1).any(1)
                z = torch.stack([x.sum((1, 2, 3)), -x.sum((1, 2, 3))], 1)
                return z.masked_fill(moved[:, None], value)

        record = run(Broken(), {"noise": {"name": "noise", "draws": 3}, "up": {"name": up}}, x, y, draws=2)
        assert record["clean"]["accuracy"] == 1 and record["robust"]["accuracy"] == record["robust"]["worst_of_n"] == 0
        assert record["not_finite"] == {"clean": 0, "noise": 12, "up": 12}
        assert marks_of(record, "not finite on 12 images of up")


def test_fault_33_clean_answers_that_are_not_finite_are_counted_too(images, cnn):
    x, y = images
    bad = x[:, 0, 3, 3] > 0.9
    model = nn.Module()
    model.forward = lambda x: cnn(x).masked_fill((x[:, 0, 3, 3] > 0.9)[:, None], float("nan"))
    right = (cnn(x).argmax(1) == y) & ~bad
    record = run(model, ["fgsm"], x, y)
    assert record["not_finite"]["clean"] == int(bad.sum()) > 0
    assert record["clean"]["accuracy"] == pytest.approx(right.double().mean().item())
    assert marks_of(record, f"not finite on {int(bad.sum())} clean images")
    with pytest.raises(ValueError, match="NaN"):
        run(lambda x: cnn(x) * float("nan"), ["fgsm"], x, y)


@pytest.mark.parametrize("source", ["numpy", "random", "torch", "generator"])
def test_fault_08_a_random_defence_has_the_same_record_twice(cnn, images, source):
    own = np.random.default_rng(3)
    draw = {
        "numpy": lambda n: torch.from_numpy(np.random.randn(n, 10)).float(),
        "random": lambda n: torch.tensor([[random.gauss(0, 1) for _ in range(10)] for _ in range(n)]),
        "torch": lambda n: torch.randn(n, 10),
        "generator": lambda n: torch.from_numpy(own.standard_normal((n, 10))).float(),
    }[source]

    def model(x):
        return cnn(x) + 2 * draw(len(x))

    first, second = (run(model, {"pgd": {"name": "pgd", "steps": 3}}, *images, draws=2) for _ in range(2))
    assert timeless(first) == timeless(second)
    assert not marks_of(first, "under one seed")


def test_fault_08_noise_out_of_the_seeds_reach_is_marked(cnn, images):
    def model(x):
        return cnn(x) + torch.from_numpy(np.random.default_rng().standard_normal((len(x), 10))).float()

    record = run(model, ["fgsm"], *images, draws=2)
    assert marks_of(record, "does not repeat")
