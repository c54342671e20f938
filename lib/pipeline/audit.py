"""What `dvc repro` cannot afford on two cores: `python -m lib.pipeline.audit`.

Experiment 5 attacks DiffPure's 100 steps by exact gradients with the small budget, since each gradient costs a hundred
times a student's. Here the first of the same test images meet the full budget too ("attack"), and the teacher is
examined by `lib.evaluation.sanity_checks` ("diagnosis"): half an hour and more. The networks are experiment 4's. Writes
`data/<profile>/audit/<part>-s<seed>.json`.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lib.data import Data, load_dataset
from lib.evaluation import threat_models
from lib.evaluation.sanity_checks import sanity_checks
from lib.evaluation.threat_models import AttackBudget
from lib.experiments import diffpure
from lib.pipeline.profile import read_params
from lib.utils.artifacts import results_dir
from lib.utils.device import to_model_device
from lib.utils.files import ROOT, write_json
from lib.utils.processes import print_in_any_locale


def budgets(p: dict) -> dict[str, AttackBudget]:
    """Return experiment 5's small and full budget, "sweep" and "full"."""
    efforts = {"sweep": (p["sweep_steps"], p["sweep_eot"]), "full": (p["pgd_steps"], p["eot"])}
    return {name: AttackBudget(*effort, draws=p["draws"], queries=p["queries"]) for name, effort in efforts.items()}


def attack_teacher(p: dict, data: Data, models: Path, classifier: nn.Module, seed: int, count: int) -> dict[str, Any]:
    """Return what exact gradients with the small and with the full budget leave of the teacher, on `count` images."""
    x, y = to_model_device(classifier, *diffpure.evaluation_images(data, count, seed)[0])
    defence = diffpure.build_defence(models, p["teacher"], classifier, pixels=x.numel())
    results: dict[str, Any] = {"teacher": p["teacher"], "eps": p["eps"], "n_test": count}
    for name, budget in budgets(p).items():
        result = threat_models.evaluate_under_attack("exact", defence, x, y, eps=p["eps"], budget=budget, seed=seed)
        results[name] = result | {"budget": budget._asdict()}
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
    classifier = diffpure.train_classifiers(data, seed, p["classifier_widths"][:1], **recipe)[0]
    return AUDITS[part](p, data, results_dir(params["profile"], "models") / f"diff-s{seed}", classifier, seed, count)


def main(arguments: list[str] | None = None) -> None:
    """Attack or examine the teacher of one seed of the profile in params.yaml."""
    print_in_any_locale()
    parser = argparse.ArgumentParser(prog="python -m lib.pipeline.audit", description=main.__doc__)
    parser.add_argument("part", choices=AUDITS)
    parser.add_argument("--seed", type=int, default=0, help="of experiment 4's networks")
    parser.add_argument("--points", type=int, default=16, help="test images")
    args = parser.parse_args(arguments)
    params = read_params()
    target = results_dir(params["profile"], "audit") / f"{args.part}-s{args.seed}.json"
    write_json(target, run_audit(args.part, params, args.seed, args.points))
    print(f"{target.relative_to(ROOT)} is written")


if __name__ == "__main__":
    main()
