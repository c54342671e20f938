"""What `dvc repro` cannot afford to ask of the teacher on two cores: `python -m lib.audit`, half an hour and more.

Experiment 5 attacks DiffPure's 100 steps by exact gradients with the small budget, since each gradient costs a hundred
times a student's. Here the first of the same test images meet the full budget too ("attack"), and `lib.diagnose` is put
to the teacher ("diagnosis"). The networks are experiment 4's. Writes `data/<profile>/audit/<part>-s<seed>.json`.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from lib import dp, threats
from lib.data import Data, Split, load
from lib.diagnose import diagnose
from lib.paths import ROOT, write_json
from lib.results import folder
from lib.threats import Budget


def attack(p: dict, data: Data, models: Path, judge: nn.Module, seed: int, count: int) -> dict[str, Any]:
    """Returns what exact gradients with the small and with the full budget leave of the teacher, on `count` points."""
    x, y = (t.to(dp.device()) for t in dp.points(data, count, seed))
    memory = x.numel() * dp.evaluations(p["teacher"]) > threats.GRAPH
    defence = dp.defended(models, p["teacher"], judge, save_memory=memory)
    budgets = {"sweep": (p["sweep_steps"], p["sweep_eot"]), "full": (p["pgd_steps"], p["eot"])}
    found: dict[str, Any] = {"teacher": p["teacher"], "eps": p["eps"], "n_test": count}
    for name, (steps, eot) in budgets.items():
        budget = Budget(steps, eot, draws=p["draws"], queries=p["queries"])
        row = threats.face("exact", defence, x, y, eps=p["eps"], budget=budget, seed=seed)
        found[name] = row | {"budget": budget._asdict()}
    return found


def diagnosis(p: dict, data: Data, models: Path, judge: nn.Module, seed: int, count: int) -> dict[str, Any]:
    """Returns the table of `lib.diagnose` for the teacher with its noise fixed, as lists, on `count` test images."""
    some = Split(data.test.x[:count], data.test.y[:count])
    fixed = dp.defended(models, p["teacher"], judge, fixed=seed)
    table = diagnose(fixed, *some, eps=p["eps"], seed=seed, surrogate=judge)[["check", "measured", "threshold", "flag"]]
    return {"teacher": p["teacher"], "n_diagnosed": count, "red": int(table["flag"].sum()), **table.to_dict("list")}


PARTS: dict[str, Callable[..., dict]] = {"attack": attack, "diagnosis": diagnosis}


def main(arguments: list[str] | None = None) -> None:
    """Attacks or diagnoses the teacher of one seed of the profile in params.yaml."""
    parser = argparse.ArgumentParser(prog="python -m lib.audit", description=main.__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--seed", type=int, default=0, help="of experiment 4's networks")
    parser.add_argument("--points", type=int, default=16, help="test images")
    asked = parser.parse_args(arguments)
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    profile, p = params["profile"], params["dp"]
    torch.set_num_threads(params["threads"] or torch.get_num_threads())
    data = load(params["data"]["dataset"], n_labels=params["data"]["train_images"] or None, seed=asked.seed)
    models = folder(profile, "models") / f"diff-s{asked.seed}"
    recipe = {"epochs": p["classifier_epochs"], "lr": p["classifier_lr"]}
    judge = dp.judges(data, asked.seed, p["classifier_widths"][:1], **recipe)[0]
    target = folder(profile, "audit") / f"{asked.part}-s{asked.seed}.json"
    write_json(target, PARTS[asked.part](p, data, models, judge, asked.seed, asked.points))
    print(f"{target.relative_to(ROOT)} is written")


if __name__ == "__main__":
    main()
