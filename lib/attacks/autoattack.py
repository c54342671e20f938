"""AutoAttack's two ensembles (Croce and Hein 2020a): attacks in turn, each on the images that resisted so far."""

from collections.abc import Callable
from functools import partial

import torch

from lib.attacks.apgd import apgd, apgd_targeted
from lib.attacks.common import Images, Labels, Model, goal_met
from lib.attacks.fab import fab_t
from lib.attacks.square import square
from lib.utils.seeds import derive_seed
from lib.utils.validation import PositiveInt


def run_in_turn(
    model: Model, x: Images, y: Labels, eps: float, norm: str, seed: int, *, parts: dict[str, Callable]
) -> Images:
    """Run several attacks in turn, each on those images that resisted the ones before it.

    Args:
        model: maps images to logits (n, k).
        x: images (n, c, h, w), in [0, 1].
        y: labels (n,).
        eps: radius of the ball, in pixel units.
        norm: "Linf" or "L2".
        seed: each part's own seed is derived from it and the part's name.
        parts: the attacks by their names, in order.

    Returns:
        Per image the point of the first attack that succeeded, else the last one's, of the same shape.
    """
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
    steps: PositiveInt = 100,
    targets: PositiveInt = 9,
    queries: PositiveInt = 5000,
) -> Images:
    """Run AutoAttack's standard version: APGD-CE, APGD-T, FAB-T and Square in turn (Croce and Hein 2020a).

    Args:
        model: maps images to logits (n, k).
        x: images (n, c, h, w), in [0, 1].
        y: labels (n,).
        eps: radius of the ball, in pixel units.
        norm: "Linf" or "L2".
        seed: decides the randomness of all parts.
        steps: of APGD-CE, APGD-T and FAB-T; the official number is 100.
        targets: classes of APGD-T and FAB-T; the official number is 9.
        queries: of Square; the official number is 5000.

    Returns:
        Per image the point of the first attack that succeeded, else Square's, of the same shape.

    Raises:
        ImportError: if an image is left for FAB-T and torchattacks is missing.
    """
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
    steps: PositiveInt = 100,
    eot: PositiveInt = 20,
) -> Images:
    """Run AutoAttack's version for random models: APGD-CE, then APGD-DLR, on averaged gradients (Croce and Hein 2020a).

    Args:
        model: maps images to logits (n, k).
        x: images (n, c, h, w), in [0, 1].
        y: labels (n,).
        eps: radius of the ball, in pixel units.
        norm: "Linf" or "L2".
        seed: decides the randomness of both parts.
        steps: of each part; the official number is 100.
        eot: forward passes averaged for each gradient; the official number is 20.

    Returns:
        Per image the point of the first attack that succeeded, else APGD-DLR's, of the same shape.

    Raises:
        ValueError: below three classes, where the DLR loss is constant.
    """
    parts = {f"apgd-{loss}": partial(apgd, loss=loss, steps=steps, eot=eot) for loss in ("ce", "dlr")}
    return run_in_turn(model, x, y, eps, norm, seed, parts=parts)
