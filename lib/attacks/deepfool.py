"""DeepFool (Moosavi-Dezfooli et al. 2016): steps onto the nearest face of the linearised decision regions, in L2."""

from collections.abc import Callable

import torch
from torch import Tensor

from lib.attacks.common import Images, Labels, Logits, goal_met, mean_logits, per_image


def jacobian(model: Callable[[Images], Logits], x: Images, classes: Tensor) -> tuple[Logits, Tensor]:
    """Returns logits (n k) and their gradients (n m c h w) for each image's own `classes` (n m)."""
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
    model: Callable[[Images], Logits],
    x: Images,
    y: Labels,
    eps: float | None = None,
    norm: str = "L2",
    seed: int = 0,
    *,
    steps: int = 50,
    overshoot: float = 0.02,
    classes: int = 10,
) -> Images:
    """Returns the first misclassified point on each image's path, or its last point.

    `classes`: how many classes, the likeliest ones, compete; `overshoot`: share by which the way is prolonged. An image
    whose gradients are all 0 stays where it is. There is no randomness; `eps` does not guide the search.
    """
    z = mean_logits(model, x)
    rivals = z.scatter(1, y[:, None], torch.inf).argsort(1, descending=True)[:, :classes]  # the own class comes first
    x_adv, way, rows = x.clone(), torch.zeros_like(x), torch.arange(len(x), device=x.device)
    for _ in range(steps):
        z, grads = jacobian(model, x_adv[rows], rivals[rows])
        on = ~goal_met(z, y[rows])
        rows, z, grads = rows[on], z[on].gather(1, rivals[rows[on]]), grads[on]
        gap, w = z[:, 1:] - z[:, :1], grads[:, 1:] - grads[:, :1]
        length = w.flatten(2).norm(dim=2)
        far = torch.where(length > 0, (gap.abs() + 1e-6) / length, torch.inf)
        far, nearest = far.min(1)
        rows, far, nearest, w, length = (s[far.isfinite()] for s in (rows, far, nearest, w, length))
        if not len(rows):
            break
        each = torch.arange(len(rows), device=x.device)
        way[rows] += per_image(far / length[each, nearest]) * w[each, nearest]
        x_adv[rows] = (x[rows] + (1 + overshoot) * way[rows]).clamp(0, 1)
    return x_adv
