"""The trainings of large classifiers, in pieces of minutes on a GPU: what they make lies in `data/pretrained`.

Each piece is complete in itself: it trains one network within its minutes, measures it as it will be loaded and writes
it with its card. How many epochs fit is measured first, so that the learning rate ends where the minutes do.
`lib.experiments.gpu_diffusion` trains the diffusion networks; `python -m lib.pipeline.pieces` runs them all.
"""

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn

from lib import pretrained
from lib.data import Data, Split
from lib.distillation.adversarial import METHODS, robust_loss
from lib.experiments.robust_distillation import AdversarialRecipe, robust_score
from lib.models import accuracy, build_classifier
from lib.training import TrainingLoss, train
from lib.utils.augmentation import shift_flip
from lib.utils.device import default_device
from lib.utils.gpu_path import Use, is_compiled, speed_up
from lib.utils.training_state import Trained

MEASURED_STEPS = 20  # of a training, to learn its speed
VALIDATED = 1000  # validation images of a classifier's epochs, and of cards
QUICK_STEPS, QUICK_IMAGES = 20, 1000  # of the PGD that a card states; claims rest on other attacks
DIFFUSION, DEFENDED = "diffusion", "resnet18"  # the folder of diffusion networks, and the classifier behind them


class PieceBudget(NamedTuple):
    """What one call may take: minutes of training, or as many `epochs` as given; `seed` of weights, batches, noise."""

    minutes: float
    epochs: int | None = None
    seed: int = 0


class PieceResult(NamedTuple):
    """What a training returns: its history, minutes and epochs, and whether the network was compiled."""

    trained: Trained
    minutes: float
    epochs: int
    compiled: bool


def epochs_in(
    minutes: float,
    net: nn.Module,
    loss: TrainingLoss,
    tensors: Sequence[Tensor],
    validate: Callable[[nn.Module], float],
    batch_size: int,
    **options: Any,
) -> int:
    """Return how many epochs of a training fit into some minutes, at least 1; the network is as it was afterwards.

    The first of two short trainings compiles the network.
    """
    few = tuple(t[: MEASURED_STEPS * batch_size] for t in tensors)
    before, training = copy.deepcopy(net.state_dict()), 0.0
    for _ in range(2):
        start = time.perf_counter()
        train(net, loss, few, epochs=1, batch_size=batch_size, progress=False, **options)
        training = time.perf_counter() - start
    start = time.perf_counter()
    validate(copy.deepcopy(net))
    validation = time.perf_counter() - start
    net.load_state_dict(before)
    return max(1, int(60 * minutes / (training * len(tensors[0]) / len(few[0]) + validation)))


def train_within(
    budget: PieceBudget,
    net: nn.Module,
    make_loss: Callable[[int], TrainingLoss],
    tensors: tuple[Tensor, ...],
    validate: Callable[[nn.Module], float],
    **options: Any,
) -> PieceResult:
    """Train a network within a budget.

    `make_loss(epochs)` returns the loss of a training of so many epochs; `validate` gets a copy that is not compiled.
    """
    start = time.perf_counter()
    shared: dict[str, Any] = options | {"seed": budget.seed}
    epochs = budget.epochs or epochs_in(budget.minutes, net, make_loss(1), tensors, validate, **shared)
    score = lambda model: validate(copy.deepcopy(model))  # noqa: E731
    trained = train(net, make_loss(epochs), tensors, epochs=epochs, validate=score, **shared)
    return PieceResult(trained, (time.perf_counter() - start) / 60, epochs, is_compiled(net))


def quick_measures(net: nn.Module, split: Split, recipe: AdversarialRecipe) -> dict[str, Any]:
    """Return a classifier's accuracy in [0, 1] on a split, and on its first images after a short PGD."""
    few = Split(split.x[:QUICK_IMAGES], split.y[:QUICK_IMAGES])
    robust = robust_score(net, few.x, few.y, eps=recipe.eps, steps=QUICK_STEPS)
    out = {"clean": accuracy(net, *split, batch_size=QUICK_IMAGES), "n": len(split.y)}
    return out | {f"pgd_{QUICK_STEPS}": robust, "n_pgd": len(few.y), "eps": recipe.eps}


def train_classifier(
    data: Data, method: str, recipe: AdversarialRecipe, budget: PieceBudget, teacher: nn.Module | None = None
) -> tuple[nn.Module, dict[str, Any], PieceResult]:
    """Train a classifier by a method, rounded to half precision; the recipe's epochs do not count.

    Returns the network, the arguments that build it, and how it was trained.
    """
    network: dict[str, Any] = data.spec() | {"arch": recipe.arch, "width": recipe.width}
    attacked, net = METHODS[method].inner is not None, build_classifier(**network, seed=budget.seed)
    uses: tuple[Use, ...] = ("training", "attack") if attacked else ("training",)
    few = data.train.x[: recipe.batch_size]
    speed_up(net, [few], recipe.precision, uses=uses)
    if teacher is not None:
        speed_up(teacher.to(default_device()), [few], uses=("attack",))
    score = partial(
        robust_score, x=data.val.x[:VALIDATED], y=data.val.y[:VALIDATED], eps=recipe.eps, steps=recipe.steps
    )
    if not attacked:
        score = partial(accuracy, x=data.val.x, y=data.val.y, batch_size=VALIDATED)
    result = train_within(
        budget,
        net,
        lambda epochs: robust_loss(method, teacher, eps=recipe.eps, epochs=epochs, steps=recipe.steps),
        tuple(data.train),
        score,
        batch_size=recipe.batch_size,
        lr=recipe.lr,
        optimizer=recipe.optimizer,
        weight_decay=recipe.weight_decay,
        warmup=0.2,
        ema=recipe.ema,
        augment=partial(shift_flip, pad=recipe.shift, flip=recipe.flip),
        precision=recipe.precision,
    )
    return pretrained.round_weights(copy.deepcopy(net).eval()), network, result


def card_entries(data: Data, recipe: dict[str, Any], origin: dict[str, Any], **entries: Any) -> dict[str, Any]:
    """Return the card of a trained network; `origin`: commit, command, device."""
    images = {"data set": data.name, "training images": len(data.train.y)}
    return origin | {"data": images, "recipe": recipe} | entries


def make_classifier(
    name: str,
    data: Data,
    method: str,
    recipe: AdversarialRecipe,
    budget: PieceBudget,
    origin: dict[str, Any],
    teacher: str = "",
) -> None:
    """Train a classifier, measure it and write it as `<data set>/<name>`; `origin`: commit, command, device.

    `teacher`: name of the classifier that it learns from, for methods that need one.
    """
    own = pretrained.load_classifier(f"{data.name}/{teacher}") if teacher else None
    net, network, result = train_classifier(data, method, recipe, budget, own)
    about = card_entries(
        data,
        asdict(recipe) | {"method": method, "teacher": teacher, "epochs": result.epochs},
        origin,
        compiled=result.compiled,
        minutes=result.minutes,
        metrics=quick_measures(net, data.test, recipe),
        limits=f"one seed, {budget.seed}; the PGD is short: no robustness is claimed from it",
        history=result.trained.history,
    )
    pretrained.save_classifier(f"{data.name}/{name}", net, network, about)
