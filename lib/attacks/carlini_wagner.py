"""The L2 attack of Carlini and Wagner (2017): the smallest perturbation that changes the class, in pixel units."""

import torch
from torch import Tensor

from lib.attacks.common import Images, Labels, Logits, Model, goal_met, margin, per_image
from lib.utils.validation import NonNegative, Positive, PositiveInt

SHRINK = 1e-3  # of tanh(w) at the start: at 0 a pixel at exactly 0 or 1 would have w = +-inf and never move


def _cw_loss_and_grad(
    model: Model, x: Images, y: Labels, target: Labels | None, kappa: float
) -> tuple[Logits, Tensor, Images]:
    """Return the logits, f = max(margin, -kappa) and its gradient at `x` (0 for a model cut off from autograd)."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        z = model(x)
        f = margin(z, y, target).clamp_min(-kappa)
        grad = torch.autograd.grad(f.sum(), x, allow_unused=True)[0] if f.requires_grad else None
    return z.detach(), f.detach(), torch.zeros_like(x) if grad is None else grad


def _minimise(
    model: Model,
    x: Images,
    y: Labels,
    target: Labels | None,
    c: Tensor,
    best: Tensor,
    *,
    kappa: float,
    steps: int,
    lr: float,
    abort: bool,
) -> tuple[Tensor, Images, Tensor]:
    """Minimise ||x' - x||^2 + c f(x') over w, x' = (tanh(w) + 1) / 2, by Adam; return squared distances, points, met.

    `best`: squared distances to beat. With `abort` an image stops once a tenth of the steps brings it < 0.01 %.
    """
    out, met_once = x.clone(), torch.zeros_like(y, dtype=torch.bool)
    best, rows = best.clone(), torch.arange(len(x), device=x.device)
    w = torch.atanh((1 - SHRINK) * (2 * x - 1))
    m, v, before = torch.zeros_like(w), torch.zeros_like(w), torch.full_like(c, torch.inf)
    for step in range(steps + 1):
        t = w.tanh()
        x_adv = (t + 1) / 2
        delta = x_adv - x
        distance = delta.square().flatten(1).sum(1)
        z, f, grad = _cw_loss_and_grad(model, x_adv, y, target, kappa)
        met = goal_met(z, y, target, kappa)
        met_once[rows] |= met
        closer = (met & (distance < best[rows])).nonzero().squeeze(1)
        if len(closer):
            out[rows[closer]], best[rows[closer]] = x_adv[closer], distance[closer]
        if step == steps:
            break
        grad = (2 * delta + per_image(c) * grad) * (1 - t * t) / 2
        m.mul_(0.9).add_(grad, alpha=0.1)
        v.mul_(0.999).addcmul_(grad, grad, value=0.001)
        scale = (1 - 0.999 ** (step + 1)) ** 0.5
        w = torch.addcdiv(w, m, v.sqrt().add_(1e-8 * scale), value=-lr * scale / (1 - 0.9 ** (step + 1)))
        if abort and step % max(steps // 10, 1) == 0:
            cost = distance + c * f
            on = cost <= 0.9999 * before
            before = cost
            if not on.all():
                rows, x, y, c, w, m, v, before = (s[on] for s in (rows, x, y, c, w, m, v, before))
                target = None if target is None else target[on]
                if not len(rows):
                    break
    return best, out, met_once


def carlini_wagner(
    model: Model,
    x: Images,
    y: Labels,
    eps: float | None = None,
    norm: str = "L2",
    seed: int = 0,
    *,
    steps: PositiveInt = 200,
    searches: PositiveInt = 9,
    c: Positive = 1.0,
    kappa: NonNegative = 0.0,
    lr: Positive = 0.05,
    target: Labels | None = None,
    abort: bool = True,
) -> Images:
    """Search the smallest perturbation whose logit margin is at least `kappa` (Carlini and Wagner 2017, section VI).

    The weight c of the loss is divided by ten until the image resists, or multiplied until it falls, then bisected on
    the logarithm, for each image.

    Args:
        model: maps images to logits (n, k).
        x: images (n, c, h, w), in [0, 1].
        y: labels (n,).
        eps: does not guide the search: `lib.attacks.api.attack` projects farther points onto this ball.
        norm: "L2".
        seed: unused: there is no randomness.
        steps: Adam steps for each weight.
        searches: number of weights.
        c: the first weight.
        kappa: logit margin by which the goal must be met, >= 0.
        lr: Adam's learning rate, in units of w with x = (tanh(w) + 1) / 2.
        target: classes to reach (n,); untargeted when None.
        abort: whether an image stops once a tenth of the steps brings it less than 0.01 %.

    Returns:
        Per image the closest point that meets the goal, or the image itself if there is none, of the same shape.
    """
    x_adv, best = x.clone(), x.new_full((len(x),), torch.inf)
    c_now, low, high = x.new_full((len(x),), c), torch.zeros_like(best), torch.full_like(best, torch.inf)
    for _ in range(searches):
        closest, point, met = _minimise(model, x, y, target, c_now, best, kappa=kappa, steps=steps, lr=lr, abort=abort)
        x_adv = torch.where(per_image(closest < best), point, x_adv)
        best = closest
        low, high = torch.where(met, low, c_now), torch.where(met, c_now, high)
        between = torch.where(low > 0, (low * high).sqrt(), high / 10)
        c_now = torch.where(high.isinf(), low * 10, between)
    return x_adv
