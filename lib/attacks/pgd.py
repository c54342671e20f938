"""FGSM (Goodfellow et al. 2015) and projected gradient descent (Madry et al. 2018)."""

import torch

from lib.attacks.checks import check_model_output
from lib.attacks.common import (
    Images,
    Labels,
    LossName,
    Model,
    get_loss,
    goal_met,
    loss_and_grad,
    mean_logits,
    per_image,
    project,
    random_start,
    steepest_direction,
    step_size,
)
from lib.utils import per_image_rng
from lib.utils.validation import NonNegative, NonNegativeInt, Positive, PositiveInt


def fgsm(
    model: Model,
    x: Images,
    y: Labels,
    eps: float,
    norm: str = "Linf",
    seed: int = 0,
    *,
    loss: LossName = "ce",
    tau: Positive = 100.0,
) -> Images:
    """Take one step along the sign of the gradient (Goodfellow et al. 2015).

    The pass that computes the gradient also says which images are misclassified already: they stay as they are.

    Args:
        model: maps images to logits (n, k).
        x: images (n, c, h, w), in [0, 1].
        y: labels (n,).
        eps: length of the step, in pixel units.
        norm: "Linf".
        seed: unused: there is no randomness.
        loss: name of the loss, see `lib.attacks.common.get_loss`.
        tau: divisor of the logits for the loss "ce/tau".

    Returns:
        x + eps sign(gradient) in [0, 1], of the same shape.

    Raises:
        ValueError: if the model does not return logits.
    """
    z, _, grad = loss_and_grad(model, x, y, get_loss(loss, tau))
    check_model_output(z, len(x))
    return project(x + eps * grad.sign() * per_image((~goal_met(z, y)).to(x.dtype)), x, eps, norm)


def pgd(
    model: Model,
    x: Images,
    y: Labels,
    eps: float,
    norm: str = "Linf",
    seed: int = 0,
    *,
    steps: PositiveInt = 20,
    alpha: Positive | None = None,
    loss: LossName = "ce",
    tau: Positive = 100.0,
    start: bool = True,
    restarts: PositiveInt = 1,
    first: NonNegativeInt = 0,
    eot: PositiveInt = 1,
    momentum: NonNegative = 0.0,
    kappa: NonNegative = 0.0,
) -> Images:
    """Climb the loss by projected gradient steps until an image is misclassified (Madry et al. 2018).

    Images that are misclassified leave the batch. `lib.attacks.eot_pgd` is the variant that goes on.

    Args:
        model: maps images to logits (n, k).
        x: images (n, c, h, w), in [0, 1].
        y: labels (n,).
        eps: radius of the ball, in pixel units.
        norm: "Linf" or "L2".
        seed: decides the random starts, together with each image's pixels.
        steps: gradient steps of a restart.
        alpha: step size, in pixel units; `lib.attacks.common.step_size`, 2.5 eps / steps, when None.
        loss: name of the loss, see `lib.attacks.common.get_loss`.
        tau: divisor of the logits for the loss "ce/tau".
        start: whether to start at a random point of the ball, rather than at the image.
        restarts: number of random starts.
        first: number of the first of them, to go on where another run ended.
        eot: forward passes averaged for each gradient, one after the other (Athalye et al. 2018b), for random models.
        momentum: decay of the summed L1-normalised gradients (Dong et al. 2018), 0 for none.
        kappa: logit margin by which an image must be misclassified.

    Returns:
        Per image the first misclassified point, else the last one of the highest loss, of the same shape.
    """
    alpha = step_size(eps, steps) if alpha is None else alpha
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
                value, grad = criterion(z, label), velocity
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
