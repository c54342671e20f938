"""The trainings of large networks, in pieces of minutes on a GPU: what they make lies in `data/pretrained`.

Each piece is complete in itself: it trains one network within its minutes, measures it as it will be loaded and writes
it with its card. How many epochs fit is measured first, so that the learning rate ends where the minutes do.
`python -m lib.pipeline.pieces` runs them.
"""

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lib import pretrained
from lib.data import Data, Split
from lib.diffusion.network import build_unet, denoising_loss, load_network
from lib.distillation.adversarial import METHODS, robust_loss
from lib.distillation.consistency import ConsistencyScalings
from lib.distillation.few_step import (
    FewStepRecipe,
    consistency_sampler,
    load_config,
    load_consistency_student,
    save_config,
    scalings_of,
)
from lib.distillation.few_step_training import denoising_error, train_consistency, validation_score
from lib.distillation.label_purifier import LabelPurifierRecipe, train_label_purifier
from lib.distillation.robust_consistency import train_robust_student, training_pairs
from lib.experiments.diffpure_students import hidden_features, plan_student
from lib.experiments.robust_distillation import AdversarialRecipe, robust_score
from lib.models import accuracy, build_classifier
from lib.purify import Purifier, load_purifier, purify
from lib.training import TrainingLoss, train
from lib.utils.augmentation import shift_flip
from lib.utils.device import default_device
from lib.utils.gpu_path import Use, is_compiled, speed_up
from lib.utils.training_state import Trained

MEASURED_STEPS = 20  # of a training, to learn its speed
VALIDATED = 1000  # validation images of a classifier's epochs
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


def train_teacher(data: Data, recipe: FewStepRecipe, budget: PieceBudget) -> tuple[nn.Module, PieceResult]:
    """Train the diffusion model in bf16 on mirrored images, rounded to half precision; epochs are the budget's."""
    net = build_unet(data.in_channels, data.size, recipe.channels, attention=recipe.attention, seed=budget.seed)
    few = data.train.x[: recipe.batch_size]
    speed_up(net, [few, torch.full((len(few),), recipe.t)], "bf16")
    result = train_within(
        budget,
        net,
        lambda epochs: denoising_loss(recipe.target, recipe.t_max),
        (data.train.x,),
        lambda model: -denoising_error(model, data.val.x, recipe),
        batch_size=recipe.batch_size,
        lr=recipe.teacher_lr,
        warmup=0.02,
        ema=recipe.teacher_ema,
        clip=1.0,
        augment=partial(shift_flip, pad=0, flip=True),
        precision="bf16",
    )
    return pretrained.round_weights(copy.deepcopy(net).eval()), result


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
    limits = f"one seed, {budget.seed}; the PGD is short: no robustness is claimed from it"
    about = origin | {
        "data": {"data set": data.name, "training images": len(data.train.y)},
        "recipe": asdict(recipe) | {"method": method, "teacher": teacher, "epochs": result.epochs},
        "compiled": result.compiled,
        "minutes": result.minutes,
        "metrics": quick_measures(net, data.test, recipe),
        "limits": limits,
        "history": result.trained.history,
    }
    pretrained.save_classifier(f"{data.name}/{name}", net, network, about)


def diffusion_about(data: Data, recipe: FewStepRecipe, origin: dict[str, Any], **entries: Any) -> dict[str, Any]:
    """Return the card of a diffusion network."""
    about = {"data": {"data set": data.name, "training images": len(data.train.y)}, "recipe": asdict(recipe)}
    about["limits"] = f"levels up to {recipe.t_max} of 999: it purifies, and draws no images from pure noise; one seed"
    return origin | about | entries


def make_teacher(data: Data, recipe: FewStepRecipe, budget: PieceBudget, origin: dict[str, Any]) -> None:
    """Train the diffusion teacher and write it, and the recipe beside it."""
    net, result = train_teacher(data, recipe, budget)
    trained = replace(recipe, teacher_epochs=result.epochs)
    error = denoising_error(net.to(default_device()), data.val.x, recipe)
    per_epoch = result.minutes / result.epochs
    curve = [{"minutes": per_epoch * (row["epoch"] + 1), "error": -row["score"]} for row in result.trained.history]
    metrics = {"validation_error": error, "unit": "px²", "curve": curve}
    about = diffusion_about(data, trained, origin, minutes=result.minutes, metrics=metrics, compiled=result.compiled)
    name = f"{data.name}/{DIFFUSION}"
    pretrained.save_diffusion_network(name, "teacher", net.cpu(), result.trained.history, about)
    save_config(pretrained.pretrained_folder(name), trained, scalings_of(data, trained))


def purified_accuracy(purifiers: Mapping[str, Purifier], classifier: nn.Module, split: Split) -> dict[str, Any]:
    """Return a classifier's accuracy in [0, 1] on the first images of a split, each purified once, by purifier."""
    few = Split(split.x[:VALIDATED], split.y[:VALIDATED])
    out: dict[str, Any] = {"n": len(few.y)}
    for name, purifier in purifiers.items():
        purified = purify(purifier.to(default_device()), few.x.to(default_device()), progress=False)
        out[name] = accuracy(classifier, purified.cpu(), few.y)
    return out


def student_purifier(net: nn.Module, scalings: ConsistencyScalings, recipe: FewStepRecipe, **options: Any) -> Purifier:
    """Return the one-step purifier of a consistency student."""
    return Purifier(net, consistency_sampler(net, scalings, 1, recipe), recipe.t, 1, **options)


def make_student(data: Data, recipe: FewStepRecipe, budget: PieceBudget, origin: dict[str, Any]) -> None:
    """Train the consistency student of the teacher that is there for the recipe's epochs, and write it beside it."""
    folder, start = pretrained.pretrained_folder(f"{data.name}/{DIFFUSION}"), time.perf_counter()
    teacher = load_network(folder / "teacher")
    recipe = replace(recipe, cd_epochs=budget.epochs or recipe.cd_epochs)
    net, history = train_consistency(teacher, data, recipe, budget.seed)
    minutes, net = (time.perf_counter() - start) / 60, pretrained.round_weights(net.eval()).to(default_device())
    scalings, score = scalings_of(data, recipe), validation_score(teacher, data, recipe)
    metrics: dict[str, Any] = {
        f"cd-{k}_to_ode_100": -score(consistency_sampler(net, scalings, k, recipe)) for k in (1, 2)
    }
    purifiers = {"sde-100": load_purifier(folder, "sde-100"), "cd-1": student_purifier(net, scalings, recipe)}
    metrics["purified"] = purified_accuracy(purifiers, pretrained.load_classifier(f"{data.name}/{DEFENDED}"), data.val)
    about = diffusion_about(data, recipe, origin, minutes=minutes, metrics=metrics)
    pretrained.save_diffusion_network(f"{data.name}/{DIFFUSION}", "cd", net.cpu(), history, about)


def make_variant(
    name: str, data: Data, robust: dict[str, Any], label: dict[str, Any], budget: PieceBudget, origin: dict[str, Any]
) -> None:
    """Train one of experiment 5's students from the consistency student, before ResNet-18, and write it beside it.

    `robust`, `label`: what its name leaves open, see `lib.experiments.diffpure_students.plan_student`.
    """
    folder, start = pretrained.pretrained_folder(f"{data.name}/{DIFFUSION}"), time.perf_counter()
    recipe = load_config(folder)[0]
    length = {} if budget.epochs is None else {"epochs": budget.epochs}
    own = plan_student(name, robust | length, label | length).recipe
    student, scalings = load_consistency_student(folder, "cd")
    student, classifier = student.to(default_device()), pretrained.load_classifier(f"{data.name}/{DEFENDED}")
    classifier = classifier.to(default_device())
    facts: dict[str, Any] = {"skip": scalings.skip}
    if isinstance(own, LabelPurifierRecipe):
        net, history = train_label_purifier(student, classifier, data.train, recipe, scalings, own, budget.seed)
        facts["noise_share"] = own.noise
    else:
        teacher = load_network(folder / "teacher", target=recipe.target).to(default_device())
        pairs = training_pairs(data.train, teacher, recipe, scalings, budget.seed, copies=1)
        features = hidden_features(classifier)
        net, history = train_robust_student(
            student, teacher, classifier, pairs, recipe, scalings, own, budget.seed, features=features
        )
    minutes, net = (time.perf_counter() - start) / 60, pretrained.round_weights(net.eval())
    purifier = student_purifier(net, scalings, recipe, noise_share=facts.get("noise_share", 1.0))
    metrics = {"purified": purified_accuracy({f"{name}-1": purifier}, classifier, data.val)}
    about = diffusion_about(data, recipe, origin, minutes=minutes, metrics=metrics)
    about |= {"student": asdict(own), "classifier": DEFENDED}
    pretrained.save_diffusion_network(f"{data.name}/{DIFFUSION}", name, net.cpu(), history, about, **facts)
