"""Cheap calls of every attack, for tests of what all of them share."""

import torch

from lib.attacks.api import REGISTRY, attack
from lib.models import build_classifier
from tests.attacks.test_attack_properties import CHEAP, EPS

SURROGATE = build_classifier("cnn", width=4, seed=3)
DISTINCT = [name for name in REGISTRY if name not in ("eotpgd", "apgd-dlr", "autoattack", "autoattack-rand", "jsma-f")]
GRADIENT = [name for name in (*DISTINCT, "autoattack") if name not in ("square", "noise", "transfer")]


def run(name, model, x, y, eps=None, norm=None, **options):
    return attack(name, model, x, y, eps, norm, progress=False, **options)


def cheap(name, model, x, y, **options):
    """Runs an attack in its first norm with little effort."""
    more = {"surrogate": SURROGATE} if name == "transfer" else {}
    norm = REGISTRY[name].norms[0]
    return run(name, model, x, y, EPS[norm], norm, **CHEAP.get(name, {}) | more | options)


def right(model, x, y):
    """The share of images that a model classifies correctly."""
    with torch.no_grad():
        return (model(x).argmax(1) == y).double().mean().item()
