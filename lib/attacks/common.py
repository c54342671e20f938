"""Projected gradient descent with a free loss (Madry et al. 2018), and the goal, losses and balls all attacks share.

Images are n c h w in [0, 1], `eps` is in pixel units, losses are per image and are maximised. Each iterate is projected
onto the ball and [0, 1] outside the model: a clamp inside the forward pass would zero the gradient of every pixel that
has left the box.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from torch.nn import functional as F

from lib.utils import per_image_rng

Images = Float[Tensor, "n c h w"]
Logits = Float[Tensor, "n k"]
Labels = Int[Tensor, " n"]
Model = Callable[[Images], Logits]
Loss = Callable[[Logits, Labels], Float[Tensor, " n"]]


def margin(z: Logits, y: Labels, target: Labels | None = None) -> Float[Tensor, " n"]:
    """Returns z_y - max_{j != y} z_j, or max_{j != t} z_j - z_t with a target: negative once the attack's goal is met.

    The class is left out by -inf, not by a factor 0, so that all-negative logits are right (Carlini and Wagner 2017).
    """
    goal = (y if target is None else target)[:, None]
    own = z.gather(1, goal).squeeze(1)
    other = z.scatter(1, goal, -torch.inf).amax(1)
    return own - other if target is None else other - own


def goal_met(z: Logits, y: Labels, target: Labels | None = None, kappa: float = 0.0) -> Bool[Tensor, " n"]:
    """Says which images meet the goal: misclassified, or classified as the target, by a logit margin of `kappa`."""
    met = z.argmax(1) != y if target is None else z.argmax(1) == target
    return met & (margin(z, y, target) <= -kappa) if kappa else met


def cross_entropy(z: Logits, y: Labels) -> Float[Tensor, " n"]:
    """Returns the cross-entropy of each image: its float32 gradient is exactly 0 from a logit margin of about 104."""
    return F.cross_entropy(z, y, reduction="none")


def dlr(z: Logits, y: Labels) -> Float[Tensor, " n"]:
    """Returns the difference-of-logits-ratio loss, free of the logits' scale and shift (Croce and Hein 2020, eq. 6).

    Raises ValueError below three classes, where it is constant.
    """
    if z.shape[1] < 3:
        raise ValueError(f"the DLR loss needs at least 3 classes, the model has {z.shape[1]}: use the loss 'margin'")
    top = z.topk(3).values
    return -margin(z, y) / (top[:, 0] - top[:, 2] + 1e-12)


def dlr_targeted(z: Logits, y: Labels, target: Labels) -> Float[Tensor, " n"]:
    """Returns the targeted DLR loss (Croce and Hein 2020, eq. 7); below four classes its numerator z_t - z_y alone."""
    gap = (z.gather(1, target[:, None]) - z.gather(1, y[:, None])).squeeze(1)
    if z.shape[1] < 4:
        return gap
    top = z.topk(4).values
    return gap / (top[:, 0] - (top[:, 2] + top[:, 3]) / 2 + 1e-12)


LOSSES = ("ce", "margin", "dlr", "ce/tau")


def get_loss(name: str, tau: float = 100.0) -> Loss:
    """Returns the loss called `name`, to be maximised; `ce/tau` is the cross-entropy of logits divided by `tau`.

    Raises ValueError for another name.
    """
    losses = {
        "ce": cross_entropy,
        "margin": lambda z, y: -margin(z, y),
        "dlr": dlr,
        "ce/tau": lambda z, y: cross_entropy(z / tau, y),
    }
    if name not in losses:
        raise ValueError(f"unknown loss {name!r}: choose one of {', '.join(LOSSES)}")
    return losses[name]


def per_image(v: Shaped[Tensor, " n"]) -> Shaped[Tensor, "n 1 1 1"]:
    """Returns one number per image in a shape that broadcasts over n c h w."""
    return v[:, None, None, None]


def l2_norm(delta: Images) -> Float[Tensor, "n 1 1 1"]:
    """Returns the Euclidean length of each image, in the same dtype."""
    return per_image(torch.linalg.vector_norm(delta.flatten(1), dim=1))


def project(x_adv: Images, x: Images, eps: float, norm: str) -> Images:
    """Returns `x_adv` brought into the eps-ball around `x` and [0, 1] (L2: scaled, then clamped, which shortens)."""
    if norm == "Linf":
        return torch.clamp(x_adv, (x - eps).clamp_min_(0), (x + eps).clamp_max_(1))
    delta = x_adv - x
    return (x + delta * (eps / l2_norm(delta).clamp_min(1e-12)).clamp_max(1)).clamp_(0, 1)


def random_start(x: Images, eps: float, norm: str, key: Int[Tensor, " n"], draw: int, power: float = 1.0) -> Images:
    """Returns random points of the eps-ball around `x`, clamped to [0, 1].

    Linf: uniform; L2: a uniform direction, at a distance of eps u^power. `power` 1 starts PGD all over the ball, 1 / d
    in d dimensions is the uniform distribution, most of which lies at the surface.
    """
    shape = x.shape[1:]
    if norm == "Linf":
        return (x + eps * (2 * per_image_rng.uniform(key, draw, *shape).to(x.dtype) - 1)).clamp_(0, 1)
    delta = per_image_rng.normal(key, 2 * draw, *shape).to(x.dtype)
    radius = per_image_rng.uniform(key, 2 * draw + 1).to(x.dtype) ** power
    return (x + eps * per_image(radius) * delta / l2_norm(delta).clamp_min(1e-12)).clamp_(0, 1)


def loss_and_grad(
    model: Callable[[Images], Logits], x: Images, y: Labels, loss: Loss, eot: int = 1
) -> tuple[Logits, Float[Tensor, " n"], Images]:
    """Returns logits, losses and the losses' gradient at `x`, each averaged over `eot` forward passes.

    A model whose output does not depend on `x` through autograd has the gradient 0 (lib.evaluation.sanity_checks flags it). The loss is
    summed, not averaged, over the batch: a mean would make tiny gradients underflow in a large batch only.
    """
    x = x.detach().requires_grad_()
    sums: list[Tensor] = []
    for _ in range(eot):
        with torch.enable_grad():
            z = model(x)
            value = loss(z, y)
            grad = torch.autograd.grad(value.sum(), x, allow_unused=True)[0] if value.requires_grad else None
        parts = [z.detach(), value.detach(), torch.zeros_like(x) if grad is None else grad]
        sums = [a + b for a, b in zip(sums, parts, strict=True)] if sums else parts
    z, value, grad = sums if eot == 1 else [part / eot for part in sums]
    return z, value, grad.detach()


@torch.no_grad()
def mean_logits(model: Callable[[Images], Logits], x: Images, eot: int = 1) -> Logits:
    """Returns the logits of `x`, averaged over `eot` forward passes."""
    return sum((model(x) for _ in range(eot - 1)), model(x)) / eot if eot > 1 else model(x)


def steepest_direction(grad: Images, norm: str) -> Images:
    """Returns the steepest unit step: the sign for Linf, the normalised gradient for L2 (0 where the gradient is 0)."""
    if norm == "Linf":
        return grad.sign()
    largest = per_image(grad.flatten(1).abs().amax(1)).clamp_min(torch.finfo(grad.dtype).tiny)
    grad = grad / largest  # tiny gradients would square to 0
    return grad / l2_norm(grad).clamp_min(1e-12)
