"""Experiment 4, diffusion distillation: trains teacher and students, and lists every sampler by name."""

import operator
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lib.data import Data
from lib.diffusion.network import load_network
from lib.distillation.consistency import BoundaryScheduler
from lib.distillation.few_step import (
    FewStepRecipe,
    Samplers,
    consistency_sampler,
    solver_sampler,
    train_consistency,
    train_diffusion_model,
    train_progressive,
)
from lib.distillation.progressive import student_steps
from lib.utils import parallel
from lib.utils.artifacts import results_dir
from lib.utils.code_hash import fingerprint
from lib.utils.device import default_device


def few_step_work_dir(profile: str, recipe: FewStepRecipe, seed: int, data: Data) -> Path:
    """Returns where unfinished networks are kept: one folder for these settings, images and this code."""
    return results_dir(profile, "checkpoints") / f"diff-s{seed}-{fingerprint(recipe, len(data.train.y), data.spec())}"


def train_networks(data: Data, recipe: FewStepRecipe, seed: int, work: Path, jobs: int = 1) -> dict[str, list[dict]]:
    """Trains teacher and sampler, then both families of students, `jobs` at a time; returns all histories by name.

    The sampler is the same network trained on all levels, for images drawn from pure noise: it does nothing else.
    """
    firsts = [(data, recipe, seed, work, "teacher"), (data, replace(recipe, t_max=999), seed, work, "sampler")]
    histories = dict(
        zip(("teacher", "sampler"), parallel.parallel_map(train_diffusion_model, firsts, jobs, "diffusion models"))
    )
    teacher = load_network(work / "teacher")
    seconds = [(fit, teacher, data, recipe, seed, work) for fit in (train_progressive, train_consistency)]
    for found in parallel.parallel_map(operator.call, seconds, jobs, "students"):
        histories |= found
    return histories


def all_samplers(work: Path, recipe: FewStepRecipe, at: BoundaryScheduler, steps: Sequence[int]) -> Samplers:
    """Returns every way back from t* by name, "<kind>-<steps>", with its number of network evaluations.

    "ddim" and "sde" (Euler–Maruyama): the teacher undistilled; "pd": where the ladder has a student of so many steps;
    "cd": up to eight jumps. "ode-100" and "sde-100" are the yardsticks.
    """
    teacher, cd = (load_network(work / name).to(default_device()) for name in ("teacher", "cd"))
    found = {
        "ode-100": (100, solver_sampler(teacher, 100, recipe)),
        "sde-100": (100, solver_sampler(teacher, 100, recipe, "sde")),
    }
    for n in steps:
        found |= {f"{kind}-{n}": (n, solver_sampler(teacher, n, recipe, kind)) for kind in ("ddim", "sde")}
        if n in student_steps(recipe.first):
            found[f"pd-{n}"] = (n, solver_sampler(load_network(work / f"pd-{n}").to(default_device()), n, recipe))
        if n <= 8:
            found[f"cd-{n}"] = (n, consistency_sampler(cd, at, n, recipe))
    return found
