"""What `dvc repro` cannot afford on two cores: `python -m lib.pipeline.audit`.

Experiment 5 attacks DiffPure's 100 steps in five steps and ends with few exact gradients, since each costs a hundred
times a student's. Here the first of the same test images meet many exact gradients ("attack"), and the teacher
is examined by `lib.evaluation.sanity_checks` ("diagnosis"): half an hour and more. The networks are experiment 4's.
Writes `data/<profile>/audit/<part>-s<seed>.json`.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lib.data import Data, Split, load_dataset
from lib.evaluation.attack_plan import EvaluationSettings
from lib.evaluation.matched_attacks import (
    AttackEffort,
    MeasuringDraws,
    annealed_attack,
    correct_draws,
    matched_attacks,
)
from lib.evaluation.sanity_checks import sanity_checks
from lib.experiments import diffpure
from lib.experiments.samples import evaluation_images
from lib.pipeline.profile import read_params
from lib.utils.artifacts import results_dir
from lib.utils.device import to_model_device
from lib.utils.draws import image_measures
from lib.utils.files import ROOT, write_json
from lib.utils.processes import print_in_any_locale
from lib.utils.yaml_files import first_seed

FULL_STEPS, FULL_EOT, FULL_DRAWS = 64, 4, 100


def attack_teacher(p: dict, data: Data, models: Path, classifier: nn.Module, seed: int, count: int) -> dict[str, Any]:
    """Return what the matched set, most of it in few steps, and exact gradients all the way leave of the teacher.

    "matched" is experiment 5's set without the images made for other defences; "full" has `FULL_STEPS` x `FULL_EOT`
    gradients through every step.
    """
    sample = Split(*to_model_device(classifier, *evaluation_images(data, count, seed)[0]))
    effort = AttackEffort(*(p[key] for key in ("attack_steps", "eot", "queries", "last_steps", "last_eot")))
    draws = MeasuringDraws(*(p[key] for key in ("first_draws", "finalists", "second_draws", "fresh_draws")))
    defence, coarse = diffpure.build_defence(models, p["teacher"], classifier, pixels=sample.x.numel()), None
    if name := diffpure.coarse_name(p["teacher"]):
        coarse = diffpure.build_defence(models, name, classifier, pixels=sample.x.numel())
    at = EvaluationSettings(eps=p["eps"], seed=seed, batch_size=count)
    full = {"name": annealed_attack, "steps": FULL_STEPS, "eot": FULL_EOT}
    crafted = diffpure.craft_images(
        defence, matched_attacks(defence, effort, seed, coarse) | {"full": full}, sample, at
    )
    images = {"full": crafted.pop("full").images}
    candidates = {label: attacked.images for label, attacked in crafted.items()}
    long = coarse is not None
    images["matched"] = diffpure.worst_of_set(defence, long, candidates, sample, at, effort, draws)[1].images
    results: dict[str, Any] = {"teacher": p["teacher"], "eps": p["eps"], "n_test": count}
    results["effort"] = {"matched": effort._asdict(), "full": {"steps": FULL_STEPS, "eot": FULL_EOT}}
    for name, x_adv in images.items():
        right, _ = correct_draws(defence, x_adv, sample.y, FULL_DRAWS, seed, "audit")
        results[name] = {key: float(value.mean()) for key, value in image_measures(right).items()}
    return results


def check_teacher(p: dict, data: Data, models: Path, classifier: nn.Module, seed: int, count: int) -> dict[str, Any]:
    """Return the sanity checks of the teacher with its noise fixed, as lists, on `count` test images."""
    x, y = to_model_device(classifier, data.test.x[:count], data.test.y[:count])
    fixed = diffpure.build_defence(models, p["teacher"], classifier, fixed=seed)
    table = sanity_checks(fixed, x, y, eps=p["eps"], seed=seed, surrogate=classifier)
    columns = {name: table[name].tolist() for name in ("check", "measured", "threshold", "flag")}
    return {"teacher": p["teacher"], "n_diagnosed": count, "red": sum(columns["flag"]), **columns}


AUDITS: dict[str, Callable[..., dict]] = {"attack": attack_teacher, "diagnosis": check_teacher}


def run_audit(part: str, params: dict, seed: int, count: int) -> dict[str, Any]:
    """Return one of `AUDITS`, on the networks that experiment 4 left in this profile, for `count` test images."""
    p = params["dp"]
    torch.set_num_threads(params["threads"] or torch.get_num_threads())
    data = load_dataset(params["data"]["dataset"], n_labels=params["data"]["train_images"] or None, seed=seed)
    recipe = {"epochs": p["classifier_epochs"], "lr": p["classifier_lr"]}
    classifier = diffpure.train_defended(data, seed, p["classifier_width"], **recipe)
    return AUDITS[part](p, data, results_dir(params["profile"], "models") / f"diff-s{seed}", classifier, seed, count)


def main(arguments: list[str] | None = None) -> None:
    """Attack or examine the teacher of one seed of the profile in params.yaml."""
    print_in_any_locale()
    parser = argparse.ArgumentParser(prog="python -m lib.pipeline.audit", description=main.__doc__)
    parser.add_argument("part", choices=AUDITS)
    parser.add_argument("--seed", type=int, default=first_seed("diff"), help="of experiment 4's networks")
    parser.add_argument("--points", type=int, default=16, help="test images")
    args = parser.parse_args(arguments)
    params = read_params()
    target = results_dir(params["profile"], "audit") / f"{args.part}-s{args.seed}.json"
    write_json(target, run_audit(args.part, params, args.seed, args.points))
    print(f"{target.relative_to(ROOT)} is written")


if __name__ == "__main__":
    main()
