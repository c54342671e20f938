"""Ours against foolbox and ART on the same model, points, eps and steps; runs with the extra `crosscheck`."""

import warnings

import pytest
import torch
from torch import nn

from lib.attacks.api import attack
from lib.attacks.checks import perturbation_norm

MISSING = "is not installed: pip install 'distilled-defence[crosscheck]'"
PAIRS = [("pgd", "Linf", 0.1), ("pgd", "L2", 0.5), ("cw", "L2", None)]


@pytest.fixture(scope="module")
def points(digits, shared_cnn):
    """100 digits that the CNN has right."""
    x, y = (t[-200:] for t in digits)
    right = (shared_cnn(x).argmax(1) == y).nonzero().squeeze(1)[:100]
    return x[right], y[right]


def compare(cnn, x, y, name, norm, eps, theirs, **options):
    """Asserts: accuracy left not higher by more than 1 point; mean distance of cw not by more than 2 %."""
    ours = attack(name, cnn, x, y, eps, norm, progress=False, **options)
    broken = [cnn(a).argmax(1) != y for a in (ours, theirs)]
    left = [100 * (1 - b.double().mean().item()) for b in broken]
    both = broken[0] & broken[1]
    pair = [perturbation_norm(a, x, "L2")[both].mean().item() for a in (ours, theirs)]
    print(f"{name} {norm}: accuracy left {left[0]:.1f} ours, {left[1]:.1f} theirs; L2 {pair[0]:.4f}, {pair[1]:.4f}")
    assert both.any() and left[0] <= left[1] + 1
    if eps is None:
        assert pair[0] <= 1.02 * pair[1]
    else:
        assert perturbation_norm(theirs, x, norm).max() <= eps * 1.001


@pytest.mark.parametrize("name, norm, eps", PAIRS)
def test_ours_are_at_least_as_strong_as_foolbox(name, norm, eps, cnn, points):
    foolbox = pytest.importorskip(
        "foolbox", reason="foolbox is not installed: pip install 'distilled-defence[crosscheck]'"
    )
    x, y = points
    model = foolbox.PyTorchModel(cnn, bounds=(0, 1), device="cpu")
    torch.manual_seed(0)
    kinds = {
        ("pgd", "Linf"): (foolbox.attacks.LinfPGD, {"steps": 20, "abs_stepsize": 0.0125}),
        ("pgd", "L2"): (foolbox.attacks.L2PGD, {"steps": 20, "abs_stepsize": 0.0625}),
        ("cw", "L2"): (
            foolbox.attacks.L2CarliniWagnerAttack,
            {"steps": 100, "binary_search_steps": 9, "stepsize": 0.05},
        ),
    }
    kind, options = kinds[name, norm]
    theirs = kind(**options)(model, x, y, epsilons=eps)[1]
    options = {"steps": 100, "searches": 9} if name == "cw" else {"steps": 20}
    compare(cnn, x, y, name, norm, eps, theirs, **options)


@pytest.mark.parametrize("name, norm, eps", [*PAIRS, ("autoattack", "Linf", 0.1)])
def test_ours_are_at_least_as_strong_as_art(name, norm, eps, cnn, points):
    pytest.importorskip("art", reason=f"ART {MISSING}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from art.attacks import evasion
        from art.estimators.classification import PyTorchClassifier
    x, y = points if name != "cw" else (t[:25] for t in points)  # ART's line search: 2 s per step and search
    size = {"input_shape": (1, 8, 8), "nb_classes": 10, "clip_values": (0.0, 1.0), "device_type": "cpu"}
    victim = PyTorchClassifier(cnn, nn.CrossEntropyLoss(), **size)
    order = 2 if norm == "L2" else float("inf")
    step = {"eps_step": 0.0125 if norm == "Linf" else 0.0625}
    if name == "pgd":
        kind = evasion.ProjectedGradientDescentPyTorch
        raw = kind(victim, norm=order, eps=eps, max_iter=20, num_random_init=1, verbose=False, **step)
    elif name == "cw":
        raw = evasion.CarliniL2Method(victim, max_iter=50, binary_search_steps=9, verbose=False, batch_size=100)
    else:
        kinds = ("cross_entropy", "difference_logits_ratio")
        apgd = evasion.AutoProjectedGradientDescent
        some = {"norm": order, "eps": eps, "max_iter": 20, "nb_random_init": 1, "verbose": False}
        parts = [apgd(victim, loss_type=kind, eps_step=2 * eps, **some) for kind in kinds]
        raw = evasion.AutoAttack(victim, norm=order, eps=eps, eps_step=2 * eps, attacks=parts)
    theirs = torch.from_numpy(raw.generate(x.numpy(), y.numpy()))
    options = {"pgd": {"steps": 20}, "cw": {"steps": 50}, "autoattack": {"steps": 20, "queries": 200}}[name]
    compare(cnn, x, y, name, norm, eps, theirs, **options)
