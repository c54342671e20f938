"""Experiment 4, diffusion distillation: fewer sampling steps from one teacher; what the notebook computes.

A `Sampler` takes noisy z at level t* back to images in pixels: the teacher by any solver in any number of steps, a
student in few. All are asked from the same z, so that they can be compared point by point.
"""

import copy
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lib.data import Data
from lib.diffusion.network import build_unet, denoising_loss, eps_model, load_network, save_network
from lib.diffusion.schedule import add_noise, alpha_sigma, t_to_sigma, time_grid, to_model_range, to_pixel_range
from lib.diffusion.solvers import reverse_process
from lib.distillation.consistency import (
    BoundaryScheduler,
    EMATarget,
    PreconditionedTeacher,
    consistency_loss,
    consistency_sample,
    consistency_scalings,
    image_distance,
)
from lib.distillation.progressive import progressive_distillation, progressive_loss, student_steps
from lib.training import train
from lib.utils.device import default_device
from lib.utils.files import write_json
from lib.utils.random_state import RandnLike, randn_like
from lib.utils.seeds import seeded_generator

Sampler = Callable[[Tensor, RandnLike], Tensor]
Samplers = dict[str, tuple[int, Sampler]]  # by name: network evaluations per image, and the way back
STEP_COUNTS = (4, 2, 1)


@dataclass(frozen=True)
class FewStepRecipe:
    """What teacher and students share, and what is each one's own; levels t of the schedule, see `lib.diffusion.schedule`.

    `t`: t*, where purification begins; `t_max`: up to which the teacher learns; `first`: steps of the teacher that the
    ladder halves; `weight`: see `lib.distillation.progressive`; `levels`, `solver`, `cd_weight`, `measure`, `decay`, `skip`: see
    `lib.distillation.consistency`. Epochs are those of the teacher, of each of the ladder's rounds and of the consistency student;
    the students' average of weights must be fast, since a slow one drags every round back to where it began.
    """

    channels: tuple[int, ...] = (8, 16)
    attention: bool = False
    target: str = "v"
    t: float = 99.0
    t_max: int = 149
    batch_size: int = 128
    teacher_ema: float = 0.99
    student_ema: float = 0.9
    teacher_epochs: int = 80
    teacher_lr: float = 4e-3
    first: int = 64
    weight: str = "capped"
    round_epochs: int = 16
    round_lr: float = 2e-3
    cd_epochs: int = 60
    cd_lr: float = 2e-3
    levels: tuple[int, int] = (4, 8)
    solver: str = "heun"
    cd_weight: str = "uniform"
    measure: str = "huber"
    decay: float = 0.0
    skip: bool = True


def check_recipe(recipe: FewStepRecipe, steps: Sequence[int], size: int) -> None:
    """Raises ValueError, before any training, for settings that could only fail later."""
    if missing := sorted(set(STEP_COUNTS) - set(steps)):
        raise ValueError(f"steps lacks {', '.join(map(str, missing))}: claims are about 4, 2 and 1")
    if student_steps(recipe.first)[0] < STEP_COUNTS[0]:
        raise ValueError(f"first is {recipe.first}: the ladder must begin at {2 * STEP_COUNTS[0]} steps or more")
    if not 0 < recipe.t <= recipe.t_max:
        raise ValueError(f"t is {recipe.t}, t_max {recipe.t_max}: the teacher must learn all levels up to t")
    if recipe.measure == "features":
        raise ValueError(
            "measure is 'features': it needs a function, see lib.distillation.consistency.image_distance; huber or l2 here"
        )
    build_unet(size=size, channels=recipe.channels, attention=recipe.attention, seed=0)
    denoising_loss(recipe.target, recipe.t_max)
    image_distance(recipe.measure)
    EMATarget(nn.Identity(), recipe.decay)
    progressive_loss(lambda z, t: z, 1, t=recipe.t, weight=recipe.weight)
    options = {"levels": recipe.levels, "solver": recipe.solver, "weight": recipe.cd_weight}
    consistency_loss(lambda z, t: z, consistency_scalings(t_to_sigma(recipe.t), 0.5), epochs=1, **options)


def solver_sampler(net: nn.Module, steps: int, recipe: FewStepRecipe, solver: str = "ddim") -> Sampler:
    """Returns the teacher, or a student of the ladder, in `steps` steps of a solver of `lib.diffusion.schedule`."""
    predict = eps_model(net, recipe.target)
    return lambda z, randn_like: to_pixel_range(
        reverse_process(predict, z, time_grid(recipe.t, steps), solver, randn_like)
    )


def precondition(net: nn.Module, at: BoundaryScheduler, recipe: FewStepRecipe) -> nn.Module:
    """Returns the network as a consistency model uses it: as the teacher's denoiser to begin with, if it may skip."""
    return PreconditionedTeacher(net, at, recipe.target) if at.skip else net


def unwrap(net: nn.Module) -> nn.Module:
    """Returns the diffusers network in what `precondition` made of it."""
    return net.net if isinstance(net, PreconditionedTeacher) else net


def consistency_sampler(net: nn.Module, at: BoundaryScheduler, steps: int, recipe: FewStepRecipe) -> Sampler:
    """Returns a consistency student in `steps` jumps; the same z as for the others, in its own coordinates."""
    net = precondition(net, at, recipe)
    return lambda z, randn_like: to_pixel_range(
        consistency_sample(net, z / alpha_sigma(recipe.t)[0], at, steps, randn_like)
    )


@torch.no_grad()
def run_sampler(
    restore: Sampler, z: Tensor, seed: int = 0, purpose: str = "restored", batch_size: int = 256
) -> Float[Tensor, "n c h w"]:
    """Returns images in [0, 1], clamped, on the CPU, from noisy z, batch by batch, with the noise of one purpose."""
    noise = randn_like(seeded_generator(seed, purpose, default_device()))
    return torch.cat([restore(part.to(default_device()), noise).clamp(0, 1).cpu() for part in z.split(batch_size)])


def mse(images: Float[Tensor, "n c h w"], reference: Float[Tensor, "n c h w"]) -> float:
    """Returns the mean squared difference per pixel, images in [0, 1]."""
    return (images - reference).square().mean().item()


@torch.no_grad()
def denoising_error(net: nn.Module, x: Float[Tensor, "n c h w"], recipe: FewStepRecipe) -> float:
    """Returns the mean squared error per pixel of one-step denoising, over five levels up to t*, with fixed noise.

    On the first 500 images: each epoch asks for it.
    """
    predict, errors, x = eps_model(net, recipe.target), [], x[:500]
    for k in range(5):
        t = recipe.t * (k + 1) / 5
        z, at = add_noise(x, t, randn_like(seeded_generator(0, f"validation/{k}"))).to(default_device()), alpha_sigma(t)
        errors.append(mse(to_pixel_range((z - at[1] * predict(z, t)) / at[0]).cpu(), x))
    return sum(errors) / len(errors)


def training_history(folder: Path) -> list[dict]:
    """Returns what a network's training wrote beside it, one row per epoch."""
    return json.loads((folder / "facts.json").read_text())["history"]


def train_once(folder: Path, make: Callable[[], tuple[nn.Module, list[dict]]]) -> list[dict]:
    """Makes a network and keeps it in `folder`, if none has been kept there before; returns its history."""
    if not folder.exists():
        net, history = make()
        save_network(net, folder, {"history": history})
    return training_history(folder)


def train_diffusion_model(data: Data, recipe: FewStepRecipe, seed: int, work: Path, name: str) -> list[dict]:
    """Trains a diffusion model and keeps it in `work`/`name`; returns its history, one row per epoch.

    Validation denoising error below t* chooses the epoch. The training is kept after each epoch, so that an interrupted
    call goes on.
    """

    def make() -> tuple[nn.Module, list[dict]]:
        net = build_unet(data.in_channels, data.size, recipe.channels, attention=recipe.attention, seed=seed)
        found = train(
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
            checkpoint=work / f"{name}.pt",
            progress=False,
            name=name,
        )
        return net, found.history

    return train_once(work / name, make)


def scalings_of(data: Data, recipe: FewStepRecipe) -> BoundaryScheduler:
    """Returns the consistency student's scalings: σ* of the recipe, σ_data measured on the training images."""
    return consistency_scalings(t_to_sigma(recipe.t), to_model_range(data.train.x).std().item(), skip=recipe.skip)


def validation_score(teacher: nn.Module, data: Data, recipe: FewStepRecipe) -> Callable[[Sampler], float]:
    """Returns a score of ways back: minus the distance to the teacher's path in 100 steps, on 100 validation images."""
    z = add_noise(data.val.x[:100], recipe.t, randn_like(seeded_generator(0, "validation")))
    truth = run_sampler(solver_sampler(teacher, 100, recipe), z)
    return lambda restore: -mse(run_sampler(restore, z), truth)


def student_options(recipe: FewStepRecipe, seed: int) -> dict[str, Any]:
    """Returns the options of `lib.training` that all students share."""
    return {"batch_size": recipe.batch_size, "ema": recipe.student_ema, "clip": 1.0, "seed": seed, "progress": False}


def train_progressive(
    teacher: nn.Module, data: Data, recipe: FewStepRecipe, seed: int, work: Path
) -> dict[str, list[dict]]:
    """Trains the ladder and keeps its networks in `work`; returns by name of each one row per epoch.

    `validation_score` chooses the epoch of each network, in its own number of steps.
    """
    teacher = teacher.to(default_device())
    score = validation_score(teacher, data, recipe)

    def keep(steps: int, net: nn.Module, history: list[dict]) -> None:
        save_network(net, work / f"pd-{steps}", {"history": history})

    def known(steps: int) -> nn.Module | None:
        return load_network(work / f"pd-{steps}").to(default_device()) if (work / f"pd-{steps}").exists() else None

    counts = student_steps(recipe.first)
    progressive_distillation(
        teacher,
        (data.train.x,),
        counts,
        t=recipe.t,
        target=recipe.target,
        weight=recipe.weight,
        keep=keep,
        known=known,
        validate=lambda steps, net: score(solver_sampler(net, steps, recipe)),
        epochs=recipe.round_epochs,
        lr=recipe.round_lr,
        **student_options(recipe, seed),
    )
    return {f"pd-{steps}": training_history(work / f"pd-{steps}") for steps in counts}


def train_consistency(
    teacher: nn.Module, data: Data, recipe: FewStepRecipe, seed: int, work: Path
) -> dict[str, list[dict]]:
    """Trains the consistency student and keeps it in `work`; returns one row per epoch, under its name.

    `validation_score` chooses the epoch, in one step.
    """
    teacher, at = teacher.to(default_device()), scalings_of(data, recipe)
    score = validation_score(teacher, data, recipe)

    def make() -> tuple[nn.Module, list[dict]]:
        net = EMATarget(precondition(copy.deepcopy(teacher), at, recipe), recipe.decay)
        settings = {"levels": tuple(recipe.levels), "solver": recipe.solver, "measure": image_distance(recipe.measure)}
        settings["weight"] = recipe.cd_weight
        found = train(
            net,
            consistency_loss(eps_model(teacher, recipe.target), at, epochs=recipe.cd_epochs, **settings),
            (data.train.x,),
            epochs=recipe.cd_epochs,
            lr=recipe.cd_lr,
            validate=lambda tracked: score(consistency_sampler(unwrap(tracked.net), at, 1, recipe)),
            checkpoint=work / "cd.pt",
            **student_options(recipe, seed),
        )
        return unwrap(net.net), found.history

    return {"cd": train_once(work / "cd", make)}


def publish(work: Path, target: Path, recipe: FewStepRecipe, at: BoundaryScheduler) -> Path:
    """Moves all networks from the workshop to `target`, in place of what was there, with what `load_config` reads.

    Returns `target`, so that cells run again find them.
    """
    if work != target:
        write_json(work / "recipe.json", asdict(recipe) | {"sigma_data": at.config.sigma_data})
        for checkpoint in work.glob("*.pt"):
            checkpoint.unlink()
        shutil.rmtree(target, ignore_errors=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(work, target)
    return target


def load_config(folder: Path) -> tuple[FewStepRecipe, BoundaryScheduler]:
    """Returns recipe and scalings of the networks in a folder that `publish` made; FileNotFoundError without it."""
    path = folder / "recipe.json"
    if not path.exists():
        raise FileNotFoundError(f"{folder} holds no purifier: run `dvc repro` for the experiment that trains it")
    found = json.loads(path.read_text())
    sigma_data = found.pop("sigma_data")
    recipe = FewStepRecipe(**{k: tuple(v) if isinstance(v, list) else v for k, v in found.items()})
    return recipe, consistency_scalings(t_to_sigma(recipe.t), sigma_data, skip=recipe.skip)
