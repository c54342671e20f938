"""FGSM (Goodfellow et al. 2015) and projected gradient descent (Madry et al. 2018)."""

from collections.abc import Callable

import torch

from lib.attacks.checks import check_answers
from lib.attacks.common import (
    Images,
    Labels,
    Logits,
    Model,
    get_loss,
    goal_met,
    loss_and_grad,
    mean_logits,
    per_image,
    project,
    random_start,
    steepest_direction,
)
from lib.utils import per_image_rng


def fgsm(
    model: Model,
    x: Images,
    y: Labels,
    eps: float,
    norm: str = "Linf",
    seed: int = 0,
    *,
    loss: str = "ce",
    tau: float = 100.0,
) -> Images:
    """Returns x + eps sign(gradient of the loss, one of `lib.attacks.common.LOSSES`), in [0, 1] (Goodfellow et al. 2015).

    One pass says which images are misclassified already, too: they stay as they are.
    """
    z, _, grad = loss_and_grad(model, x, y, get_loss(loss, tau))
    check_answers(z, len(x))
    return project(x + eps * grad.sign() * per_image((~goal_met(z, y)).to(x.dtype)), x, eps, norm)


def pgd(
    model: Callable[[Images], Logits],
    x: Images,
    y: Labels,
    eps: float,
    norm: str = "Linf",
    seed: int = 0,
    *,
    steps: int = 20,
    alpha: float | None = None,
    loss: str = "ce",
    tau: float = 100.0,
    start: bool = True,
    restarts: int = 1,
    first: int = 0,
    eot: int = 1,
    momentum: float = 0.0,
    kappa: float = 0.0,
) -> Images:
    """Returns, per image, the first point that is misclassified (by `kappa`), else the last one of the highest loss.

    `alpha`: step size in pixel units, 2.5 eps / steps when None; `loss`: one of `LOSSES`; `start`: random start in the
    ball; `first`: number of the first of the `restarts`, to go on where another run ended; `eot`: forward passes
    averaged for each gradient (Athalye et al. 2018), for stochastic models; `momentum`: the decay of the summed
    L1-normalised gradients (Dong et al. 2018), 0 for none. Images that are done leave the batch.
    """
    alpha = 2.5 * eps / max(steps, 1) if alpha is None else alpha
    criterion = get_loss(loss, tau)
    x_adv, best = x.clone(), x.new_full((len(x),), -torch.inf)
    key, todo = per_image_rng.image_keys(x, seed), torch.arange(len(x), device=x.device)
    for restart in range(first, first + restarts):
        if not len(todo):
            break
        rows = todo
        point = random_start(x[rows], eps, norm, key[rows], restart) if start else x[rows]
        origin, label, velocity = x[rows], y[rows], torch.zeros_like(point)
        for step in range(steps + 1):
            if not len(rows):
                break
            if step < steps:
                z, value, grad = loss_and_grad(model, point, label, criterion, eot)
            else:
                z = mean_logits(model, point, eot)
                value = criterion(z, label)
            met = goal_met(z, label, kappa=kappa)
            better = (met | (value >= best[rows])).nonzero().squeeze(1)
            x_adv[rows[better]], best[rows[better]] = point[better], value[better]
            if step == steps:
                rows = rows[~met]
                break
            if met.any():
                on = ~met
                rows, point, origin, label = rows[on], point[on], origin[on], label[on]
                grad, velocity = grad[on], velocity[on]
            if momentum:
                velocity = momentum * velocity + grad / per_image(grad.flatten(1).abs().sum(1)).clamp_min(1e-30)
                grad = velocity
            point = project(point + alpha * steepest_direction(grad, norm), origin, eps, norm)
        todo = rows
    return x_adv
