"""What all attacks share: the goal, the losses, the balls, random starts, the step size and the gradient.

Losses are per image and are maximised. Each iterate is projected onto the ball and [0, 1] outside the model: a clamp
inside the forward pass would zero the gradient of every pixel that has left the box.
"""

from collections.abc import Callable
from typing import Literal

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
LossName = Literal["ce", "margin", "dlr", "ce/tau"]


def margin(z: Logits, y: Labels, target: Labels | None = None) -> Float[Tensor, " n"]:
    """Return the logit margin, which is negative once the attack's goal is met (Carlini and Wagner 2017, f_6).

    The class is left out by -inf, not by a factor 0, so that all-negative logits are handled.

    Args:
        z: logits (n, k).
        y: labels (n,), in 0..k - 1.
        target: classes to reach (n,); untargeted when None.

    Returns:
        z_y - max_{j != y} z_j, or max_{j != t} z_j - z_t with a target (n,).
    """
    goal = (y if target is None else target)[:, None]
    own = z.gather(1, goal).squeeze(1)
    other = z.scatter(1, goal, -torch.inf).amax(1)
    return own - other if target is None else other - own


def goal_met(z: Logits, y: Labels, target: Labels | None = None, kappa: float = 0.0) -> Bool[Tensor, " n"]:
    """Decide which images meet the attack's goal.

    Args:
        z: logits (n, k).
        y: labels (n,).
        target: classes to reach (n,); untargeted when None.
        kappa: logit margin by which the goal must be met; at 0 the predicted class alone decides.

    Returns:
        True where an image is misclassified, or classified as the target (n,). An answer that is not finite is wrong
        by any margin, and no target.
    """
    finite = z.abs().amax(1) < torch.inf  # False for NaN
    met = z.argmax(1) != y if target is None else z.argmax(1) == target
    met = met & (margin(z, y, target) <= -kappa) if kappa else met
    return met | ~finite if target is None else met & finite


def cross_entropy(z: Logits, y: Labels) -> Float[Tensor, " n"]:
    """Return the cross-entropy of each image.

    Its float32 gradient is exactly 0 from a logit margin of about 104: scaled logits disarm attacks that use it.

    Args:
        z: logits (n, k).
        y: labels (n,).

    Returns:
        -log softmax(z)_y (n,), in nats.
    """
    return F.cross_entropy(z, y, reduction="none")


def dlr(z: Logits, y: Labels) -> Float[Tensor, " n"]:
    """Return the difference-of-logits-ratio loss, free of the logits' scale and shift (Croce and Hein 2020a, eq. 6).

    Args:
        z: logits (n, k), k >= 3.
        y: labels (n,).

    Returns:
        -(z_y - max_{j != y} z_j) / (z_(1) - z_(3)) (n,), z_(i) the i-th largest logit.

    Raises:
        ValueError: below three classes, where the loss is constant.
    """
    if z.shape[1] < 3:
        raise ValueError(f"expected at least 3 classes for the DLR loss, got {z.shape[1]}: use the loss 'margin'")
    top = z.topk(3).values
    return -margin(z, y) / (top[:, 0] - top[:, 2] + 1e-12)


def dlr_targeted(z: Logits, y: Labels, target: Labels) -> Float[Tensor, " n"]:
    """Return the targeted DLR loss (Croce and Hein 2020a, eq. 7).

    Args:
        z: logits (n, k).
        y: labels (n,).
        target: classes to reach (n,).

    Returns:
        (z_t - z_y) / (z_(1) - (z_(3) + z_(4)) / 2) (n,); below four classes the numerator alone.
    """
    difference = (z.gather(1, target[:, None]) - z.gather(1, y[:, None])).squeeze(1)
    if z.shape[1] < 4:
        return difference
    top = z.topk(4).values
    return difference / (top[:, 0] - (top[:, 2] + top[:, 3]) / 2 + 1e-12)


def get_loss(name: str, tau: float = 100.0) -> Loss:
    """Return a loss by its name.

    Args:
        name: "ce", "margin" (its negative), "dlr" or "ce/tau", the cross-entropy of logits divided by `tau`.
        tau: the divisor of "ce/tau", against scaled logits.

    Returns:
        A function of logits (n, k) and labels (n,), to be maximised.

    Raises:
        ValueError: for another name.
    """
    losses: dict[str, Loss] = {
        "ce": cross_entropy,
        "margin": lambda z, y: -margin(z, y),
        "dlr": dlr,
        "ce/tau": lambda z, y: cross_entropy(z / tau, y),
    }
    if name not in losses:
        raise ValueError(f"unknown loss {name!r}: choose one of {', '.join(losses)}")
    return losses[name]


def per_image(v: Shaped[Tensor, " n"]) -> Shaped[Tensor, "n 1 1 1"]:
    """Return one number per image in a shape that broadcasts over n c h w."""
    return v[:, None, None, None]


def l2_norm(delta: Images) -> Float[Tensor, "n 1 1 1"]:
    """Return the Euclidean length of each image, in the same dtype."""
    return per_image(torch.linalg.vector_norm(delta.flatten(1), dim=1))


def project(x_adv: Images, x: Images, eps: float, norm: str) -> Images:
    """Project points onto the ball around the images and [0, 1].

    Args:
        x_adv: points (n, c, h, w).
        x: centres of the balls (n, c, h, w), in [0, 1].
        eps: radius of the ball, in pixel units.
        norm: "Linf", or L2 for any other name.

    Returns:
        Points of the same shape, in the ball and in [0, 1]. L2: scaled onto the sphere, then clamped, which shortens.
    """
    if norm == "Linf":
        return torch.clamp(x_adv, (x - eps).clamp_min_(0), (x + eps).clamp_max_(1))
    delta = x_adv - x
    return (x + delta * (eps / l2_norm(delta).clamp_min(1e-12)).clamp_max(1)).clamp_(0, 1)


def random_start(x: Images, eps: float, norm: str, key: Int[Tensor, " n"], draw: int, power: float = 1.0) -> Images:
    """Draw random points of the ball around the images.

    Args:
        x: images (n, c, h, w), in [0, 1].
        eps: radius of the ball, in pixel units.
        norm: "Linf" (uniform), or L2 for any other name (a uniform direction, at the distance eps u^power).
        key: each image's key (n,), by `lib.utils.per_image_rng.image_keys`.
        draw: number of the draw: another one gives independent points.
        power: L2 only. 1 starts PGD all over the ball; 1 / d in d dimensions is the uniform distribution, most of
            which lies at the surface.

    Returns:
        Points of the same shape, in the ball and in [0, 1].
    """
    shape = x.shape[1:]
    if norm == "Linf":
        return (x + eps * (2 * per_image_rng.uniform(key, draw, *shape).to(x.dtype) - 1)).clamp_(0, 1)
    delta = per_image_rng.normal(key, 2 * draw, *shape).to(x.dtype)
    radius = per_image_rng.uniform(key, 2 * draw + 1).to(x.dtype) ** power
    return (x + eps * per_image(radius) * delta / l2_norm(delta).clamp_min(1e-12)).clamp_(0, 1)


def step_size(eps: float, steps: int, share: float | None = None) -> float:
    """Return the step size of PGD where a caller names none: the one rule of this library.

    With 2.5 eps / steps a path reaches the surface from any point of the ball and can still move along it
    (Madry et al. 2018).

    Args:
        eps: radius of the ball, in pixel units.
        steps: number of steps, >= 0.
        share: the step as a share of eps, whatever the number of steps, as `lib.attacks.eot_pgd` has it.

    Returns:
        The step size alpha, in pixel units: 2.5 eps / steps, or share * eps.
    """
    return 2.5 * eps / max(steps, 1) if share is None else share * eps


def loss_and_grad(
    model: Model, x: Images, y: Labels, loss: Loss, eot: int = 1
) -> tuple[Logits, Float[Tensor, " n"], Images]:
    """Compute logits, losses and the gradient of the losses, each averaged over forward passes (Athalye et al. 2018b).

    The loss is summed, not averaged, over the batch: a mean would make tiny gradients underflow in a large batch only.

    Args:
        model: maps images to logits. One cut off from autograd has the gradient 0, which
            `lib.evaluation.sanity_checks` reports.
        x: images (n, c, h, w).
        y: labels (n,).
        loss: see `get_loss`.
        eot: number of forward passes, one after the other.

    Returns:
        Logits (n, k), losses (n,) and gradients (n, c, h, w), without a graph.
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
def mean_logits(model: Model, x: Images, eot: int = 1) -> Logits:
    """Compute logits, averaged over forward passes.

    Args:
        model: maps images to logits (n, k).
        x: images (n, c, h, w).
        eot: number of forward passes, one after the other.

    Returns:
        Logits (n, k), without a graph.
    """
    return sum((model(x) for _ in range(eot - 1)), model(x)) / eot if eot > 1 else model(x)


def steepest_direction(grad: Images, norm: str) -> Images:
    """Return the steepest unit step: the sign for Linf, the normalised gradient for L2 (0 where the gradient is 0)."""
    if norm == "Linf":
        return grad.sign()
    largest = per_image(grad.flatten(1).abs().amax(1)).clamp_min(torch.finfo(grad.dtype).tiny)
    grad = grad / largest  # tiny gradients would square to 0
    return grad / l2_norm(grad).clamp_min(1e-12)
