"""Experiment 4, diffusion distillation: fewer sampling steps from one teacher; what the notebook computes.

A `Restore` takes noisy z at level t* back to images in pixels: the teacher by any solver in any number of steps, a
student in few. All are asked from the same z, so that they can be compared point by point.
"""

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel
from jaxtyping import Float
from torch import Tensor, nn

from lib import parallel
from lib.consistency import Boundary, Tracked, boundary, consistency, distance, sample
from lib.data import Data, Split
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
from lib.distill import answers
from lib.kd import accuracy
from lib.models import build
from lib.progress import tqdm
from lib.progressive import ladder, rounds
from lib.results import folder
from lib.seeds import generator
from lib.train import cross_entropy, fingerprint, shift_flip, train

Restore = Callable[[Tensor, torch.Generator], Tensor]
PASSES = {"pd": 5, "heun": 6, "ddim": 5}  # forward passes per training image; a backward pass counts as two
FEW = (4, 2, 1)


@dataclass(frozen=True)
class Recipe:
    """What teacher and students share, and what is each one's own; levels t of the schedule, see `lib.diffusion`.

    `t`: t*, where purification begins; `t_max`: up to which the teacher learns; `first`: steps of the teacher that the
    ladder halves; `levels`, `solver`, `measure`, `decay`, `skip`: see `lib.consistency`. Epochs are those of the
    teacher, of each of the ladder's rounds and of the consistency student.
    """

    channels: tuple[int, ...] = (16, 32)
    attention: bool = False
    target: str = "v"
    t: float = 99.0
    t_max: int = 149
    batch_size: int = 128
    ema: float = 0.99
    teacher_epochs: int = 80
    teacher_lr: float = 4e-3
    first: int = 64
    weight: str = "capped"
    round_epochs: int = 20
    round_lr: float = 2e-3
    cd_epochs: int = 100
    cd_lr: float = 2e-3
    levels: tuple[int, int] = (10, 40)
    solver: str = "heun"
    measure: str = "huber"
    decay: float = 0.0
    skip: bool = True


def classifier(data: Data, seed: int, *, width: int, epochs: int, lr: float, shift: int = 0) -> nn.Module:
    """Returns a CNN trained on all labels, the one whose answers about purified images count."""
    model = build("cnn", **data.spec(), width=width, seed=seed)
    augment = partial(shift_flip, pad=shift, flip=False) if shift else None
    train(
        model,
        cross_entropy,
        (data.train.x, data.train.y),
        epochs=epochs,
        lr=lr,
        augment=augment,
        validate=lambda m: accuracy(answers(m, data.val.x), data.val.y),
        seed=seed,
        name="classifier",
    )
    return model


def features(model: nn.Sequential, x: Float[Tensor, "n c h w"], batch_size: int = 256) -> Float[Tensor, "n d"]:
    """Returns what a classifier's last convolution says about images in [0, 1], averaged over places, in float64."""
    flat = next(i for i, layer in enumerate(model) if isinstance(layer, nn.Flatten))
    seen = answers(model[:flat], x, batch_size)
    return seen.double().flatten(2).mean(2)


def frechet(a: Float[Tensor, "n d"], b: Float[Tensor, "m d"]) -> float:
    """Returns the Fréchet distance of two Gaussians with the moments of `a` and `b`: |μ − μ′|² + tr(C + C′ − 2 √(CC′)).

    On a classifier's features: the formula of FID (Heusel et al. 2017) without Inception, so no FID. The estimate is
    biased upwards for few images; compare it with what two sets of real images give.
    """
    mean = (a.mean(0) - b.mean(0)).square().sum()
    first, second = a.T.cov(), b.T.cov()
    values, vectors = torch.linalg.eigh(first)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ second @ root).clamp(min=0).sqrt().sum()
    return (mean + first.trace() + second.trace() - 2 * cross).item()


def by_solver(net: nn.Module, steps: int, recipe: Recipe, solver: str = "ddim") -> Restore:
    """Returns the teacher, or a student of the ladder, in `steps` steps of a solver of `lib.diffusion`."""
    predict = predictor(net, recipe.target)
    return lambda z, rng: unscaled(reverse(predict, z, grid(recipe.t, steps), solver, rng))


def by_jumps(net: nn.Module, at: Boundary, steps: int, recipe: Recipe) -> Restore:
    """Returns a consistency student in `steps` jumps; the same z as for the others, in its own coordinates."""
    return lambda z, rng: unscaled(sample(net, z / level(recipe.t)[0], at, steps, rng))


@torch.no_grad()
def restored(restore: Restore, z: Tensor, rng: torch.Generator, batch_size: int = 256) -> Float[Tensor, "n c h w"]:
    """Returns images in [0, 1], clamped, from noisy z, batch by batch."""
    return torch.cat([restore(part, rng).clamp(0, 1) for part in z.split(batch_size)])


def gap(images: Float[Tensor, "n c h w"], reference: Float[Tensor, "n c h w"]) -> float:
    """Returns the mean squared difference per pixel, images in [0, 1]."""
    return (images - reference).square().mean().item()


@torch.no_grad()
def denoising_error(net: nn.Module, x: Float[Tensor, "n c h w"], recipe: Recipe) -> float:
    """Returns the mean squared error per pixel of one-step denoising, over five levels up to t*, with fixed noise."""
    predict, errors = predictor(net, recipe.target), []
    for k in range(5):
        t = recipe.t * (k + 1) / 5
        z, at = noised(x, t, generator(0, f"validation/{k}")), level(t)
        errors.append(gap(unscaled((z - at[1] * predict(z, t)) / at[0]), x))
    return sum(errors) / len(errors)


def kept(folder: Path, make: Callable[[], tuple[nn.Module, list[dict]]]) -> tuple[UNet2DModel, list[dict]]:
    """Returns a network and its history from `folder`, where it has been made before, or makes and keeps it."""
    if not folder.exists():
        net, history = make()
        save_net(net, folder, {"history": history})
    return load_net(folder), json.loads((folder / "facts.json").read_text())["history"]


def train_teacher(data: Data, recipe: Recipe, seed: int, work: Path, name: str) -> list[dict]:
    """Trains a diffusion model and keeps it in `work`/`name`; returns its history, one row per epoch.

    Validation denoising error below t* chooses the epoch. The training is kept after each epoch, so that an interrupted
    call goes on.
    """

    def make() -> tuple[nn.Module, list[dict]]:
        spec = {k: v for k, v in data.spec().items() if k != "classes"}
        net = unet(**spec, channels=recipe.channels, attention=recipe.attention, seed=seed)
        found = train(
            net,
            denoising(recipe.target, recipe.t_max),
            (data.train.x,),
            epochs=recipe.teacher_epochs,
            batch_size=recipe.batch_size,
            lr=recipe.teacher_lr,
            ema=recipe.ema,
            clip=1.0,
            validate=lambda m: -denoising_error(m, data.val.x, recipe),
            seed=seed,
            checkpoint=work / f"{name}.pt",
            progress=False,
            name=name,
        )
        return net, found.history

    torch.set_grad_enabled(True)
    return kept(work / name, make)[1]


def scales(data: Data, recipe: Recipe) -> Boundary:
    """Returns the consistency student's scalings: σ* of the recipe, σ_data measured on the training images."""
    return boundary(sigma_of(recipe.t), scaled(data.train.x).std().item(), skip=recipe.skip)


def train_student(kind: str, teacher: nn.Module, data: Data, recipe: Recipe, seed: int, work: Path) -> dict:
    """Trains the ladder ("pd") or the consistency student ("cd") and keeps the networks in `work`; returns the history.

    Each epoch's score is minus the distance to the teacher's path in 100 steps, on 100 validation images, which
    chooses the epoch of each network: for the consistency student in one step. Returns, by name of the network, one
    row per epoch.
    """
    torch.set_grad_enabled(True)
    z = noised(data.val.x[:100], recipe.t, generator(0, "validation"))
    truth = restored(by_solver(teacher, 100, recipe), z, generator(0, "none"))
    options = {"batch_size": recipe.batch_size, "ema": recipe.ema, "clip": 1.0, "seed": seed, "progress": False}
    tensors, history = (data.train.x,), {}
    if kind == "pd":

        def score(steps: int, net: nn.Module) -> float:
            return -gap(restored(by_solver(net, steps, recipe), z, generator(0, "none")), truth)

        def keep(steps: int, net: nn.Module, history: list[dict]) -> None:
            save_net(net, work / f"pd-{steps}", {"history": history})

        def known(steps: int) -> nn.Module | None:
            return load_net(work / f"pd-{steps}") if (work / f"pd-{steps}").exists() else None

        counts = rounds(recipe.first)
        ladder(
            teacher,
            tensors,
            counts,
            t=recipe.t,
            target=recipe.target,
            weight=recipe.weight,
            keep=keep,
            known=known,
            validate=score,
            epochs=recipe.round_epochs,
            lr=recipe.round_lr,
            **options,
        )
        names = [f"pd-{steps}" for steps in counts]
    else:
        at = scales(data, recipe)

        def make() -> tuple[nn.Module, list[dict]]:
            net = Tracked(copy.deepcopy(teacher), recipe.decay)
            settings = {"levels": tuple(recipe.levels), "solver": recipe.solver, "measure": distance(recipe.measure)}
            found = train(
                net,
                consistency(predictor(teacher, recipe.target), at, epochs=recipe.cd_epochs, **settings),
                tensors,
                epochs=recipe.cd_epochs,
                lr=recipe.cd_lr,
                validate=lambda m: -gap(restored(by_jumps(m.net, at, 1, recipe), z, generator(0, "none")), truth),
                checkpoint=work / "cd.pt",
                **options,
            )
            return net.net, found.history

        kept(work / "cd", make)
        names = ["cd"]
    for name in names:
        history[name] = json.loads((work / name / "facts.json").read_text())["history"]
    return history


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
    seconds = [(kind, teacher, data, recipe, seed, work) for kind in ("pd", "cd")]
    for found in parallel.each(train_student, seconds, jobs, "students"):
        histories |= found
    return histories


def ways(work: Path, recipe: Recipe, at: Boundary, steps: Sequence[int]) -> dict[str, tuple[int, Restore]]:
    """Returns every way back from t* by name, "<kind>-<steps>", with its number of network evaluations.

    "ddim" and "sde" (Euler–Maruyama): the teacher undistilled; "pd": where the ladder has a student of so many steps;
    "cd": up to eight jumps. "ode-100" and "sde-100" are the yardsticks.
    """
    teacher, cd = load_net(work / "teacher"), load_net(work / "cd")
    found = {
        "ode-100": (100, by_solver(teacher, 100, recipe)),
        "sde-100": (100, by_solver(teacher, 100, recipe, "sde")),
    }
    for n in steps:
        found |= {f"{kind}-{n}": (n, by_solver(teacher, n, recipe, kind)) for kind in ("ddim", "sde")}
        if n in rounds(recipe.first):
            found[f"pd-{n}"] = (n, by_solver(load_net(work / f"pd-{n}"), n, recipe))
        if n <= 8:
            found[f"cd-{n}"] = (n, by_jumps(cd, at, n, recipe))
    return found


def sweep(
    found: dict[str, tuple[int, Restore]], data: Data, test: Split, model: nn.Sequential, recipe: Recipe, seed: int
) -> tuple[dict[str, dict[str, float]], dict[str, Tensor]]:
    """Returns one row per way back, from the same noisy test images, and the images of each.

    `distance`: mean squared difference to "ode-100"; `accuracy` of the classifier `model`, in [0, 1]; `frechet`: the
    distance of its features to those of the training images; `steps`: network evaluations per image. The row "images"
    is that of the test images themselves.
    """
    z = noised(test.x, recipe.t, generator(seed, "sweep"))
    images = {}
    for name, (_, restore) in tqdm(found.items(), desc="ways back"):
        images[name] = restored(restore, z, generator(seed, f"sweep/{name}"))
    real = features(model, data.train.x)
    rows = {}
    for name, x in {"images": test.x, **images}.items():
        rows[name] = {
            "steps": found[name][0] if name in found else 0,
            "distance": gap(x, images["ode-100"]) if name in found else None,
            "accuracy": accuracy(answers(model, x), test.y),
            "frechet": frechet(features(model, x), real),
        }
    return rows, images


def drawn(
    found: dict[str, tuple[int, Restore]], test: Split, model: nn.Module, recipe: Recipe, seed: int, draws: int
) -> dict[str, dict[str, float]]:
    """Returns what differs between `draws` draws of all noise, and how it compares with the SDE's, per way back.

    `accuracy`: mean over draws; `diversity`: variance of a pixel over draws, mean over pixels and images;
    `posterior`: total variation between the classifier's mean probabilities and those of "sde-100"; `frechet_sde`:
    between the features of all draws and those of "sde-100". The row "sde-100 again" says what is noise.
    """
    few = {f"{kind}-{n}": found.get(f"{kind}-{n}") for kind in ("ddim", "pd", "cd") for n in FEW}
    asked = {name: found[name] for name in ("sde-100", "ode-100")} | {"sde-100 again": found["sde-100"]}
    asked |= {name: way for name, way in few.items() if way}
    rows: dict[str, dict[str, float]] = {}
    for name, (_, restore) in tqdm(asked.items(), desc="draws"):
        rng = generator(seed, f"draws/{name}")
        each = [restored(restore, noised(test.x, recipe.t, rng), rng) for _ in range(draws)]
        logits = torch.stack([answers(model, x).double() for x in each])
        belief, seen = logits.softmax(-1).mean(0), features(model, torch.cat(each))
        if name == "sde-100":
            their_belief, theirs = belief, seen
        rows[name] = {
            "accuracy": (logits.argmax(-1) == test.y).double().mean().item(),
            "diversity": torch.stack(each).var(0).mean().item(),
            "posterior": (belief - their_belief).abs().sum(1).mean().item() / 2,
            "frechet_sde": frechet(seen, theirs),
        }
    return rows


def ladder_errors(images: dict[str, Tensor], recipe: Recipe) -> dict[str, dict[str, float]]:
    """Returns for each round the distance of the student to its own teacher, in twice its steps, from the same z."""
    above = {n: f"pd-{2 * n}" if 2 * n in rounds(recipe.first) else f"ddim-{2 * n}" for n in rounds(recipe.first)}
    return {str(n): {"to_teacher": gap(images[f"pd-{n}"], images[name])} for n, name in above.items() if name in images}


def costs(histories: dict[str, list[dict]], recipe: Recipe, images: int) -> dict[str, Any]:
    """Returns what training costs in forward passes per network evaluation counted, and when CD equals the ladder.

    `curve`: for "pd" and "cd" the passes spent after each epoch and the validation distance to the teacher's path; the
    ladder's rows are those of its rounds, one after the other. `cd_equals_pd`: the share of the ladder's passes after
    which the consistency student's one step was first as close as the ladder's last student; None if it never was.
    """
    curve: dict[str, list] = {"pd": [], "cd": []}
    for name, rows in histories.items():
        kind = name.split("-")[0]
        if kind in curve:
            each = PASSES["pd" if kind == "pd" else recipe.solver] * images
            spent = curve[kind][-1][0] if curve[kind] else 0
            steps = int(name.split("-")[1]) if kind == "pd" else 1
            curve[kind] += [[spent + each * (i + 1), -row["score"], steps] for i, row in enumerate(rows)]
    best = min(error for _, error, steps in curve["pd"] if steps == 1)
    equal = next((passes for passes, error, _ in curve["cd"] if error <= best), None)
    total = {kind: rows[-1][0] for kind, rows in curve.items()}
    return {"passes": total, "curve": curve, "cd_equals_pd": equal / total["pd"] if equal else None}


def summary(rows: dict[str, dict], draws: dict[str, dict], histories: dict[str, list[dict]]) -> dict[str, float]:
    """Returns the numbers that claims are about, paired within one seed.

    `better` is the family whose one-step student is closer to the teacher's path on validation images. The gains are
    the distance of undistilled DDIM in as many steps minus the student's; the losses are the accuracy on purified
    clean images minus that of the teacher in 100 steps of its SDE.
    """
    scores = {kind: max(row["score"] for row in histories[name]) for kind, name in (("pd", "pd-1"), ("cd", "cd"))}
    better = max(scores, key=scores.get)
    out = {}
    for n in FEW:
        for name, kind in (("pd", "pd"), ("cd", "cd"), ("better", better)):
            out[f"{name}_{n}_gain"] = rows[f"ddim-{n}"]["distance"] - rows[f"{kind}-{n}"]["distance"]
            out[f"{name}_{n}_accuracy"] = draws[f"{kind}-{n}"]["accuracy"] - draws["sde-100"]["accuracy"]
    return out
