"""Recipes of small diffusion models for tests."""

from typing import Any

from lib.distillation.few_step import FewStepRecipe, few_step_recipe

SMALL: dict[str, Any] = {
    "channels": (8, 8),
    "attention": False,
    "target": "v",
    "t": 99.0,
    "t_max": 149,
    "batch_size": 128,
    "teacher_ema": 0.99,
    "student_ema": 0.9,
    "teacher_epochs": 2,
    "teacher_lr": 4e-3,
    "first": 64,
    "weight": "capped",
    "round_epochs": 1,
    "round_lr": 2e-3,
    "cd_epochs": 2,
    "cd_lr": 2e-3,
    "levels": (4, 8),
    "solver": "heun",
    "cd_weight": "uniform",
    "measure": "huber",
    "decay": 0.0,
    "skip": True,
}


def small_recipe(**changes: Any) -> FewStepRecipe:
    """Return a small recipe with some of its fields changed."""
    return few_step_recipe(SMALL | changes)
