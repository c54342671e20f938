"""Transfer attacks (Papernot et al. 2017): images made on a surrogate, given or trained on the victim's predictions."""

import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lib.attacks.carlini_wagner import carlini_wagner
from lib.attacks.common import Images, Labels, Model
from lib.attacks.gate import AttackWarning, ModelGate
from lib.attacks.pgd import pgd
from lib.models import NO_CLASS, most_likely
from lib.training import train
from lib.utils.device import to_model_device
from lib.utils.random_state import seeded_noise
from lib.utils.validation import NonNegative, PositiveInt


def transfer(
    model: Model,
    x: Images,
    y: Labels,
    eps: float,
    norm: str = "Linf",
    seed: int = 0,
    *,
    surrogate: Model,
    confidence: NonNegative = 20.0,
    by: Literal["pgd", "cw"] = "pgd",
    steps: PositiveInt = 100,
    restarts: PositiveInt = 1,
) -> Images:
    """Attack a surrogate with high confidence, which carries over to the model (Papernot et al. 2017).

    High confidence is what carries over to a distilled model (Carlini and Wagner 2017, section VIII).

    Args:
        model: the victim, which this attack does not use.
        x: images (n, c, h, w), in [0, 1].
        y: labels (n,).
        eps: radius of the ball, in pixel units.
        norm: "Linf" or "L2".
        seed: decides the random starts, together with each image's pixels, and the noise of a random surrogate.
        surrogate: the network that is attacked, in eval mode; `train_surrogate` trains one.
        confidence: logit margin by which the surrogate must misclassify.
        by: "pgd" (margin loss), or "cw" (L2 only; `lib.attacks.api.attack` projects its points onto the ball).
        steps: steps of the attack.
        restarts: number of random starts of "pgd".

    Returns:
        Per image the point that the surrogate misclassifies by `confidence`, else that of the highest loss (pgd) or the
        image (cw), of the same shape.

    Raises:
        ValueError: if the surrogate's answers are no logits for the model's classes.
    """
    gate = ModelGate(surrogate, x, getattr(model, "classes", None))
    with seeded_noise(surrogate, seed, x.device):
        if by == "cw":
            x_adv = carlini_wagner(gate, x, y, kappa=confidence, steps=steps)
        else:
            options = {"loss": "margin", "kappa": confidence, "steps": steps, "restarts": restarts}
            x_adv = pgd(gate, x, y, eps, norm, seed, **options)
    gate.warn("transfer's surrogate")
    return x_adv


def _surrogate_loss(model: nn.Module, x: Images, target: Tensor, *, generator: torch.Generator, epoch: int):
    """Return the cross-entropy with the victim's predictions, class numbers (n,) or probabilities (n, k)."""
    return F.cross_entropy(model(x), target), {}


def _query(victim: Callable[[Images], Tensor], x: Images) -> tuple[Tensor, Tensor, Tensor]:
    """Return the images (m, c, h, w) that a victim classifies, its predictions for them and the classes (m,).

    An AttackWarning says how many other images there were.
    """
    with torch.no_grad():
        predictions = victim(x)
    labels = predictions if predictions.ndim == 1 else most_likely(predictions)
    known = labels != NO_CLASS
    if not known.all():
        message = f"the victim's predictions were not finite for {int((~known).sum())} of {len(x)} queries"
        warnings.warn(AttackWarning(f"{message}: the surrogate learns nothing from these"), stacklevel=3)
    return x[known.to(x.device)], predictions[known], labels[known]


def train_surrogate(
    victim: Callable[[Images], Tensor],
    x: Float[Tensor, "n c h w"],
    surrogate: nn.Module,
    *,
    rounds: int = 0,
    step: float = 0.1,
    epochs: int = 30,
    seed: int = 0,
    **options: Any,
) -> nn.Module:
    """Train a surrogate in place on nothing but a victim's predictions (Papernot et al. 2017, algorithm 1).

    Args:
        victim: maps images to class numbers (n,), as a label-only black box does, or to probabilities (n, k). Queries
            that it answers with NaN, infinity or `lib.models.NO_CLASS` are left out.
        x: the first queries (n, c, h, w), in [0, 1].
        surrogate: the network that is trained.
        rounds: number of Jacobian augmentations. After each training the queries x are doubled by
            x + step * sign(gradient of the surrogate's output for the predicted class), and the training goes on.
        step: step of the augmentation, in pixel units (the paper's λ).
        epochs: of each training.
        seed: decides the order of the batches.
        **options: for `lib.training.train`.

    Returns:
        The surrogate, in eval mode.
    """
    settings: dict[str, Any] = {"name": "surrogate", "epochs": epochs, "seed": seed} | options
    for k in range(rounds + 1):
        x, predictions, labels = _query(victim, x)
        train(surrogate, _surrogate_loss, (x, predictions), **settings)
        surrogate.eval()
        if k < rounds:
            query, labels = to_model_device(surrogate, x.detach(), labels)
            output = surrogate(query.requires_grad_()).gather(1, labels[:, None]).sum()
            direction = torch.autograd.grad(output, query)[0].sign().to(x.device)
            x = torch.cat([x, (x + step * direction).clamp(0, 1)])
    return surrogate
