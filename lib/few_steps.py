"""Experiment 4, diffusion distillation: fewer sampling steps from one teacher; what the notebook computes.

A `Restore` takes noisy z at level t* back to images in pixels: the teacher by any solver in any number of steps, a
student in few. All are asked from the same z, so that they can be compared point by point.
"""

import copy
import json
import operator
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lib import parallel
from lib.consistency import Boundary, Tracked, Warm, boundary, consistency, distance, sample
from lib.data import Data
from lib.diffusion import (
    denoising,
    grid,
    level,
    load_net,
    noised,
    predictor,
    reverse,
    save_net,
    scaled,
    sigma_of,
    unet,
    unscaled,
)
from lib.models import device
from lib.paths import write_json
from lib.progressive import halving, ladder, rounds
from lib.results import folder
from lib.seeds import generator
from lib.train import fingerprint, train

Restore = Callable[[Tensor, torch.Generator], Tensor]
Ways = dict[str, tuple[int, Restore]]  # by name: network evaluations per image, and the way back
FEW = (4, 2, 1)


@dataclass(frozen=True)
class Recipe:
    """What teacher and students share, and what is each one's own; levels t of the schedule, see `lib.diffusion`.

    `t`: t*, where purification begins; `t_max`: up to which the teacher learns; `first`: steps of the teacher that the
    ladder halves; `weight`: see `lib.progressive`; `levels`, `solver`, `cd_weight`, `measure`, `decay`, `skip`: see
    `lib.consistency`. Epochs are those of the teacher, of each of the ladder's rounds and of the consistency student;
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


def check(recipe: Recipe, steps: Sequence[int], size: int) -> None:
    """Raises ValueError, before any training, for settings that could only fail later."""
    if missing := sorted(set(FEW) - set(steps)):
        raise ValueError(f"steps lacks {', '.join(map(str, missing))}: claims are about 4, 2 and 1")
    if rounds(recipe.first)[0] < FEW[0]:
        raise ValueError(f"first is {recipe.first}: the ladder must begin at {2 * FEW[0]} steps or more")
    if not 0 < recipe.t <= recipe.t_max:
        raise ValueError(f"t is {recipe.t}, t_max {recipe.t_max}: the teacher must learn all levels up to t")
    if recipe.measure == "features":
        raise ValueError("measure is 'features': it needs a function, see lib.consistency.distance; huber or l2 here")
    unet(size=size, channels=recipe.channels, attention=recipe.attention, seed=0)
    denoising(recipe.target, recipe.t_max)
    distance(recipe.measure)
    Tracked(nn.Identity(), recipe.decay)
    halving(lambda z, t: z, 1, t=recipe.t, weight=recipe.weight)
    options = {"levels": recipe.levels, "solver": recipe.solver, "weight": recipe.cd_weight}
    consistency(lambda z, t: z, boundary(sigma_of(recipe.t), 0.5), epochs=1, **options)


def by_solver(net: nn.Module, steps: int, recipe: Recipe, solver: str = "ddim") -> Restore:
    """Returns the teacher, or a student of the ladder, in `steps` steps of a solver of `lib.diffusion`."""
    predict = predictor(net, recipe.target)
    return lambda z, rng: unscaled(reverse(predict, z, grid(recipe.t, steps), solver, rng))


def coordinates(net: nn.Module, at: Boundary, recipe: Recipe) -> nn.Module:
    """Returns the network as a consistency model uses it: as the teacher's denoiser to begin with, if it may skip."""
    return Warm(net, at, recipe.target) if at.skip else net


def inner(net: nn.Module) -> nn.Module:
    """Returns the diffusers network in what `coordinates` made of it."""
    return net.net if isinstance(net, Warm) else net


def by_jumps(net: nn.Module, at: Boundary, steps: int, recipe: Recipe) -> Restore:
    """Returns a consistency student in `steps` jumps; the same z as for the others, in its own coordinates."""
    net = coordinates(net, at, recipe)
    return lambda z, rng: unscaled(sample(net, z / level(recipe.t)[0], at, steps, rng))


@torch.no_grad()
def restored(
    restore: Restore, z: Tensor, seed: int = 0, purpose: str = "restored", batch_size: int = 256
) -> Float[Tensor, "n c h w"]:
    """Returns images in [0, 1], clamped, on the CPU, from noisy z, batch by batch, with the noise of one purpose."""
    rng = generator(seed, purpose, device())
    return torch.cat([restore(part.to(device()), rng).clamp(0, 1).cpu() for part in z.split(batch_size)])


def gap(images: Float[Tensor, "n c h w"], reference: Float[Tensor, "n c h w"]) -> float:
    """Returns the mean squared difference per pixel, images in [0, 1]."""
    return (images - reference).square().mean().item()


@torch.no_grad()
def denoising_error(net: nn.Module, x: Float[Tensor, "n c h w"], recipe: Recipe) -> float:
    """Returns the mean squared error per pixel of one-step denoising, over five levels up to t*, with fixed noise.

    On the first 500 images: each epoch asks for it.
    """
    predict, errors, x = predictor(net, recipe.target), [], x[:500]
    for k in range(5):
        t = recipe.t * (k + 1) / 5
        z, at = noised(x, t, generator(0, f"validation/{k}")).to(device()), level(t)
        errors.append(gap(unscaled((z - at[1] * predict(z, t)) / at[0]).cpu(), x))
    return sum(errors) / len(errors)


def history_of(folder: Path) -> list[dict]:
    """Returns what a network's training wrote beside it, one row per epoch."""
    return json.loads((folder / "facts.json").read_text())["history"]


def kept(folder: Path, make: Callable[[], tuple[nn.Module, list[dict]]]) -> list[dict]:
    """Makes a network and keeps it in `folder`, if none has been kept there before; returns its history."""
    if not folder.exists():
        net, history = make()
        save_net(net, folder, {"history": history})
    return history_of(folder)


def train_teacher(data: Data, recipe: Recipe, seed: int, work: Path, name: str) -> list[dict]:
    """Trains a diffusion model and keeps it in `work`/`name`; returns its history, one row per epoch.

    Validation denoising error below t* chooses the epoch. The training is kept after each epoch, so that an interrupted
    call goes on.
    """

    def make() -> tuple[nn.Module, list[dict]]:
        net = unet(data.in_channels, data.size, recipe.channels, attention=recipe.attention, seed=seed)
        found = train(
            net,
            denoising(recipe.target, recipe.t_max),
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

    return kept(work / name, make)


def scales(data: Data, recipe: Recipe) -> Boundary:
    """Returns the consistency student's scalings: σ* of the recipe, σ_data measured on the training images."""
    return boundary(sigma_of(recipe.t), scaled(data.train.x).std().item(), skip=recipe.skip)


def yardstick(teacher: nn.Module, data: Data, recipe: Recipe) -> Callable[[Restore], float]:
    """Returns a score of ways back: minus the distance to the teacher's path in 100 steps, on 100 validation images."""
    z = noised(data.val.x[:100], recipe.t, generator(0, "validation"))
    truth = restored(by_solver(teacher, 100, recipe), z)
    return lambda restore: -gap(restored(restore, z), truth)


def common(recipe: Recipe, seed: int) -> dict[str, Any]:
    """Returns the options of `lib.train` that all students share."""
    return {"batch_size": recipe.batch_size, "ema": recipe.student_ema, "clip": 1.0, "seed": seed, "progress": False}


def train_pd(teacher: nn.Module, data: Data, recipe: Recipe, seed: int, work: Path) -> dict[str, list[dict]]:
    """Trains the ladder and keeps its networks in `work`; returns by name of each one row per epoch.

    `yardstick` chooses the epoch of each network, in its own number of steps.
    """
    teacher = teacher.to(device())
    score = yardstick(teacher, data, recipe)

    def keep(steps: int, net: nn.Module, history: list[dict]) -> None:
        save_net(net, work / f"pd-{steps}", {"history": history})

    def known(steps: int) -> nn.Module | None:
        return load_net(work / f"pd-{steps}").to(device()) if (work / f"pd-{steps}").exists() else None

    counts = rounds(recipe.first)
    ladder(
        teacher,
        (data.train.x,),
        counts,
        t=recipe.t,
        target=recipe.target,
        weight=recipe.weight,
        keep=keep,
        known=known,
        validate=lambda steps, net: score(by_solver(net, steps, recipe)),
        epochs=recipe.round_epochs,
        lr=recipe.round_lr,
        **common(recipe, seed),
    )
    return {f"pd-{steps}": history_of(work / f"pd-{steps}") for steps in counts}


def train_cd(teacher: nn.Module, data: Data, recipe: Recipe, seed: int, work: Path) -> dict[str, list[dict]]:
    """Trains the consistency student and keeps it in `work`; returns one row per epoch, under its name.

    `yardstick` chooses the epoch, in one step.
    """
    teacher, at = teacher.to(device()), scales(data, recipe)
    score = yardstick(teacher, data, recipe)

    def make() -> tuple[nn.Module, list[dict]]:
        net = Tracked(coordinates(copy.deepcopy(teacher), at, recipe), recipe.decay)
        settings = {"levels": tuple(recipe.levels), "solver": recipe.solver, "measure": distance(recipe.measure)}
        settings["weight"] = recipe.cd_weight
        found = train(
            net,
            consistency(predictor(teacher, recipe.target), at, epochs=recipe.cd_epochs, **settings),
            (data.train.x,),
            epochs=recipe.cd_epochs,
            lr=recipe.cd_lr,
            validate=lambda tracked: score(by_jumps(inner(tracked.net), at, 1, recipe)),
            checkpoint=work / "cd.pt",
            **common(recipe, seed),
        )
        return inner(net.net), found.history

    return {"cd": kept(work / "cd", make)}


def workshop(profile: str, recipe: Recipe, seed: int, data: Data) -> Path:
    """Returns where unfinished networks are kept: one folder for these settings, images and this code."""
    return folder(profile, "checkpoints") / f"diff-s{seed}-{fingerprint(recipe, len(data.train.y), data.spec())}"


def train_all(data: Data, recipe: Recipe, seed: int, work: Path, jobs: int = 1) -> dict[str, list[dict]]:
    """Trains teacher and sampler, then both families of students, `jobs` at a time; returns all histories by name.

    The sampler is the same network trained on all levels, for images drawn from pure noise: it does nothing else.
    """
    firsts = [(data, recipe, seed, work, "teacher"), (data, replace(recipe, t_max=999), seed, work, "sampler")]
    histories = dict(zip(("teacher", "sampler"), parallel.each(train_teacher, firsts, jobs, "diffusion models")))
    teacher = load_net(work / "teacher")
    seconds = [(fit, teacher, data, recipe, seed, work) for fit in (train_pd, train_cd)]
    for found in parallel.each(operator.call, seconds, jobs, "students"):
        histories |= found
    return histories


def ways(work: Path, recipe: Recipe, at: Boundary, steps: Sequence[int]) -> Ways:
    """Returns every way back from t* by name, "<kind>-<steps>", with its number of network evaluations.

    "ddim" and "sde" (Euler–Maruyama): the teacher undistilled; "pd": where the ladder has a student of so many steps;
    "cd": up to eight jumps. "ode-100" and "sde-100" are the yardsticks.
    """
    teacher, cd = (load_net(work / name).to(device()) for name in ("teacher", "cd"))
    found = {
        "ode-100": (100, by_solver(teacher, 100, recipe)),
        "sde-100": (100, by_solver(teacher, 100, recipe, "sde")),
    }
    for n in steps:
        found |= {f"{kind}-{n}": (n, by_solver(teacher, n, recipe, kind)) for kind in ("ddim", "sde")}
        if n in rounds(recipe.first):
            found[f"pd-{n}"] = (n, by_solver(load_net(work / f"pd-{n}").to(device()), n, recipe))
        if n <= 8:
            found[f"cd-{n}"] = (n, by_jumps(cd, at, n, recipe))
    return found


def finish(work: Path, target: Path, recipe: Recipe, at: Boundary) -> Path:
    """Moves all networks from the workshop to `target`, in place of what was there, with what `described` reads.

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


def described(folder: Path) -> tuple[Recipe, Boundary]:
    """Returns recipe and scalings of the networks in a folder that `finish` made; FileNotFoundError without it."""
    path = folder / "recipe.json"
    if not path.exists():
        raise FileNotFoundError(f"{folder} holds no purifier: run `dvc repro` for the experiment that trains it")
    found = json.loads(path.read_text())
    sigma_data = found.pop("sigma_data")
    recipe = Recipe(**{k: tuple(v) if isinstance(v, list) else v for k, v in found.items()})
    return recipe, boundary(sigma_of(recipe.t), sigma_data, skip=recipe.skip)
