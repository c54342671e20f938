"""Architectures: published sizes, shapes, seeding, normalisation inside."""

import pytest
import torch

from lib.models import (
    ARCHITECTURES,
    NO_CLASS,
    Ensemble,
    build_classifier,
    count_parameters,
    logit_accuracy,
    most_likely,
)


@pytest.mark.parametrize(
    ("arch", "count"), [("resnet18", 11_173_962), ("resnet34", 21_282_122), ("resnet50", 23_520_842), ("cnn", 117_930)]
)
def test_parameters(arch, count):
    assert count_parameters(build_classifier(arch, in_channels=3, size=32, seed=0)) == count


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(("channels", "size"), [(1, 8), (1, 28), (3, 32)])
def test_shapes(arch, channels, size):
    model = build_classifier(arch, in_channels=channels, size=size, classes=7, width=4, seed=0).eval()
    assert model(torch.rand(2, channels, size, size)).shape == (2, 7)


def test_the_seed_alone_decides_the_weights_and_the_global_state_stays():
    before = torch.get_rng_state()
    a, b, c = (build_classifier("cnn", width=4, seed=s).state_dict() for s in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(a["1.weight"], c["1.weight"])


def test_unknown_architecture_is_refused_with_the_list():
    with pytest.raises(ValueError, match=r"'cnn', 'resnet18', 'resnet34', 'resnet50', got 'vgg'"):
        build_classifier("vgg", seed=0)


def test_ensemble_means():
    members = [build_classifier("cnn", width=4, seed=s).eval() for s in (0, 1)]
    x = torch.rand(3, 1, 8, 8)
    z = torch.stack([m(x) for m in members])
    torch.testing.assert_close(Ensemble(members)(x), z.mean(0))
    torch.testing.assert_close(Ensemble(members, "probabilities")(x).exp(), z.softmax(-1).mean(0))
    with pytest.raises(ValueError, match="'votes'"):
        Ensemble(members, "votes")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 0}, "expected width to be an integer >= 1 or None, got 0"),
        ({"width": -4}, "expected width to be an integer >= 1 or None, got -4"),
        ({"in_channels": 0}, "expected in_channels to be an integer >= 1, got 0"),
        ({"size": 0}, "expected size to be an integer >= 1, got 0"),
        ({"classes": 1}, "expected classes to be an integer >= 2, got 1"),
        ({"dropout": 1.0}, "expected dropout to be a finite number >= 0 and < 1, got 1.0"),
        ({"dropout": -0.1}, "expected dropout to be a finite number >= 0 and < 1, got -0.1"),
        ({"dropout": float("nan")}, "expected dropout to be a finite number >= 0 and < 1, got nan"),
        ({"arch": "resnet18", "dropout": 0.3}, "expected dropout 0 for resnet18, got 0.3: only cnn has it"),
    ],
)
def test_fault_44_numbers_that_no_network_has_are_refused(options, message):
    with pytest.raises(ValueError) as error:
        build_classifier(**({"arch": "cnn", "seed": 0} | options))
    assert str(error.value) == message


def test_a_logit_that_is_not_finite_makes_an_answer_of_no_class_in_one_draw_and_in_several():
    z = torch.tensor([[2.0, 1.0], [torch.nan, 1.0], [0.0, torch.inf], [-torch.inf, 1.0], [0.0, 1.0]])
    classes = torch.tensor([0, NO_CLASS, NO_CLASS, NO_CLASS, 1])
    assert torch.equal(most_likely(z), classes)
    assert torch.equal(most_likely(torch.stack([z, z[:, [1, 0]]]))[0], classes)
    y = torch.tensor([0, 0, 1, 1, 1])
    assert logit_accuracy(z, y) == 0.4 and logit_accuracy(torch.stack([z, -z]), y) == 0.2
