"""The plan of an evaluation: every attack of the list is checked before the model is passed an image."""

import numpy as np
import pytest
import torch
from torch import nn

from lib.evaluation import adversarial_images
from lib.evaluation.attack_plan import EvaluationSettings, attack_plan
from lib.evaluation.robust_accuracy import robust_accuracy
from lib.evaluation.sanity_checks import sanity_checks
from lib.evaluation.threat_models import AttackBudget, evaluate_under_attack
from lib.models import build_classifier, predict_classes
from lib.purify import IdentityPurifier, PurifiedClassifier

X, Y = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 3])


class Untouched(nn.Module):
    """A model that no image may reach."""

    def forward(self, x):
        pytest.fail("an image was passed")


def adaptive(model, x, y, eps, norm, generator, *, steps=1):
    return x


@pytest.mark.parametrize(
    "attacks, change, error, words",
    [
        (["pgd", "fgsm"], {"norm": "L2"}, ValueError, "'fgsm'.*no norm 'L2'"),
        (["pgd", "transfer"], {}, ValueError, "'transfer'.*surrogate"),
        ({"a": {"name": "cw"}, "b": {"name": "pgd"}}, {"eps": None}, ValueError, "'b'.*needs eps"),
        ({"a": {"name": "pgd"}, "b": {"name": "pgd", "eps": "8/255"}}, {}, ValueError, "'b'.*quotes"),
        ({"a": {"name": "pgd", "restarts": 0}}, {}, ValueError, "'a'.*restarts"),
        ({"a": {"name": adaptive, "stepz": 1}}, {}, TypeError, "'a'.*stepz"),
        ({"a": {"name": adaptive, "eps": -1}}, {}, ValueError, "'a'.*eps"),
        ({"a": {"name": lambda x: x}}, {}, TypeError, "'a'.*called as"),
        ({"a": {"name": "pgd", "model": "net"}}, {}, ValueError, "'a'.*model"),
        ({"a": {"name": "pgd", "batch_size": 0}}, {}, ValueError, "'a'.*batch_size"),
    ],
)
def test_fault_26_every_attack_of_a_list_is_checked_before_an_image_is_passed(attacks, change, error, words):
    with pytest.raises(error, match=words):
        robust_accuracy(Untouched(), attacks, X, Y, **{"eps": 0.1, "progress": False} | change)


def test_fault_26_classes_and_surrogates_are_checked_before_the_first_attack(monkeypatch):
    monkeypatch.setattr(adversarial_images, "attack", lambda *rest, **options: pytest.fail("an attack was started"))
    model = build_classifier("cnn", width=4, seed=0).eval()
    two, large = (build_classifier("cnn", width=4, seed=0, **o).eval() for o in ({"classes": 2}, {"size": 16}))
    few = {"x": X, "y": Y % 2}
    for network, attacks, data, words in (
        (two, ["pgd", "apgd-dlr"], few, "'apgd-dlr'.*3 classes"),
        (
            model,
            {"a": {"name": "pgd"}, "b": {"name": "transfer", "surrogate": two}},
            {"x": X, "y": Y},
            "'b'.*10 classes",
        ),
        (model, {"a": {"name": "pgd", "model": large}}, {"x": X, "y": Y}, "'a'.*for these images"),
        (model, {"a": {"name": "cw", "target": torch.tensor([99] * 4)}}, {"x": X, "y": Y}, "'a'.*target"),
    ):
        with pytest.raises(ValueError, match=words):
            robust_accuracy(network, attacks, **data, eps=0.1, progress=False)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"attacks": "pgd"}, r"got the text 'pgd': \['pgd'\]"),
        ({"attacks": None}, "list of names"),
        ({"attacks": {"pgd": "pgd"}}, "dict"),
        ({"attacks": {"a": {"name": "cw", "target": 3}}}, "target"),
        ({"eps": "8/255"}, "quotes"),
        ({"eps": float("nan")}, "eps"),
        ({"norm": ["L2"]}, "norm"),
        ({"draws": 2.5}, "draws"),
        ({"seed": "0"}, "seed"),
        ({"x": X.numpy()}, "torch.Tensor"),
        ({"y": Y.numpy()}, "tensor"),
        ({"y": [0, 1, 2, 3]}, "tensor"),
        ({"model": None}, "model"),
        ({"model": lambda x: (torch.zeros(len(x), 3), x)}, "tuple"),
        ({"model": lambda x: {"logits": x}}, "dict"),
    ],
)
def test_fault_28_other_types_are_refused_in_one_line(change, words):
    call = {"model": build_classifier("cnn", width=4, seed=0).eval(), "attacks": ["pgd"], "x": X, "y": Y, "eps": 0.1}
    with pytest.raises(ValueError, match=words) as caught:
        robust_accuracy(**call | change, progress=False)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"eps": "8/255"}, "quotes"),
        ({"x": X.numpy()}, "torch.Tensor"),
        ({"y": Y.numpy()}, "tensor"),
        ({"model": lambda x: (torch.zeros(len(x), 3), x)}, "tuple"),
        ({"seed": 0.5}, "seed"),
        ({"surrogate": 3}, "surrogate"),
    ],
)
def test_fault_28_so_they_are_by_the_sanity_checks_and_threat_models(change, words):
    model = build_classifier("cnn", width=4, seed=0).eval()
    with pytest.raises(ValueError, match=words):
        sanity_checks(**{"model": model, "x": X, "y": Y, "eps": 0.1} | change)
    if "model" not in change and "surrogate" not in change:
        defence = PurifiedClassifier(IdentityPurifier(), model)
        call = {"x": X, "y": Y, "eps": 0.1, "budget": AttackBudget(1, 1, draws=1)} | change
        with pytest.raises(ValueError, match=words):
            evaluate_under_attack("grey", defence, **call)
    with pytest.raises(TypeError, match="no option"):
        sanity_checks(model, X, Y, eps=0.1, epz=1)


def test_an_attack_without_effort_is_refused_in_a_threat_model():
    defence = PurifiedClassifier(IdentityPurifier(), build_classifier("cnn", width=4, seed=0).eval())
    for budget in (AttackBudget(0, 1), AttackBudget(1, 0), AttackBudget(1, 1, restarts=0)):
        with pytest.raises(ValueError, match="'exact'"):
            evaluate_under_attack("exact", defence, X, Y, eps=0.1, budget=budget)


def test_numbers_of_numpy_are_numbers_of_python_in_the_plan():
    plan = attack_plan({"a": {"name": "pgd", "steps": np.int64(3), "alpha": 0.01}}, EvaluationSettings(eps=0.1))
    assert plan == {"a": {"name": "pgd", "steps": 3, "alpha": 0.01}} and type(plan["a"]["steps"]) is int


def test_targets_go_with_their_images(cnn, digits):
    """A targeted attack is given the targets of the images that it attacks, batch by batch."""
    x, y = digits[0][-20:], digits[1][-20:]
    target = (predict_classes(cnn, x) + 1) % 10
    attacks = {"a": {"name": "cw", "target": target, "steps": 30, "searches": 2}}
    record = robust_accuracy(cnn, attacks, x, y, eps=None, batch_size=6, progress=False)
    assert record["attacks"]["a"]["success_rate"] > 0.5
