"""Auto-PGD, untargeted and targeted (Croce and Hein 2020a): PGD that halves its step size where progress stops.

Every state below belongs to one image, so that an image's path does not depend on its batch.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lib.attacks.common import (
    Images,
    Labels,
    Loss,
    LossName,
    Model,
    dlr_targeted,
    get_loss,
    goal_met,
    l2_norm,
    loss_and_grad,
    mean_logits,
    per_image,
    project,
    steepest_direction,
)
from lib.utils import per_image_rng
from lib.utils.validation import Positive, PositiveInt, Share


def _surface_start(x: Images, eps: float, norm: str, key: Tensor, draw: int) -> Images:
    """Return random points on the surface of the eps-ball, clamped to [0, 1]: APGD's start."""
    if norm == "Linf":
        delta = 2 * per_image_rng.uniform(key, draw, *x.shape[1:]).to(x.dtype) - 1
        delta = delta / per_image(delta.flatten(1).abs().amax(1)).clamp_min(1e-12)
    else:
        delta = per_image_rng.normal(key, draw, *x.shape[1:]).to(x.dtype)
        delta = delta / l2_norm(delta).clamp_min(1e-12)
    return project(x + eps * delta, x, eps, norm)


def step_checkpoints(steps: int) -> set[int]:
    """Return the iterations after which the step size is reconsidered (Croce and Hein 2020a, section 3)."""
    period, floor, shrink = (max(int(share * steps), 1) for share in (0.22, 0.06, 0.03))
    checkpoints, last = set(), 0
    while last + period <= steps:
        last += period
        checkpoints.add(last)
        period = max(period - shrink, floor)
    return checkpoints


def _apgd_run(
    model: Model,
    x: Images,
    y: Labels,
    eps: float,
    norm: str,
    start: Images,
    loss: Callable[[Tensor], Loss],
    steps: int,
    eot: int,
    rho: float,
) -> tuple[Images, Tensor]:
    """Return the points of one run (misclassified, or of the highest loss) and which are misclassified.

    `loss(rows)` is the loss of the images `rows` (it may hold their targets), maximised from `start`: algorithm 1 of
    the paper, where `step` is η, `best` x_max, `high` f_max and `rho` ρ.
    """
    out, broken = start.clone(), torch.zeros_like(y, dtype=torch.bool)
    rows = torch.arange(len(x), device=x.device)
    point = old = best = start
    z, value, grad = loss_and_grad(model, point, y, loss(rows), eot)
    high = last = before = value
    best_grad, step = grad, x.new_full((len(x), 1, 1, 1), 2 * eps)
    rises, reduced = torch.zeros_like(value), torch.ones_like(broken)
    checkpoints, checkpoint = step_checkpoints(steps), 0
    for i in range(steps + 1):
        met = goal_met(z, y)
        if met.any():
            out[rows[met]], broken[rows[met]] = point[met], True
            state = (rows, x, y, point, old, best, grad, best_grad, step, high, last, before, rises, reduced)
            on = ~met
            rows, x, y, point, old, best, grad, best_grad, step, high, last, before, rises, reduced = (
                s[on] for s in state
            )
        if i and i in checkpoints:
            stuck = (rises <= rho * (i - checkpoint)) | (~reduced & (before >= high))
            reduced, before, checkpoint, rises = stuck, high, i, torch.zeros_like(rises)
            step = torch.where(per_image(stuck), step / 2, step)
            point, grad = torch.where(per_image(stuck), best, point), torch.where(per_image(stuck), best_grad, grad)
        if i == steps or not len(rows):
            break
        new = project(point + step * steepest_direction(grad, norm), x, eps, norm)
        if i:
            new = project(point + 0.75 * (new - point) + 0.25 * (point - old), x, eps, norm)
        old, point = point, new
        if i + 1 < steps:
            z, value, grad = loss_and_grad(model, point, y, loss(rows), eot)
        else:
            z = mean_logits(model, point, eot)
            value = loss(rows)(z, y)
        rises, last = rises + (value > last), value
        up = value > high
        high = torch.where(up, value, high)
        best, best_grad = torch.where(per_image(up), point, best), torch.where(per_image(up), grad, best_grad)
    out[rows] = best
    return out, broken


def apgd(
    model: Model,
    x: Images,
    y: Labels,
    eps: float,
    norm: str = "Linf",
    seed: int = 0,
    *,
    loss: LossName = "ce",
    steps: PositiveInt = 100,
    restarts: PositiveInt = 1,
    eot: PositiveInt = 1,
    rho: Share = 0.75,
    tau: Positive = 100.0,
) -> Images:
    """Climb the loss by Auto-PGD until an image is misclassified (Croce and Hein 2020a, algorithm 1).

    Args:
        model: maps images to logits (n, k).
        x: images (n, c, h, w), in [0, 1].
        y: labels (n,).
        eps: radius of the ball, in pixel units.
        norm: "Linf" or "L2".
        seed: decides the random starts, together with each image's pixels.
        loss: name of the loss, see `lib.attacks.common.get_loss`.
        steps: steps of a restart; 100 is AutoAttack's number.
        restarts: number of random starts.
        eot: forward passes averaged for each gradient, one after the other (Athalye et al. 2018b), for random models.
        rho: share of rising steps below which the step size is halved.
        tau: divisor of the logits for the loss "ce/tau".

    Returns:
        Per image the first misclassified point, else that of the highest loss, of the same shape.

    Raises:
        ValueError: for an unknown loss, or the loss "dlr" below three classes.
    """
    criterion = get_loss(loss, tau)
    x_adv, key, todo = x.clone(), per_image_rng.image_keys(x, seed), torch.arange(len(x), device=x.device)
    for restart in range(restarts):
        if not len(todo):
            break
        start = _surface_start(x[todo], eps, norm, key[todo], restart)
        x_adv[todo], broken = _apgd_run(model, x[todo], y[todo], eps, norm, start, lambda _: criterion, steps, eot, rho)
        todo = todo[~broken]
    return x_adv


def apgd_targeted(
    model: Model,
    x: Images,
    y: Labels,
    eps: float,
    norm: str = "Linf",
    seed: int = 0,
    *,
    steps: PositiveInt = 100,
    targets: PositiveInt = 9,
    restarts: PositiveInt = 1,
    eot: PositiveInt = 1,
    rho: Share = 0.75,
) -> Images:
    """Climb the targeted DLR loss towards the likeliest wrong classes in turn by Auto-PGD (Croce and Hein 2020a).

    Any misclassification ends an image's search. Below four classes the loss is the logit difference z_t - z_y.

    Args:
        model: maps images to logits (n, k).
        x: images (n, c, h, w), in [0, 1].
        y: labels (n,).
        eps: radius of the ball, in pixel units.
        norm: "Linf" or "L2".
        seed: decides the random starts, together with each image's pixels.
        steps: steps towards a class; 100 is AutoAttack's number.
        targets: number of classes, at most all wrong ones.
        restarts: number of random starts for each class.
        eot: forward passes averaged for each gradient, one after the other (Athalye et al. 2018b), for random models.
        rho: share of rising steps below which the step size is halved.

    Returns:
        Per image the first misclassified point, else that of the highest loss for the last class, of the same shape.
    """
    z = mean_logits(model, x, eot)
    order = z.scatter(1, y[:, None], -torch.inf).argsort(1, descending=True)
    x_adv, key, todo = x.clone(), per_image_rng.image_keys(x, seed), torch.arange(len(x), device=x.device)
    for rank in range(min(targets, z.shape[1] - 1)):
        for restart in range(restarts):
            if not len(todo):
                return x_adv
            start = _surface_start(x[todo], eps, norm, key[todo], rank * restarts + restart)
            target = order[todo, rank]

            def loss(rows: Tensor, target: Tensor = target) -> Loss:
                return lambda z, y: dlr_targeted(z, y, target[rows])

            x_adv[todo], broken = _apgd_run(model, x[todo], y[todo], eps, norm, start, loss, steps, eot, rho)
            todo = todo[~broken]
    return x_adv
