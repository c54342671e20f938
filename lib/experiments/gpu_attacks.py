"""The attacks on large networks, in pieces of minutes on a GPU: what they measure lies in `data/<data set>/pieces`.

Each file holds accuracies, and outcomes per image as a record has them, so that differences between defences can be
paired. An interrupted piece goes on after the last defence. `python -m lib.pipeline.pieces` runs them.
"""

import shutil
import time
from pathlib import Path
from typing import Any

from lib import pretrained
from lib.data import Data, Split
from lib.evaluation.matched_attacks import AttackEffort, MeasuringDraws
from lib.experiments import diffpure, diffpure_metrics
from lib.experiments.diffpure_students import NATURAL, TRADES
from lib.experiments.gpu_diffusion import PROGRESSIVE, PURIFIED, PURIFIED_BY
from lib.experiments.gpu_pieces import DEFENDED, DIFFUSION, PieceBudget
from lib.experiments.robust_distillation import autoattack_set, evaluate_robustness
from lib.experiments.samples import evaluation_images, record_outcomes
from lib.utils.artifacts import results_dir
from lib.utils.code_hash import fingerprint
from lib.utils.device import default_device
from lib.utils.files import to_jsonable, write_json

AUTOATTACK, MATCHED_SET = "autoattack", "matched"  # first parts of the names of pieces
STUDENTS, TEACHER = "students", "teacher"  # second parts of those of the matched set
TEACHER_SHARE = 4  # a purifier of a hundred steps meets one of so many images


def measured_file(dataset: str, name: str) -> Path:
    """Return the file of what a piece measures, such as `matched/students`."""
    return results_dir(dataset, "pieces") / f"{name.replace('/', '-')}.json"


def write_measured(
    data: Data, name: str, start: float, settings: dict[str, Any], origin: dict[str, Any], **results: Any
) -> None:
    """Write what a piece measured, with the entries of a card."""
    about = origin | {"data": {"data set": data.name}, "recipe": settings, "limits": "one seed of networks and attacks"}
    about |= {"minutes": (time.perf_counter() - start) / 60}
    write_json(measured_file(data.name, name), to_jsonable(about | results))


def first_images(data: Data, count: int, seed: int) -> tuple[Split, list[int]]:
    """Return so many test images, or all there are, and their numbers; fewer are the first of more."""
    return evaluation_images(data, min(count, len(data.test.y)), seed)


def measure_robustness(
    name: str, data: Data, settings: dict[str, Any], budget: PieceBudget, origin: dict[str, Any]
) -> None:
    """Attack a classifier by AutoAttack's four attacks.

    `settings`: of experiment 3: eps, steps, queries, targets and the number of test images.
    """
    start, net = time.perf_counter(), pretrained.load_classifier(f"{data.name}/{name}").to(default_device())
    images, numbers = first_images(data, settings["test_points"], budget.seed)
    effort = {key: settings[key] for key in ("steps", "queries", "targets")}
    result = evaluate_robustness(net, images, budget.seed, settings["eps"], autoattack_set(**effort))
    outcomes = record_outcomes(numbers, {name: result.pop("outcomes")})
    recipe = effort | {"eps": settings["eps"], "seed": budget.seed}
    write_measured(data, f"{AUTOATTACK}/{name}", start, recipe, origin, metrics=result, outcomes=outcomes)


def matched_defences(part: str, settings: dict[str, Any]) -> list[diffpure.Defence]:
    """Return the defences of a part of the matched set: without long purifiers, or all of them.

    They are those of experiment 5, the one-step students of distillation alone, and the classifier that was fine-tuned
    on purified images, behind the student that purified them.
    """
    plan = diffpure.defence_plan(settings["teacher"], 1, ["label", "label-n0"], [TRADES])
    plan += [diffpure.Defence(*d) for d in ((PURIFIED_BY,), (PURIFIED_BY, PURIFIED), (f"{PROGRESSIVE}-1",))]
    return plan if part == TEACHER else [d for d in plan if diffpure.coarse_name(d.purifier) is None]


def measure_matched(
    part: str, data: Data, settings: dict[str, Any], budget: PieceBudget, origin: dict[str, Any]
) -> None:
    """Attack defences by the matched set, before ResNet-18, the fine-tuned one and TRADES' ResNet-18.

    `part`: "students" for all but the long purifiers, on all images of the settings, "teacher" for all on a fourth of
    them; `settings`: of experiment 5.
    """
    start, plan = time.perf_counter(), matched_defences(part, settings)
    source = pretrained.pretrained_folder(f"{data.name}/{DIFFUSION}")
    names = {NATURAL: DEFENDED, PURIFIED: f"{DEFENDED}-{PURIFIED}", TRADES: f"{DEFENDED}-trades"}
    classifiers = {key: pretrained.load_classifier(f"{data.name}/{name}") for key, name in names.items()}
    count = settings["test_points"] // (TEACHER_SHARE if part == TEACHER else 1)
    images, numbers = first_images(data, max(1, count), budget.seed)
    effort = AttackEffort(*(settings[k] for k in ("attack_steps", "eot", "queries", "last_steps", "last_eot")))
    draws = MeasuringDraws(*(settings[k] for k in ("first_draws", "finalists", "second_draws", "fresh_draws")))
    weights = [path.read_bytes() for path in sorted(source.glob("*/*.safetensors"))]
    key = fingerprint(part, list(map(str, plan)), effort, draws, numbers, settings["eps"], *weights)
    work = results_dir(data.name, "checkpoints") / f"{MATCHED_SET}-{part}-{key}"
    if not work.exists():
        shutil.copytree(source, work)
    results = diffpure.run_matched_set(
        plan, work, classifiers, images, eps=settings["eps"], effort=effort, draws=draws, seed=budget.seed
    )
    metrics = {"n_test": len(numbers), "defences": diffpure_metrics.defence_metrics(plan, results)}
    outcomes = record_outcomes(numbers, {name: result["correct"] for name, result in results.items()})
    recipe = {"eps": settings["eps"], "effort": effort._asdict(), "draws": draws._asdict(), "seed": budget.seed}
    write_measured(data, f"{MATCHED_SET}/{part}", start, recipe, origin, metrics=metrics, outcomes=outcomes)
    shutil.rmtree(work)
