"""Strength of attacks per gradient: what each schedule leaves of random defences, on the same images and fresh draws.

    python -m tests.bench.bench_schedules [--defences adaptive-1 ddim-1] [--seed 0] [--images 100] [--json FILE]

Networks are those of experiment 5 in the profile of params.yaml. Images are of the validation split, which chooses the
schedule; the test split reports.
"""

import argparse
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from lib.attacks.eot_pgd import annealed_pgd, eot_pgd
from lib.data import load_dataset
from lib.evaluation.matched_attacks import correct_draws
from lib.experiments import diffpure
from lib.pipeline.profile import read_params
from lib.utils.artifacts import results_dir
from lib.utils.draws import image_measures
from lib.utils.files import write_json
from lib.utils.random_state import seeded_noise
from lib.utils.seeds import derive_seed

CONSTANT = ((16, 4), (50, 16), (100, 16))  # steps of one size, the best point by its estimated loss
ANNEALED = ((16, 1), (32, 1), (16, 4), (64, 1), (32, 4), (64, 4))  # shrinking steps, the last point


def schedules() -> Iterator[tuple[str, int, partial]]:
    """Yield the name of each schedule, its gradients per image, and the attack."""
    for steps, draws in CONSTANT:
        yield f"constant {steps}x{draws}", steps * draws, partial(eot_pgd, steps=steps, draws=draws, at_once=draws)
    for loss in ("ce", "margin"):
        for steps, draws in ANNEALED:
            attack = partial(annealed_pgd, steps=steps, draws=draws, at_once=draws, loss=loss)
            yield f"annealed {steps}x{draws} {loss}", steps * draws, attack


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--defences", nargs="+", default=["adaptive-1", "ddim-1"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--draws", type=int, default=100)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    params = read_params()
    p, data = params["dp"], load_dataset(params["data"]["dataset"], seed=args.seed)
    recipe = {"epochs": p["classifier_epochs"], "lr": p["classifier_lr"]}
    classifier = diffpure.train_defended(data, args.seed, p["classifier_width"], **recipe)
    models = results_dir(params["profile"], "models") / f"dp-s{args.seed}"
    x, y = data.val.x[: args.images], data.val.y[: args.images]
    rows = []
    for name in args.defences:
        defence = diffpure.build_defence(models, name, classifier)
        for label, gradients, attack in schedules():
            with seeded_noise(defence, derive_seed(args.seed, "schedules"), x.device):
                x_adv = attack(defence, x, y, p["eps"], "Linf", args.seed)
            left = image_measures(correct_draws(defence, x_adv, y, args.draws, args.seed, "schedules")[0])
            row = {"defence": name, "schedule": label, "gradients": gradients, "n": len(y), "draws": args.draws}
            rows.append(row | {key: float(value.mean()) for key, value in left.items()})
            shown = f"accuracy {rows[-1]['accuracy']:.2%}, worst of ten {rows[-1]['worst_of_10']:.2%}"
            print(f"{name}: {label}, {gradients} gradients: {shown}", flush=True)
    if args.json:
        write_json(args.json, rows)


if __name__ == "__main__":
    main()
