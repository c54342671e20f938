"""Auto-PGD, untargeted and targeted (Croce and Hein 2020): the step size is halved when progress stops; no other knob.

Every state below belongs to one image, so that an image's path does not depend on its batch.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lib.attacks.common import (
    Images,
    Labels,
    Logits,
    Loss,
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


def surface_start(x: Images, eps: float, norm: str, key: Tensor, draw: int) -> Images:
    """Returns random points on the surface of the eps-ball, clamped to [0, 1]: APGD's start."""
    if norm == "Linf":
        delta = 2 * per_image_rng.uniform(key, draw, *x.shape[1:]).to(x.dtype) - 1
        delta = delta / per_image(delta.flatten(1).abs().amax(1)).clamp_min(1e-12)
    else:
        delta = per_image_rng.normal(key, draw, *x.shape[1:]).to(x.dtype)
        delta = delta / l2_norm(delta).clamp_min(1e-12)
    return project(x + eps * delta, x, eps, norm)


def step_checkpoints(steps: int) -> set[int]:
    """Returns the iterations after which the step size is reconsidered (Croce and Hein 2020, section 3)."""
    period, floor, shrink = (max(int(share * steps), 1) for share in (0.22, 0.06, 0.03))
    at, done = set(), 0
    while done + period <= steps:
        done += period
        at.add(done)
        period = max(period - shrink, floor)
    return at


def apgd_run(
    model: Callable[[Images], Logits],
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
    """Returns one run's points (misclassified, or of the highest loss) and which are misclassified.

    `loss(rows)` is the loss of the images `rows` (it may hold their targets), maximised from `start`.
    """
    out, broken = start.clone(), torch.zeros_like(y, dtype=torch.bool)
    rows = torch.arange(len(x), device=x.device)
    point = old = best = start
    z, value, grad = loss_and_grad(model, point, y, loss(rows), eot)
    high = last = before = value
    best_grad, step = grad, x.new_full((len(x), 1, 1, 1), 2 * eps)
    rises, reduced = torch.zeros_like(value), torch.ones_like(broken)
    at, since = step_checkpoints(steps), 0
    for i in range(steps + 1):
        met = goal_met(z, y)
        if met.any():
            out[rows[met]], broken[rows[met]] = point[met], True
            state = (rows, x, y, point, old, best, grad, best_grad, step, high, last, before, rises, reduced)
            on = ~met
            rows, x, y, point, old, best, grad, best_grad, step, high, last, before, rises, reduced = (
                s[on] for s in state
            )
        if i and i in at:
            stuck = (rises <= rho * (i - since)) | (~reduced & (before >= high))
            reduced, before, since, rises = stuck, high, i, torch.zeros_like(rises)
            step = torch.where(per_image(stuck), step / 2, step)
            point, grad = torch.where(per_image(stuck), best, point), torch.where(per_image(stuck), best_grad, grad)
        if i == steps or not len(rows):
            break
        ahead = project(point + step * steepest_direction(grad, norm), x, eps, norm)
        if i:
            ahead = project(point + 0.75 * (ahead - point) + 0.25 * (point - old), x, eps, norm)
        old, point = point, ahead
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
    model: Callable[[Images], Logits],
    x: Images,
    y: Labels,
    eps: float,
    norm: str = "Linf",
    seed: int = 0,
    *,
    loss: str = "ce",
    steps: int = 100,
    restarts: int = 1,
    eot: int = 1,
    rho: float = 0.75,
    tau: float = 100.0,
) -> Images:
    """Returns APGD's points: the first misclassified one, else that of the highest `loss` (ce, dlr, margin or ce/tau).

    `steps` 100 and one restart are AutoAttack's; `rho`: share of rising steps below which the step size is halved.
    """
    criterion = get_loss(loss, tau)
    x_adv, key, todo = x.clone(), per_image_rng.image_keys(x, seed), torch.arange(len(x), device=x.device)
    for restart in range(restarts):
        if not len(todo):
            break
        start = surface_start(x[todo], eps, norm, key[todo], restart)
        x_adv[todo], broken = apgd_run(model, x[todo], y[todo], eps, norm, start, lambda _: criterion, steps, eot, rho)
        todo = todo[~broken]
    return x_adv


def apgd_targeted(
    model: Callable[[Images], Logits],
    x: Images,
    y: Labels,
    eps: float,
    norm: str = "Linf",
    seed: int = 0,
    *,
    steps: int = 100,
    targets: int = 9,
    restarts: int = 1,
    eot: int = 1,
    rho: float = 0.75,
) -> Images:
    """Returns APGD-T's points: the targeted DLR loss towards the `targets` likeliest wrong classes in turn.

    Any misclassification ends an image's search; below four classes the loss is the logit difference z_t - z_y.
    """
    z = mean_logits(model, x, eot)
    order = z.scatter(1, y[:, None], -torch.inf).argsort(1, descending=True)
    x_adv, key, todo = x.clone(), per_image_rng.image_keys(x, seed), torch.arange(len(x), device=x.device)
    for rank in range(min(targets, z.shape[1] - 1)):
        for restart in range(restarts):
            if not len(todo):
                return x_adv
            start = surface_start(x[todo], eps, norm, key[todo], rank * restarts + restart)
            target = order[todo, rank]

            def loss(rows: Tensor, target: Tensor = target) -> Loss:
                return lambda z, y: dlr_targeted(z, y, target[rows])

            x_adv[todo], broken = apgd_run(model, x[todo], y[todo], eps, norm, start, loss, steps, eot, rho)
            todo = todo[~broken]
    return x_adv
