"""Attacks by foolbox, adv-lib and ART, each as a function of a `Victim` and `eps`.

Only the environment of `make crosscheck` can import this. adv-lib imports torchvision (for LPIPS) and visdom (for live
plots), which no attack here needs and which do not fit every build of torch: empty modules replace both.
"""

import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

for unused in ("torchvision", "visdom"):
    sys.modules[unused] = ModuleType(unused)
sys.modules["torchvision"].models = None

import adv_lib.attacks as adv_lib  # noqa: E402, F401
import foolbox  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from art.attacks import evasion as art  # noqa: E402, F401
from art.estimators.classification import PyTorchClassifier  # noqa: E402
from torch import Tensor, nn  # noqa: E402

ORDER = {"L0": 0, "L2": 2, "Linf": float("inf")}


@dataclass(frozen=True)
class Victim:
    """A classifier with images, all of which it classifies correctly, and their labels."""

    model: nn.Module
    x: Tensor
    y: Tensor

    def distance(self, x_adv: Tensor, norm: str, eps: float | None) -> Tensor:
        """Return each adversarial image's distance; infinity where it is classified correctly or outside the ball."""
        distance = torch.linalg.vector_norm((x_adv - self.x).flatten(1), ORDER[norm], dim=1)
        broken = (self.model(x_adv).argmax(1) != self.y) & (distance <= (eps or torch.inf) * (1 + 1e-4))
        return torch.where(broken, distance, torch.inf)


IndependentAttack = Callable[[Victim, float | None], Tensor]


def seed_all() -> None:
    """Seed every generator that the three libraries draw from."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def by_foolbox(kind: Callable[..., Any], repeats: int = 1, **options: Any) -> IndependentAttack:
    """Return foolbox's attack `kind(**options)`, the best of `repeats` runs."""

    def run(victim: Victim, eps: float | None) -> Tensor:
        seed_all()
        model, instance = foolbox.PyTorchModel(victim.model, bounds=(0, 1), device="cpu"), kind(**options)
        instance = instance.repeat(repeats) if repeats > 1 else instance
        return instance(model, victim.x, victim.y, epsilons=eps)[1]

    return run


def by_adv_lib(function: Callable[..., Tensor], **options: Any) -> IndependentAttack:
    """Return adv-lib's attack `function`, whose fourth parameter is eps where it has one."""

    def run(victim: Victim, eps: float | None) -> Tensor:
        seed_all()
        return function(victim.model, victim.x, victim.y, *([] if eps is None else [eps]), **options).detach()

    return run


def by_art(kind: Callable[..., Any], **options: Any) -> IndependentAttack:
    """Return ART's attack `kind(classifier, **options)`."""

    def run(victim: Victim, eps: float | None) -> Tensor:
        seed_all()
        size = {"input_shape": tuple(victim.x.shape[1:]), "nb_classes": 10, "clip_values": (0.0, 1.0)}
        classifier = PyTorchClassifier(victim.model, nn.CrossEntropyLoss(), device_type="cpu", **size)
        instance = kind(classifier, **({} if eps is None else {"eps": eps}), **options)
        return torch.from_numpy(instance.generate(victim.x.numpy(), victim.y.numpy()))

    return run


def any_of(norm: str, *attacks: IndependentAttack) -> IndependentAttack:
    """Return the attack that runs all `attacks` and takes, per image, the first one that succeeds."""

    def run(victim: Victim, eps: float | None) -> Tensor:
        out = victim.x.clone()
        for attack in attacks:
            x_adv = attack(victim, eps)
            new = victim.distance(out, norm, eps).isinf() & victim.distance(x_adv, norm, eps).isfinite()
            out[new] = x_adv[new]
        return out

    return run
