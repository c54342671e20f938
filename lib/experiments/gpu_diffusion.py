"""The trainings of diffusion networks, and of a classifier behind one, in pieces of minutes on a GPU.

Teacher and students lie in `data/pretrained/<data set>/diffusion`, half precision, each with its card; see
`lib.experiments.gpu_pieces`.
"""

import copy
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lib import pretrained
from lib.data import Data, Split
from lib.diffusion.network import build_unet, denoising_loss, load_network
from lib.diffusion.network_files import CARD
from lib.distillation.consistency import ConsistencyScalings
from lib.distillation.few_step import (
    STEP_COUNTS,
    FewStepRecipe,
    check_recipe,
    consistency_sampler,
    load_config,
    load_consistency_student,
    save_config,
    scalings_of,
    solver_sampler,
)
from lib.distillation.few_step_training import (
    denoising_error,
    train_consistency,
    train_progressive,
    validation_score,
)
from lib.distillation.label_purifier import LabelPurifierRecipe, train_label_purifier
from lib.distillation.robust_consistency import train_robust_student, training_pairs
from lib.experiments.diffpure_students import hidden_features, plan_student
from lib.experiments.gpu_pieces import (
    DEFENDED,
    DIFFUSION,
    VALIDATED,
    PieceBudget,
    PieceResult,
    card_entries,
    train_within,
)
from lib.experiments.robust_distillation import AdversarialRecipe
from lib.models import accuracy
from lib.purify import IdentityPurifier, Purifier, PurifierProtocol, load_purifier, purify
from lib.training import TrainingLoss, hard_label_loss, train
from lib.utils.augmentation import shift_flip
from lib.utils.device import default_device
from lib.utils.files import read_json
from lib.utils.gpu_path import speed_up
from lib.utils.random_state import randn_like

PROGRESSIVE = "pd"  # the students of progressive distillation, pd-4, pd-2 and pd-1
PURIFIED = "purified"  # the classifier that is fine-tuned on purified images, resnet18-purified
PURIFIED_EPOCHS, PURIFIED_LR = 2, 0.1  # of its fine-tuning; the rate as a share of the training's
PURIFIED_BY = "cd-1"


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


def diffusion_about(data: Data, recipe: FewStepRecipe, origin: dict[str, Any], **entries: Any) -> dict[str, Any]:
    """Return the card of a diffusion network."""
    limits = f"levels up to {recipe.t_max} of 999: it purifies, and draws no images from pure noise; one seed"
    return card_entries(data, asdict(recipe), origin, limits=limits, **entries)


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


def purified_accuracy(
    purifiers: Mapping[str, Purifier | IdentityPurifier], classifier: nn.Module, split: Split
) -> dict[str, Any]:
    """Return a classifier's accuracy in [0, 1] on the first images of a split, each purified once, by purifier.

    All purifiers and classifiers get the same images and noise.
    """
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


def make_progressive(data: Data, recipe: FewStepRecipe, budget: PieceBudget, origin: dict[str, Any]) -> None:
    """Train the progressive students of the teacher that is there, and write those of 4, 2 and 1 steps beside it.

    The last is written last: it is there when all are.
    """
    check_recipe(recipe, STEP_COUNTS, data.size)
    folder, start = pretrained.pretrained_folder(f"{data.name}/{DIFFUSION}"), time.perf_counter()
    teacher = load_network(folder / "teacher")
    recipe = replace(recipe, round_epochs=budget.epochs or recipe.round_epochs)
    with tempfile.TemporaryDirectory() as work:
        histories = train_progressive(teacher, data, recipe, budget.seed, Path(work))
        nets = {k: load_network(Path(work) / f"{PROGRESSIVE}-{k}") for k in STEP_COUNTS}
    minutes, score = (time.perf_counter() - start) / 60, validation_score(teacher, data, recipe)
    nets = {k: pretrained.round_weights(net).to(default_device()) for k, net in nets.items()}
    samplers = {k: solver_sampler(net, k, recipe) for k, net in nets.items()}
    metrics: dict[str, Any] = {f"{PROGRESSIVE}-{k}_to_ode_100": -score(samplers[k]) for k in STEP_COUNTS}
    purifiers = {f"{PROGRESSIVE}-1": Purifier(nets[1], samplers[1], recipe.t, 1)}
    metrics["purified"] = purified_accuracy(purifiers, pretrained.load_classifier(f"{data.name}/{DEFENDED}"), data.val)
    about = diffusion_about(data, recipe, origin, minutes=minutes, metrics=metrics)
    for k in STEP_COUNTS:
        name = f"{PROGRESSIVE}-{k}"
        pretrained.save_diffusion_network(f"{data.name}/{DIFFUSION}", name, nets[k].cpu(), histories[name], about)


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


def purified_images_loss(purifier: PurifierProtocol, recipe: AdversarialRecipe) -> TrainingLoss:
    """Return the cross-entropy on images purified with fresh noise, then shifted and mirrored as the recipe says."""

    def loss(model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator, epoch: int):
        with torch.no_grad():
            purified = purifier(x, randn_like(generator))
        images = shift_flip(purified, pad=recipe.shift, flip=recipe.flip, generator=generator)
        return hard_label_loss(model, images, y, generator=generator, epoch=epoch)

    return loss


def make_purified_classifier(
    data: Data, recipe: AdversarialRecipe, budget: PieceBudget, origin: dict[str, Any]
) -> None:
    """Fine-tune the natural ResNet-18 on purified training images and write it as `<data set>/resnet18-purified`.

    The last epoch counts, so that the validation images, on which it is measured beside the plain one, chose nothing.
    """
    source, start = f"{data.name}/{DEFENDED}", time.perf_counter()
    network = read_json(pretrained.pretrained_folder(source) / CARD)["network"]
    net, plain = pretrained.load_classifier(source).requires_grad_(True), pretrained.load_classifier(source)
    purifier = load_purifier(pretrained.pretrained_folder(f"{data.name}/{DIFFUSION}"), PURIFIED_BY)
    recipe = replace(recipe, epochs=budget.epochs or PURIFIED_EPOCHS, lr=PURIFIED_LR * recipe.lr, ema=0.0)
    trained = train(
        net,
        purified_images_loss(purifier.to(default_device()), recipe),
        tuple(data.train),
        epochs=recipe.epochs,
        batch_size=recipe.batch_size,
        lr=recipe.lr,
        optimizer=recipe.optimizer,
        weight_decay=recipe.weight_decay,
        seed=budget.seed,
        precision=recipe.precision,
        progress=False,
    )
    minutes, net = (time.perf_counter() - start) / 60, pretrained.round_weights(net)
    purifiers = {"clean": IdentityPurifier(), PURIFIED_BY: purifier}
    metrics = purified_accuracy(purifiers, net, data.val)
    metrics["plain"] = purified_accuracy(purifiers, plain.to(default_device()), data.val)
    about = card_entries(
        data,
        asdict(recipe) | {"method": "natural", "begins as": DEFENDED, "images purified by": PURIFIED_BY},
        origin,
        minutes=minutes,
        metrics=metrics | {"split": "validation"},
        limits=f"one seed, {budget.seed}; made for purified images; no robustness is claimed from this card",
        history=trained.history,
    )
    pretrained.save_classifier(f"{data.name}/{DEFENDED}-{PURIFIED}", net, network, about)
