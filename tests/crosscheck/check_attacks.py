"""Our attacks against those of foolbox, adv-lib and ART: same classifier, images, eps, steps, step size and restarts.

An attack in a ball is as strong as few images are still classified correctly; an attack of minimal distance is as
strong as its median distance is small. Each test adds one line to the report of `tests.crosscheck.run`.
"""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from lib.attacks.api import attack
from tests.crosscheck.independent import (
    ORDER,
    IndependentAttack,
    Victim,
    adv_lib,
    any_of,
    art,
    by_adv_lib,
    by_art,
    by_foolbox,
    foolbox,
)

TOLERANCE = 2  # images of 128 that an independent attack may break beyond ours: random starts differ
STEPS, RESTARTS = 50, 5
BATCH = {"batch_size": 128, "verbose": False}


@dataclass(frozen=True)
class Comparison:
    """One of our attacks with its options, and independent ones; `slack`: by how much our median distance may exceed
    theirs, as a share, for attacks without a ball; `reason` not to count the line."""

    name: str
    norm: str
    eps: float | None
    options: dict[str, Any]
    others: dict[str, IndependentAttack]
    slack: float = 0.0
    reason: str = ""

    def __str__(self) -> str:
        eps = "" if self.eps is None else f" {self.eps:g}"
        return f"{self.name} {self.norm}{eps}"


def in_the_ball(norm: str, eps: float) -> list[Comparison]:
    """Return the comparisons of all attacks in the `norm` ball of radius `eps`."""
    p, alpha = ORDER[norm], eps / 8
    size = {"norm": p, "max_iter": STEPS, "nb_random_init": RESTARTS, "eps_step": 2 * eps, **BATCH}
    runs = {"norm": p, "n_iter": STEPS, "n_restarts": RESTARTS}
    fab = by_fab(norm)
    pgd = {
        "foolbox": by_foolbox(getattr(foolbox.attacks, f"{norm}PGD"), RESTARTS, steps=20, abs_stepsize=alpha),
        "ART": by_art(
            art.ProjectedGradientDescentPyTorch, norm=p, max_iter=20, num_random_init=RESTARTS, eps_step=alpha, **BATCH
        ),
    }
    if norm == "Linf":
        pgd["adv-lib"] = by_adv_lib(adv_lib.pgd_linf, steps=20, absolute_step_size=alpha, restarts=RESTARTS)
    apgd = {
        loss: {
            "adv-lib": by_adv_lib(adv_lib.apgd, loss_function=loss, **runs),
            "ART": by_art(art.AutoProjectedGradientDescent, loss_type=loss_type, **size),
        }
        for loss, loss_type in (("ce", "cross_entropy"), ("dlr", "difference_logits_ratio"))
    }
    targeted = by_adv_lib(adv_lib.apgd_targeted, norm=p, n_iter=STEPS)
    square = by_art(art.SquareAttack, norm=p, max_iter=300, **BATCH)
    ensemble = any_of(norm, by_adv_lib(adv_lib.apgd, loss_function="ce", norm=p, n_iter=STEPS), targeted, fab, square)
    restarts = {"steps": STEPS, "restarts": RESTARTS}
    return [
        Comparison("pgd", norm, eps, {"steps": 20, "alpha": alpha, "restarts": RESTARTS}, pgd),
        Comparison("apgd-ce", norm, eps, restarts, apgd["ce"]),
        Comparison("apgd-dlr", norm, eps, restarts, apgd["dlr"]),
        Comparison("apgd-t", norm, eps, {"steps": STEPS}, {"adv-lib": targeted}),
        Comparison("fab-t", norm, eps, {"steps": STEPS}, {"adv-lib": fab}),
        Comparison("square", norm, eps, {"queries": 300}, {"ART": square}),
        Comparison("autoattack", norm, eps, {"steps": STEPS, "queries": 300}, {"the same four": ensemble}),
    ]


def by_fab(norm: str) -> IndependentAttack:
    """Return adv-lib's FAB, towards each of nine classes."""
    options = {"norm": ORDER[norm], "n_iter": STEPS, "restarts": 9, "targeted_restarts": True}
    return lambda victim, eps: by_adv_lib(adv_lib.fab, ε=eps, **options)(victim, None)


def by_saliency(softmax: bool) -> IndependentAttack:
    """Return ART's JSMA towards each of nine classes, on probabilities or on logits.

    ART takes the two largest gradients of the target's output: Papernot's map on probabilities, whose sum is constant.
    It begins another pair while at most gamma of the d values have changed: eps values need gamma = (eps - 2) / d.
    """

    def towards(offset: int) -> IndependentAttack:
        def run(victim: Victim, eps: float | None) -> torch.Tensor:
            gamma = (eps - 2) / victim.x[0].numel()
            model = nn.Sequential(victim.model, nn.Softmax(1)) if softmax else victim.model
            targets = Victim(model, victim.x, (victim.y + offset) % 10)
            return by_art(art.SaliencyMapMethod, theta=1.0, gamma=gamma, **BATCH)(targets, None)

        return run

    return any_of("L0", *(towards(offset) for offset in range(1, 10)))


COMPARISONS = [
    Comparison(
        "fgsm",
        "Linf",
        0.15,
        {},
        {
            "foolbox": by_foolbox(foolbox.attacks.LinfFastGradientAttack),
            "ART": by_art(art.FastGradientMethod, norm=ORDER["Linf"], batch_size=128),
        },
    ),
    *in_the_ball("Linf", 0.15),
    *in_the_ball("L2", 0.8),
    # in float32 the gradients of the other classes' probabilities cancel to noise, which moves the pairs' ranks
    Comparison("jsma-f", "L0", 4, {}, {"ART": by_saliency(softmax=True)}),
    Comparison(
        "jsma-z", "L0", 4, {}, {"ART": by_saliency(softmax=False)}, reason="ART leaves the other classes' logits out"
    ),
    Comparison(
        "deepfool",
        "L2",
        None,
        {"steps": 50},
        {
            "foolbox": by_foolbox(foolbox.attacks.L2DeepFoolAttack, steps=50),
            "adv-lib": by_adv_lib(adv_lib.df, steps=50),
            "ART": by_art(art.DeepFool, max_iter=50, epsilon=0.02, **BATCH),
        },
        slack=0.02,
    ),
    Comparison(
        "cw",
        "L2",
        None,
        {"steps": 200, "lr": 0.05},
        {
            "foolbox": by_foolbox(foolbox.attacks.L2CarliniWagnerAttack, steps=200, stepsize=0.05, initial_const=1.0),
            "adv-lib": by_adv_lib(adv_lib.carlini_wagner_l2, max_iterations=200, learning_rate=0.05, initial_const=1.0),
        },
        slack=0.02,
    ),
    Comparison(
        "cw", "L2", None, {"steps": 200}, {"adv-lib's DDN": by_adv_lib(adv_lib.ddn, steps=300, levels=None)}, slack=0.05
    ),
]


@pytest.mark.parametrize("comparison", COMPARISONS, ids=str)
def test_ours_is_as_strong_as_independent_attacks(comparison, victim, record_property):
    name, norm, eps = comparison.name, comparison.norm, comparison.eps
    x_adv = attack(name, victim.model, victim.x, victim.y, eps, norm, progress=False, **comparison.options)
    assert x_adv.min() >= 0 and x_adv.max() <= 1
    size = torch.linalg.vector_norm((x_adv - victim.x).flatten(1), ORDER[norm], dim=1)
    assert eps is None or size.max() <= eps * (1 + 1e-5) + 1e-6

    def strength(x_adv: torch.Tensor) -> tuple[int, float]:
        distance = victim.distance(x_adv, norm, eps)
        return int(distance.isinf().sum()), distance.median().item()

    def words(who: str, left: int, median: float) -> str:
        return f"{who} {left}/{len(size)}" + (f" (median distance {median:.4f})" if eps is None else "")

    ours = strength(x_adv)
    others = {who: strength(run(victim, eps)) for who, run in comparison.others.items()}
    line = ", ".join([words("ours leaves", *ours), *(words(who, *result) for who, result in others.items())])
    record_property(
        "line", f"{comparison}: {line}" + (f" (not counted: {comparison.reason})" if comparison.reason else "")
    )
    if comparison.reason:
        record_property("uncounted", str(comparison))
        return
    for left, median in others.values():
        record_property("images", ours[0] - left)
        if eps is None:
            record_property("distance", ours[1] / median - 1)
    assert ours[0] <= min(left for left, _ in others.values()) + TOLERANCE, line
    assert eps is not None or ours[1] <= (1 + comparison.slack) * min(median for _, median in others.values()), line


def test_fgsm_makes_the_same_images(victim):
    x_adv = attack("fgsm", victim.model, victim.x, victim.y, 0.15, progress=False)
    for who, run in COMPARISONS[0].others.items():
        torch.testing.assert_close(x_adv, run(victim, 0.15), atol=1e-6, rtol=0, msg=who)
