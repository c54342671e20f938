"""Experiment 4, diffusion distillation: trains teacher and students, and lists every sampler by name."""

import operator
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from lib.data import Data
from lib.diffusion.network import load_network
from lib.distillation.consistency import ConsistencyScalings
from lib.distillation.few_step import REFERENCE_STEPS, FewStepRecipe, Samplers, consistency_sampler, solver_sampler
from lib.distillation.few_step_training import (
    train_consistency,
    train_diffusion_model,
    train_once,
    train_progressive,
)
from lib.distillation.progressive import student_steps
from lib.utils import parallel
from lib.utils.artifacts import results_dir
from lib.utils.code_hash import fingerprint
from lib.utils.content_hash import content_hash
from lib.utils.device import default_device

MOST_CONSISTENCY_STEPS = 8  # more of them bring the consistency student nothing


def few_step_work_dir(profile: str, recipe: FewStepRecipe, seed: int, data: Data) -> Path:
    """Return the folder of unfinished networks: one for these settings, images and this code."""
    return results_dir(profile, "checkpoints") / f"diff-s{seed}-{fingerprint(recipe, content_hash(data))}"


def train_networks(data: Data, recipe: FewStepRecipe, seed: int, work: Path, jobs: int = 1) -> dict[str, list[dict]]:
    """Train teacher and sampler, then both families of students, `jobs` at a time; return all histories by name.

    The sampler is the same network trained on all levels, for images drawn from pure noise: it does nothing else. An
    interrupted call goes on where it was.
    """
    recipes = {"teacher": recipe, "sampler": replace(recipe, t_max=999)}
    tasks = [
        (work / name, partial(train_diffusion_model, data, settings, seed, name, work / f"{name}.pt"))
        for name, settings in recipes.items()
    ]
    histories = dict(zip(recipes, parallel.parallel_map(train_once, tasks, jobs, "diffusion models"), strict=True))
    teacher = load_network(work / "teacher")
    train_cd = partial(train_consistency, teacher, data, recipe, seed, work / "cd.pt")
    families = [
        lambda: train_progressive(teacher, data, recipe, seed, work),
        lambda: {"cd": train_once(work / "cd", train_cd)},
    ]
    for family in parallel.parallel_map(operator.call, [(train,) for train in families], jobs, "students"):
        histories |= family
    return histories


def all_samplers(work: Path, recipe: FewStepRecipe, scalings: ConsistencyScalings, steps: Sequence[int]) -> Samplers:
    """Return every sampler from t* by name, "<kind>-<steps>", with its number of network evaluations.

    "ddim" and "sde" (Euler–Maruyama): the teacher undistilled; "pd": where there is a progressive student of so many
    steps; "cd": the consistency student, in up to eight. "ode-100" and "sde-100" are the references.
    """
    teacher, cd = (load_network(work / name).to(default_device()) for name in ("teacher", "cd"))
    samplers = {
        "ode-100": (REFERENCE_STEPS, solver_sampler(teacher, REFERENCE_STEPS, recipe)),
        "sde-100": (REFERENCE_STEPS, solver_sampler(teacher, REFERENCE_STEPS, recipe, "sde")),
    }
    for n in steps:
        samplers |= {f"{kind}-{n}": (n, solver_sampler(teacher, n, recipe, kind)) for kind in ("ddim", "sde")}
        if n in student_steps(recipe.first):
            samplers[f"pd-{n}"] = (n, solver_sampler(load_network(work / f"pd-{n}").to(default_device()), n, recipe))
        if n <= MOST_CONSISTENCY_STEPS:
            samplers[f"cd-{n}"] = (n, consistency_sampler(cd, scalings, n, recipe))
    return samplers
