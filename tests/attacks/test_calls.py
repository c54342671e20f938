"""Calls of attacks: every option has a type and a range, and what is no image, label or logit is refused."""

import numpy as np
import pytest
import torch
from torch import nn

from lib.attacks.api import REGISTRY, attack, attack_options, check_call, check_classes
from tests.attacks.calls import cheap, run

IDLE = {
    "steps": (0, -5, 10.0, "10", True, None, float("nan")),
    **dict.fromkeys(("restarts", "eot", "targets", "queries", "draws", "searches"), (0, -1, 2.0, "2", True)),
    "classes": (0, 1, 3.0),
    "first": (-1, 1.0),
    "alpha": (0, -0.1, float("nan"), float("inf"), "0.1"),
    **dict.fromkeys(("c", "lr", "tau"), (0, -1.0, float("inf"), "1", None)),
    **dict.fromkeys(("kappa", "confidence", "overshoot", "momentum"), (-0.1, float("nan"), float("inf"), "1")),
    **dict.fromkeys(("p", "gamma"), (0, -0.1, 1.1, float("nan"))),
    "rho": (-0.1, 1.1, float("nan")),
    "theta": (0, 1.5, -1.5, float("nan")),
    **dict.fromkeys(("abort", "start"), (1, "yes", None)),
    "loss": ("hinge", None, 3),
    "by": ("fgsm", None),
    "surrogate": (None, 3, "net"),
}
CASES = [
    (name, option, value)
    for name in REGISTRY
    for option in attack_options(name)
    for value in IDLE.get(option, ())
    if not (name.startswith("jsma") and option == "targets" and value is None)
]


def test_every_option_has_a_range_that_is_tested():
    assert {option for name in REGISTRY for option in attack_options(name)} - {"target"} == set(IDLE)


def test_fault_06_32_options_without_effort_are_refused():
    """A call is refused by the option's name before the model is called: it has none here."""
    for name, option, value in CASES:
        options = {"surrogate": nn.Identity()} if name == "transfer" else {}
        with pytest.raises(ValueError, match=f"^expected {name}'s {option} to be .*, got "):
            check_call(name, 0.1, None, options | {option: value})


@pytest.mark.parametrize(
    "name, options",
    [
        ("pgd", {"restarts": 0}),
        ("pgd", {"steps": -5}),
        ("pgd", {"steps": 10.0}),
        ("pgd", {"alpha": 0.0}),
        ("eotpgd", {"eot": 0}),
        ("apgd-t", {"targets": 0}),
        ("cw", {"searches": 0}),
        ("noise", {"draws": 0}),
        ("deepfool", {"classes": 1}),
        ("square", {"queries": 0}),
        *((name, {"steps": 0}) for name in ("apgd-ce", "fab-t", "cw", "deepfool")),
    ],
)
def test_fault_06_32_attack_refuses_no_effort_itself(name, options, cnn, points):
    with pytest.raises(ValueError, match=f"expected {name}'s {next(iter(options))} to be"):
        cheap(name, cnn, *points, **options)


@pytest.mark.parametrize("options", [{"gamma": 0.02}, {"eps": 1}])
def test_fault_06_jsma_without_a_pair_of_values_is_refused(options, cnn, points):
    with pytest.raises(ValueError, match="expected jsma to have at least 2 values to change, got 1"):
        run("jsma-z", cnn, *points, **options)


def test_numbers_of_numpy_and_tensors_are_numbers(cnn, points):
    options = {"steps": np.int64(3), "alpha": np.float32(0.05), "restarts": torch.tensor(1)}
    plain = run("pgd", cnn, *points, 0.1, steps=3, alpha=float(np.float32(0.05)), restarts=1)
    assert torch.equal(run("pgd", cnn, *points, np.float64(0.1), **options), plain)


@pytest.mark.parametrize("name, options", [("apgd-dlr", {}), ("autoattack-rand", {}), ("pgd", {"loss": "dlr"})])
def test_fault_06_too_few_classes_are_refused_before_the_first_step(name, options, cnn, points):
    x, y = points
    with pytest.raises(ValueError, match=f"{name} expected at least 3 classes"):
        run(name, lambda x: cnn(x)[:, :2], x, y % 2, 0.1, **options)
    check_classes(name, options, 3)
    check_classes("apgd-t", {}, 2)


ANSWERS = {
    "tuple": (lambda z: (z, z), "got tuple: attack a function that returns the tensor alone"),
    "dict": (lambda z: {"logits": z}, "got dict"),
    "numpy": (lambda z: z.detach().numpy(), "got ndarray"),
    "None": (lambda z: None, "got NoneType"),
    "classes": (lambda z: z.argmax(1), r"expected logits \(12, classes >= 2\) .* got \(12,\)"),
    "one-hot": (lambda z: (z == z.amax(1, keepdim=True)).long(), "expected floating-point logits .*got torch.int64"),
}


@pytest.mark.parametrize("answer", ANSWERS)
def test_fault_28_answers_that_are_no_logits_are_refused(answer, cnn, points):
    change, message = ANSWERS[answer]
    with pytest.raises(ValueError, match=message):
        run("pgd", lambda x: change(cnn(x)), *points, 0.1)


def test_fault_28_an_answer_of_another_shape_later_is_refused(cnn, points):
    with pytest.raises(ValueError, match=r"expected logits \(1, 10\) from the model, got \(10,\) for 1 images"):
        run("pgd", lambda x: cnn(x).squeeze(0), *points, 0.1, batch_size=11)
    growing = lambda x: cnn(x).repeat(1, 1 + (len(x) < 8))  # noqa: E731
    with pytest.raises(ValueError, match=r"expected logits \(4, 10\) from the model, got \(4, 20\)"):
        run("pgd", growing, *points, 0.1, batch_size=8)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": lambda x: x.numpy()}, "images must be a floating-point NCHW torch.Tensor, got ndarray"),
        ({"y": lambda y: y.numpy()}, r"expected y to be a tensor with one class for each image, got .*\(ndarray\)"),
        ({"y": lambda y: y.tolist()}, r"expected y to be a tensor .*\(list\)"),
        ({"eps": lambda _: "8/255"}, "expected eps to be a finite number >= 0 or None, got '8/255'.*without quotes"),
        ({"name": lambda _: 3}, "unknown attack 3: choose one of"),
        ({"name": lambda _: ["pgd"]}, "unknown attack .'pgd'.: choose one of"),
        ({"model": lambda _: 3}, "expected model to be a Callable, got 3"),
        ({"generator": lambda _: 0}, "expected generator to be a Generator or None, got 0"),
        ({"mode": lambda _: 1}, "expected mode to be one of 'eval', 'keep', got 1"),
    ],
)
def test_fault_28_calls_of_the_wrong_type_are_refused_in_one_line(change, message, cnn, points):
    call = {"name": "pgd", "model": cnn, "x": points[0], "y": points[1], "eps": 0.1, "generator": None, "mode": "eval"}
    call |= {k: f(call[k]) for k, f in change.items()}
    with pytest.raises(ValueError, match=message):
        attack(**call, progress=False)


def test_fault_28_a_target_for_all_images_is_refused(cnn, points):
    with pytest.raises(
        ValueError, match=r"expected target to be a tensor with one class for each image, got 3 \(int\)"
    ):
        run("cw", cnn, *points, target=3)
