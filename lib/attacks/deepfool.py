"""DeepFool (Moosavi-Dezfooli et al. 2016): steps onto the nearest face of the linearised decision regions, in L2."""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from lib.attacks.common import Images, Labels, Logits, Model, goal_met, mean_logits, per_image
from lib.utils.validation import Integer, NonNegative, PositiveInt


def _jacobian(model: Model, x: Images, classes: Tensor) -> tuple[Logits, Tensor]:
    """Return logits (n k) and their gradients (n m c h w) for each image's own `classes` (n m)."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        z = model(x)
        picked = z.gather(1, classes)
        if not z.requires_grad:
            return z, torch.zeros(*classes.shape, *x.shape[1:]).to(x)
        grads = [
            torch.autograd.grad(one.sum(), x, retain_graph=True, allow_unused=True, materialize_grads=True)[0]
            for one in picked.unbind(1)
        ]
    return z.detach(), torch.stack(grads, 1)


def deepfool(
    model: Model,
    x: Images,
    y: Labels,
    eps: float | None = None,
    norm: str = "L2",
    seed: int = 0,
    *,
    steps: PositiveInt = 50,
    overshoot: NonNegative = 0.02,
    classes: Annotated[Integer, Field(ge=2)] = 10,
) -> Images:
    """Step onto the nearest linearised decision boundary until misclassified (Moosavi-Dezfooli et al. 2016).

    An image whose gradients are all 0 stays where it is.

    Args:
        model: maps images to logits (n, k).
        x: images (n, c, h, w), in [0, 1].
        y: labels (n,).
        eps: does not guide the search: `lib.attacks.api.attack` projects farther points onto this ball.
        norm: "L2".
        seed: unused: there is no randomness.
        steps: steps of an image at most.
        overshoot: share by which the sum of the steps is prolonged (the paper's η).
        classes: how many classes, the likeliest ones and the own one, compete.

    Returns:
        Per image the first misclassified point on its path, else the last point, of the same shape.
    """
    z = mean_logits(model, x)
    rivals = z.scatter(1, y[:, None], torch.inf).argsort(1, descending=True)[:, :classes]  # own class first
    x_adv, r_total, rows = x.clone(), torch.zeros_like(x), torch.arange(len(x), device=x.device)
    for _ in range(steps):
        z, grads = _jacobian(model, x_adv[rows], rivals[rows])
        on = ~goal_met(z, y[rows])
        rows, z, grads = rows[on], z[on].gather(1, rivals[rows[on]]), grads[on]
        f, w = z[:, 1:] - z[:, :1], grads[:, 1:] - grads[:, :1]
        length = w.flatten(2).norm(dim=2)
        distance, nearest = torch.where(length > 0, (f.abs() + 1e-6) / length, torch.inf).min(1)
        on = distance.isfinite()
        rows, distance, nearest, w, length = (s[on] for s in (rows, distance, nearest, w, length))
        if not len(rows):
            break
        index = torch.arange(len(rows), device=x.device), nearest
        r_total[rows] += per_image(distance / length[index]) * w[index]
        x_adv[rows] = (x[rows] + (1 + overshoot) * r_total[rows]).clamp(0, 1)
    return x_adv
