"""Classic and defensive distillation on large images, each in one piece of minutes on a GPU.

Each writes accuracies and outcomes per image to `data/<data set>/pieces`, in the form of experiments 1 and 2, whose
functions it calls. `python -m lib.pipeline.pieces` runs them.
"""

import math
import time
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from jaxtyping import Int
from torch import Tensor

from lib import pretrained
from lib.data import Data, Split, stratified_order
from lib.experiments import defensive, kd
from lib.experiments.defensive_strong import defensive_outcomes
from lib.experiments.gpu_attacks import first_images, write_measured
from lib.experiments.gpu_pieces import DEFENDED, PieceBudget
from lib.experiments.samples import answer_outcome, record_outcomes
from lib.models import predict_logits
from lib.utils.device import default_device
from lib.utils.draws import NO_ATTACK, unpack_draws
from lib.utils.record_keys import run_key, temperature_key
from lib.utils.seeds import seeded_generator

LABEL_COUNTS, TEMPERATURES = "kd/labels", "dd/temperatures"  # names of the two pieces
STUDENT_SEEDS = 3  # of each student: its initial weights, batches and labelled images


def labelled_rows(y: Int[Tensor, " n"], count: int, seed: int) -> Int[Tensor, " m"]:
    """Return the rows of `count` training images, as many of each class as there are, or of all for 0.

    They are those of `lib.data.load_dataset`; a trial with fewer images has no more than these.
    """
    order = stratified_order(y, seeded_generator(seed, "labels"), balanced=True)
    return order[: count or None].sort().values


def measure_label_counts(data: Data, settings: dict[str, Any], budget: PieceBudget, origin: dict[str, Any]) -> None:
    """Distil the natural ResNet-18 into experiment 1's small CNN, beside the same student on hard labels alone.

    Both have the same initial weights, images and steps, for each number of labels and each student seed. `settings`:
    of experiment 1; epochs of the budget, where it has any, bound the steps: they are those of a student on all labels.
    """
    start, teacher = time.perf_counter(), pretrained.load_classifier(f"{data.name}/{DEFENDED}").to(default_device())
    soft, test = predict_logits(teacher, data.train.x), data.test
    options = {"width": settings["student_width"], "batch_size": settings["batch_size"], "lr": settings["student_lr"]}
    options["steps"] = settings["student_steps"]
    if budget.epochs:
        options["steps"] = min(options["steps"], budget.epochs * math.ceil(len(data.train.y) / options["batch_size"]))
    seeds = [STUDENT_SEEDS * budget.seed + k for k in range(STUDENT_SEEDS)]
    targets = {"T": settings["T"], "alpha": settings["alpha"]}
    correct = {"teacher": {NO_ATTACK: answer_outcome(predict_logits(teacher, test.x), test.y)}}
    students: dict[str, dict[str, Any]] = {}
    for count, name in zip(settings["label_counts"], kd.label_count_names(settings["label_counts"]), strict=True):
        students[name] = {"hard": [], "soft": []}
        for seed in seeds:
            rows = labelled_rows(data.train.y, count, seed)
            fit, split = defensive.fit_student(data, seed, **options), Split(data.train.x[rows], data.train.y[rows])
            for kind, student in kd.train_hard_and_soft(split, soft[rows], fit, **targets).items():
                outcome = answer_outcome(predict_logits(student, test.x), test.y)
                correct[run_key(kind, name, f"s{seed}")] = {NO_ATTACK: outcome}
                students[name][kind].append(float(unpack_draws(outcome).mean()))
        gain = np.mean(students[name]["soft"]) - np.mean(students[name]["hard"])
        students[name] |= {"labels": len(rows), "gain": float(gain)}
    metrics = {"n_test": len(test.y), "teacher": float(unpack_draws(correct["teacher"][NO_ATTACK]).mean())}
    write_measured(
        data,
        LABEL_COUNTS,
        start,
        options | targets | {"teacher": DEFENDED, "seeds": seeds, "label_counts": settings["label_counts"]},
        origin,
        metrics=metrics | {"students": students},
        outcomes=record_outcomes(range(len(test.y)), correct),
        limits=f"one teacher, {STUDENT_SEEDS} seeds of students; nothing was tuned for this data set",
    )


def measure_temperatures(data: Data, settings: dict[str, Any], budget: PieceBudget, origin: dict[str, Any]) -> None:
    """Train the networks of defensive distillation at all temperatures and attack each as experiment 2 does.

    `settings`: of experiment 2; epochs of the budget take the place of the networks' and bound the proxies'.
    """
    start, names = time.perf_counter(), ("arch", "width", "epochs", "lr", "batch_size")
    recipe = defensive.NetworkRecipe(**{name: settings[name] for name in names})
    recipe = replace(recipe, epochs=budget.epochs or recipe.epochs)
    proxy = replace(recipe, epochs=min(recipe.epochs, settings["proxy_epochs"]))
    cw = {"steps": settings["cw_steps"], "searches": settings["cw_searches"]}
    eps = {"large": settings["eps_large"], "small": settings["eps_small"]}
    effort = defensive.EvaluationBudget(eps, settings["steps"], settings["queries"], cw, settings["jsma_targets"])
    images, numbers = first_images(data, settings["test_points"], budget.seed)
    tau = {temperature_key(T): T for T in settings["temperatures"]}
    models = defensive.train_distilled(data, budget.seed, list(tau.values()), recipe)
    surrogate = defensive.train_natural(data, budget.seed, recipe)
    results, records, _ = defensive.evaluate_models(models, tau, surrogate, data, images, budget.seed, proxy, effort)
    for name, model in models.items():
        results[name]["why"] = defensive.gradient_statistics(model, *images)
    write_measured(
        data,
        TEMPERATURES,
        start,
        {"network": asdict(recipe), "proxy": asdict(proxy), "effort": asdict(effort), "seed": budget.seed},
        origin,
        metrics={"n_test": len(numbers), "models": results},
        outcomes=record_outcomes(numbers, defensive_outcomes(records, {}, eps)),
    )
