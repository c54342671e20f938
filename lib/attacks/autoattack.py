"""AutoAttack's two ensembles (Croce and Hein 2020): attacks in turn, each on the images that resisted so far."""

from collections.abc import Callable
from functools import partial

import torch

from lib.attacks.apgd import apgd, apgd_targeted
from lib.attacks.common import Images, Labels, Model, goal_met
from lib.attacks.fab import fab_t
from lib.attacks.square import square
from lib.utils.seeds import derive_seed


def run_in_turn(
    model: Model, x: Images, y: Labels, eps: float, norm: str, seed: int, *, parts: dict[str, Callable]
) -> Images:
    """Returns the points of several attacks in a row, each on those images that resisted the ones before it."""
    x_adv, todo = x.clone(), torch.arange(len(x), device=x.device)
    for name, run in parts.items():
        if not len(todo):
            break
        x_adv[todo] = run(model, x[todo], y[todo], eps, norm, derive_seed(seed, name))
        with torch.no_grad():
            todo = todo[~goal_met(model(x_adv[todo]), y[todo])]
    return x_adv


def autoattack(
    model: Model,
    x: Images,
    y: Labels,
    eps: float,
    norm: str = "Linf",
    seed: int = 0,
    *,
    steps: int = 100,
    targets: int = 9,
    queries: int = 5000,
) -> Images:
    """Returns the points of AutoAttack's standard version (Croce and Hein 2020): four attacks, one restart each."""
    parts = {
        "apgd-ce": partial(apgd, loss="ce", steps=steps),
        "apgd-t": partial(apgd_targeted, steps=steps, targets=targets),
        "fab-t": partial(fab_t, steps=steps, targets=targets),
        "square": partial(square, queries=queries),
    }
    return run_in_turn(model, x, y, eps, norm, seed, parts=parts)


def autoattack_rand(
    model: Model,
    x: Images,
    y: Labels,
    eps: float,
    norm: str = "Linf",
    seed: int = 0,
    *,
    steps: int = 100,
    eot: int = 20,
) -> Images:
    """Returns the points of AutoAttack's version for stochastic models: APGD-CE, then APGD-DLR, gradients averaged."""
    parts = {f"apgd-{loss}": partial(apgd, loss=loss, steps=steps, eot=eot) for loss in ("ce", "dlr")}
    return run_in_turn(model, x, y, eps, norm, seed, parts=parts)
