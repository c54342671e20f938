"""Trainings of the few-step students and their teacher, and where an interrupted run goes on."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lib.data import Data
from lib.diffusion.network import build_unet, denoising_loss, eps_model, load_network, save_network
from lib.diffusion.network_files import check_card
from lib.diffusion.schedule import add_noise, alpha_sigma, to_pixel_range
from lib.distillation.consistency import EMATarget, consistency_loss, image_distance
from lib.distillation.few_step import (
    REFERENCE_STEPS,
    FewStepRecipe,
    Sampler,
    consistency_sampler,
    load_history,
    mse,
    precondition,
    run_sampler,
    scalings_of,
    solver_sampler,
    unwrap,
)
from lib.distillation.progressive import progressive_distillation, student_steps
from lib.training import train
from lib.utils.checkpoints import set_aside
from lib.utils.device import default_device
from lib.utils.random_state import randn_like
from lib.utils.seeds import seeded_generator

TrainedNetwork = tuple[nn.Module, list[dict[str, Any]]]  # a network and its history, one dict per epoch


@torch.no_grad()
def denoising_error(net: nn.Module, x: Float[Tensor, "n c h w"], recipe: FewStepRecipe) -> float:
    """Return the mean squared error per pixel of one-step denoising, over five levels up to t*, with fixed noise.

    Args:
        net: a diffusion network.
        x: images in [0, 1]; the first 500 count, since each epoch of a training calls this.
        recipe: of the network.

    Returns:
        The error in squared pixel units.
    """
    model, errors, x = eps_model(net, recipe.target), [], x[:500]
    for k in range(5):
        t = recipe.t * (k + 1) / 5
        noise = randn_like(seeded_generator(0, f"validation/{k}"))
        z, (alpha_t, s_t) = add_noise(x, t, noise).to(default_device()), alpha_sigma(t)
        errors.append(mse(to_pixel_range((z - s_t * model(z, t)) / alpha_t).cpu(), x))
    return sum(errors) / len(errors)


def has_network(folder: Path) -> bool:
    """Say whether an earlier call of the same run saved a network; one that is not as its card says is set aside.

    Args:
        folder: of the network.

    Returns:
        True if it is there and whole.
    """
    if not folder.exists():
        return False
    try:
        check_card(folder)
    except ValueError as error:
        set_aside(folder, "broken", str(error))
        return False
    return True


def train_once(folder: Path, train_network: Callable[[], TrainedNetwork], **facts: Any) -> list[dict[str, Any]]:
    """Train a network and save it, unless an earlier call of the same run did: where an interrupted run goes on.

    Args:
        folder: of the network.
        train_network: returns a network and its history.
        **facts: saved with the network, such as the `skip` of a consistency student.

    Returns:
        The history of the network in `folder`, one dict per epoch.
    """
    if not has_network(folder):
        net, history = train_network()
        save_network(net, folder, {"history": history, **facts})
    return load_history(folder)


def train_diffusion_model(
    data: Data, recipe: FewStepRecipe, seed: int, name: str = "teacher", checkpoint: Path | None = None
) -> TrainedNetwork:
    """Train a diffusion model; the validation denoising error up to t* chooses the epoch.

    Args:
        data: of whose training images it learns.
        recipe: of the model.
        seed: of initial weights, batches and noise.
        name: shown as progress.
        checkpoint: file from which an interrupted call goes on, bit for bit.

    Returns:
        The network and its history, one dict per epoch.
    """
    net = build_unet(data.in_channels, data.size, recipe.channels, attention=recipe.attention, seed=seed)
    trained = train(
        net,
        denoising_loss(recipe.target, recipe.t_max),
        (data.train.x,),
        epochs=recipe.teacher_epochs,
        batch_size=recipe.batch_size,
        lr=recipe.teacher_lr,
        ema=recipe.teacher_ema,
        clip=1.0,
        validate=lambda m: -denoising_error(m, data.val.x, recipe),
        seed=seed,
        checkpoint=checkpoint,
        progress=False,
        name=name,
    )
    return net, trained.history


def validation_score(teacher: nn.Module, data: Data, recipe: FewStepRecipe) -> Callable[[Sampler], float]:
    """Return the score that chooses the students' epochs.

    Args:
        teacher: a diffusion network.
        data: of whose validation images the first 100 count.
        recipe: of the teacher.

    Returns:
        A function of a sampler: minus the mse of its images to the ends of the teacher's ODE in 100 steps.
    """
    z = add_noise(data.val.x[:100], recipe.t, randn_like(seeded_generator(0, "validation")))
    truth = run_sampler(solver_sampler(teacher, REFERENCE_STEPS, recipe), z)
    return lambda sampler: -mse(run_sampler(sampler, z), truth)


def student_options(recipe: FewStepRecipe, seed: int) -> dict[str, Any]:
    """Return the options of `lib.training.train` that all students share."""
    return {"batch_size": recipe.batch_size, "ema": recipe.student_ema, "clip": 1.0, "seed": seed, "progress": False}


def train_progressive(
    teacher: nn.Module, data: Data, recipe: FewStepRecipe, seed: int, work: Path
) -> dict[str, list[dict]]:
    """Train the progressive students and save each as `work`/pd-<steps>; an interrupted call goes on after the last.

    `validation_score` chooses the epoch of each network, in its own number of steps.

    Args:
        teacher: a diffusion network of this recipe.
        data: of whose training images they learn.
        recipe: of the students.
        seed: of batches and noise.
        work: folder of the networks.

    Returns:
        The history of each by name, one dict per epoch.
    """
    teacher = teacher.to(default_device())
    score = validation_score(teacher, data, recipe)
    folders = {steps: work / f"pd-{steps}" for steps in student_steps(recipe.first)}
    progressive_distillation(
        teacher,
        (data.train.x,),
        list(folders),
        t=recipe.t,
        target=recipe.target,
        weight=recipe.weight,
        save=lambda steps, net, history: save_network(net, folders[steps], {"history": history}),
        load=lambda steps: load_network(folders[steps]).to(default_device()) if has_network(folders[steps]) else None,
        validate=lambda steps, net: score(solver_sampler(net, steps, recipe)),
        epochs=recipe.round_epochs,
        lr=recipe.round_lr,
        **student_options(recipe, seed),
    )
    return {folder.name: load_history(folder) for folder in folders.values()}


def train_consistency(
    teacher: nn.Module, data: Data, recipe: FewStepRecipe, seed: int, checkpoint: Path | None = None
) -> TrainedNetwork:
    """Train the consistency student; `validation_score` chooses the epoch, in one step.

    Args:
        teacher: a diffusion network of this recipe.
        data: of whose training images it learns.
        recipe: of the student.
        seed: of batches and noise.
        checkpoint: file from which an interrupted call goes on, bit for bit.

    Returns:
        The student's diffusion network and its history, one dict per epoch.
    """
    teacher, scalings = teacher.to(default_device()), scalings_of(data, recipe)
    score = validation_score(teacher, data, recipe)
    student = EMATarget(precondition(copy.deepcopy(teacher), scalings, recipe), recipe.decay)
    loss = consistency_loss(
        eps_model(teacher, recipe.target),
        scalings,
        epochs=recipe.cd_epochs,
        levels=recipe.levels,
        solver=recipe.solver,
        distance=image_distance(recipe.measure),
        weight=recipe.cd_weight,
    )

    def validate(model: Any) -> float:
        return score(consistency_sampler(unwrap(model.net), scalings, 1, recipe))

    trained = train(
        student,
        loss,
        (data.train.x,),
        epochs=recipe.cd_epochs,
        lr=recipe.cd_lr,
        validate=validate,
        checkpoint=checkpoint,
        **student_options(recipe, seed),
    )
    return unwrap(student.net), trained.history
