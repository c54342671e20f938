"""A purifier trained for the label: the constraint in label space, before a classifier that stays as it is.

The student g, one step of a consistency model, maps u + s σ* n to an image, u in [-1, 1]. With δ found through student
and classifier h as they are at that moment, it minimises

    d(g(u), u) + d(g(u + δ), u) + λ [CE(h(g(u)), y) + CE(h(g(u + δ)), y)],

every term with the same noise n. s is the share of the noise: 1 is the noise of the diffusion model at t*, 0 none, and
then the defence is deterministic. Constraints on images or features alone (`lib.distillation.robust_consistency`) ask
more of the student than the classifier needs.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from lib.attacks.common import step_size
from lib.data import Split
from lib.diffusion.schedule import to_model_range, to_pixel_range
from lib.distillation.adversarial import AdversarialBatch, inner_maximisation
from lib.distillation.consistency import ConsistencyScalings, consistency_fn
from lib.distillation.few_step import FewStepRecipe, precondition, unwrap
from lib.distillation.robust_consistency import StudentAndClassifier
from lib.training import train
from lib.utils.random_state import attack_mode
from lib.utils.validation import NonNegative, Positive, PositiveInt, check_fields

NoiseShare = Annotated[NonNegative, Field(le=1)]


@dataclass(frozen=True)
class LabelPurifierRecipe:
    """How one student is trained.

    Args:
        noise: s, the share of the diffusion model's noise at t*.
        label_weight: λ, beside mean squared distances of images in [-1, 1].
        eps: radius of the Linf ball of δ, in pixel units.
        steps: of the search for δ.
        epochs: of the training.
        lr: learning rate.

    Raises:
        ValueError: for a value of another type or out of its range.
    """

    noise: NoiseShare
    label_weight: NonNegative
    eps: NonNegative
    steps: PositiveInt
    epochs: PositiveInt
    lr: Positive

    def __post_init__(self) -> None:
        check_fields(self)


def label_purifier_loss(scalings: ConsistencyScalings, classifier: nn.Module, recipe: LabelPurifierRecipe) -> Callable:
    """Return the loss of the module's docstring, half of it.

    Args:
        scalings: of the student.
        classifier: h, frozen.
        recipe: noise, λ, and budget of δ.

    Returns:
        A loss for `lib.training.train` on images (n, c, h, w) in [0, 1] and labels (n,).
    """
    sigma_star = scalings.sigma_max

    def loss(student: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator, epoch: int):
        noise = recipe.noise * torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        defended = StudentAndClassifier(student, classifier, noise, scalings)
        with attack_mode(defended, "eval"):
            x_adv = inner_maximisation(
                AdversarialBatch(defended, None, x, y),
                "ce",
                eps=recipe.eps,
                steps=recipe.steps,
                alpha=step_size(recipe.eps, recipe.steps),
                start="uniform",
                generator=generator,
            )
        noisy = to_model_range(torch.cat([x, x_adv])) + sigma_star * noise.repeat(2, 1, 1, 1)
        ends = consistency_fn(student, noisy, sigma_star, scalings)
        distance = (ends - to_model_range(x).repeat(2, 1, 1, 1)).square().mean()
        label = F.cross_entropy(classifier(to_pixel_range(ends)), y.repeat(2))
        return distance + recipe.label_weight * label, {"distance": distance, "label": label}

    return loss


def train_label_purifier(
    student: nn.Module,
    classifier: nn.Module,
    split: Split,
    recipe: FewStepRecipe,
    scalings: ConsistencyScalings,
    own: LabelPurifierRecipe,
    seed: int,
) -> tuple[nn.Module, list[dict[str, Any]]]:
    """Train a copy of a consistency student for the label; the last weights, averaged, are the result.

    Args:
        student: network of a consistency student, or of the diffusion model itself.
        classifier: h; frozen here.
        split: training images (n, c, h, w) in [0, 1] and labels.
        recipe: of teacher and students.
        scalings: of the student.
        own: noise, λ, δ and budget.
        seed: of δ, batches and noise.

    Returns:
        The trained network and its history, one dict per epoch.
    """
    classifier = classifier.eval().requires_grad_(False)
    net = precondition(copy.deepcopy(student).requires_grad_(), scalings, recipe)
    trained = train(
        net,
        label_purifier_loss(scalings, classifier, own),
        tuple(split),
        epochs=own.epochs,
        batch_size=recipe.batch_size,
        lr=own.lr,
        ema=recipe.student_ema,
        clip=1.0,
        seed=seed,
        progress=False,
        name="label",
    )
    return unwrap(net), trained.history
