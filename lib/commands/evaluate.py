"""Evaluate a defence: `python -m lib evaluate MODEL`, see `--help`.

A random defence meets experiment 5's matched set of attacks: exact gradients averaged over the noise, simpler attacks
beside them, the worst image of each example chosen on other draws than those that measure it. A deterministic one, with
a purifier or without, meets AutoAttack's four attacks. Beside every number under attack stands the one without.
"""

import argparse
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lib.commands import named
from lib.data import Split
from lib.evaluation.attack_plan import EvaluationSettings
from lib.evaluation.matched_attacks import AttackEffort, MeasuringDraws, correct_draws, matched_attacks
from lib.evaluation.robust_accuracy import TOLERANCE, evaluate_attacks
from lib.evaluation.thresholds import CHECKS
from lib.experiments.diffpure import worst_of_set
from lib.experiments.robust_distillation import autoattack_set
from lib.pipeline.provenance import device_name, git_state
from lib.purified_classifier import PurifiedClassifier
from lib.report import statistics
from lib.report.answers import answer_values
from lib.utils.draws import MATCHED, N_DRAWS, NO_ATTACK, pack_draws
from lib.utils.files import atomic_path, check_writable, to_jsonable, write_json
from lib.utils.intervals import wilson
from lib.utils.validation import Integer, Positive, PositiveInt, check_value


class Effort(NamedTuple):
    """How hard an evaluation attacks and how often it measures.

    `each`: draws of a random defence on every attack's images, before the worst is chosen; `steps`, `queries`,
    `targets`: of AutoAttack.
    """

    attack: AttackEffort
    draws: MeasuringDraws
    each: int
    steps: int
    queries: int
    targets: int


EFFORTS = {
    "quick": Effort(AttackEffort(3, 2, 10, 2, 4), MeasuringDraws(2, 2, 2, 10), 2, 10, 50, 3),
    "standard": Effort(AttackEffort(16, 4, 200, 16, 16), MeasuringDraws(4, 4, 16, 32), 10, 100, 5000, 9),
}
REPORTED = {  # of the JSON: condition, measure, what it is in words
    "clean": (NO_ATTACK, "accuracy", "no attack, average over draws"),
    "control": (NO_ATTACK, "worst_of_10", "no attack, right in ten of ten draws (control)"),
    "robust": (MATCHED, "accuracy", "under attack, average over draws"),
    "worst_of_10": (MATCHED, "worst_of_10", "under attack, right in ten of ten draws"),
    "attack_induced_loss": (MATCHED, "loss", "attack-induced loss"),
}
ManyDraws = Annotated[Integer, Field(ge=N_DRAWS)]
WEAKER = re.compile(r" leaves .* only ")  # of a warning that one attack did worse than a simpler one
RED = 3  # exit status of an evaluation whose own checks speak against it


def measure_answers(answers: Mapping[str, Any], numbers: list[int]) -> dict[str, dict[str, float]]:
    """Return every measure of `REPORTED` with its 95 % interval over images, as shares.

    Args:
        answers: condition → packed draws, see `lib.utils.draws.pack_draws`.
        numbers: of the images.

    Returns:
        Measure → value, low, high: Wilson's interval where each image is right or wrong, else Student's.
    """
    out = {}
    for name, (condition, measure, _) in REPORTED.items():
        values = answer_values(answers, condition, measure)
        if np.isin(values, (0, 1)).all():
            low, high = wilson(int(values.sum()), len(values))
        else:
            estimate = statistics.estimate_images([values], [np.asarray(numbers)], resamples=0)
            low, high = np.clip(statistics.interval(estimate), -1.0 if name.endswith("loss") else 0.0, 1.0).tolist()
        out[name] = {"value": float(values.mean()), "low": low, "high": high}
    return out


def attack_defence_by(
    defence: PurifiedClassifier,
    coarse: PurifiedClassifier | None,
    points: Split,
    at: EvaluationSettings,
    effort: Effort,
    autoattack: bool,
    resume: Path | None,
) -> tuple[dict[str, Any], Tensor]:
    """Attack a defence.

    Args:
        defence: a purified classifier.
        coarse: the same with few steps, on which the attacks are made; None for itself.
        points: images and labels.
        at: ball, seed, batch size and draws.
        effort: of the attacks.
        autoattack: whether by AutoAttack's attacks on a deterministic defence, else by the matched set.
        resume: folder where finished batches are saved; None for none.

    Returns:
        The record of `lib.evaluation.robust_accuracy`, and the worst images (n, c, h, w).
    """
    if autoattack:
        entries = autoattack_set(effort.steps, effort.queries, effort.targets)
    else:
        entries = matched_attacks(defence, effort.attack, at.seed, coarse)
    record, images = evaluate_attacks(defence, entries, *points, at, resume_dir=resume)
    worst = []
    for rows in torch.arange(len(points.y), device=points.y.device).split(at.batch_size):
        candidates, few = {label: x[rows] for label, x in images.items()}, [t[rows] for t in points]
        chosen = worst_of_set(defence, coarse is not None, candidates, few, at, effort.attack, effort.draws)
        worst.append(chosen[1].images)
    return record, torch.cat(worst)


def red_marks(record: Mapping[str, Any]) -> list[str]:
    """Return what speaks against the accuracy under attack: no gradient, answers that are not finite, strong noise.

    And gradients that lead nowhere: an attack that asks for none leaves clearly less (Carlini et al. 2019).
    """
    red, robust = [text for text in record["warnings"] if not WEAKER.search(text)], record["robust"]
    noise = robust.get("control_noise")
    if noise is not None and robust["accuracy"] > noise + TOLERANCE:
        red.append(f"all attacks together leave {robust['accuracy']:.1%}, noise of the same radius only {noise:.1%}")
    left: dict[bool, list[float]] = {True: [], False: []}
    for row in record["attacks"].values():
        left[row["backward"] > 0].append(row["accuracy"])
    if all(left.values()) and min(left[True]) > min(left[False]) + CHECKS["white-box vs Square"].threshold:
        text = (
            f"the best attack by gradients leaves {min(left[True]):.1%}, one without gradients {min(left[False]):.1%}"
        )
        red.append(f"{text}: masked gradients; run `python -m lib check`")
    return red


def multiply_adds(model: Callable, x: Tensor) -> int:
    """Return the multiplications with addition that an answer to one image (1, c, h, w) takes."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    return counter.get_total_flops() // 2


def evaluate_defence(
    defence: PurifiedClassifier,
    coarse: PurifiedClassifier | None,
    points: Split,
    numbers: list[int],
    at: EvaluationSettings,
    effort: Effort,
    autoattack: bool,
    resume: Path | None = None,
) -> tuple[dict[str, Any], Tensor]:
    """Return what an evaluation finds, as the JSON has it, and the worst images (n, c, h, w).

    Arguments: see `attack_defence_by`; `numbers`: the images' places in their source.
    """
    began = time.perf_counter()
    record, worst = attack_defence_by(defence, coarse, points, at, effort, autoattack, resume)
    conditions = {NO_ATTACK: points.x, MATCHED: worst}
    draws = {
        name: correct_draws(defence, x, points.y, effort.draws.fresh, at.seed, f"evaluate/{name}")[0]
        for name, x in conditions.items()
    }
    answers = {name: pack_draws(right) for name, right in draws.items()}
    attacks = {
        label: {key: row[key] for key in ("accuracy", "forward", "backward", "no_gradient")}
        for label, row in record["attacks"].items()
    }
    out = {
        "n": len(numbers),
        "random": defence.random,
        "draws": len(draws[NO_ATTACK]),
        "measures": measure_answers(answers, numbers),
        "attacks": attacks,
        "red": red_marks(record),
        "notes": [text for text in record["warnings"] if WEAKER.search(text)],
        "not_finite": record["not_finite"],
        "gradients_per_image": sum(row["backward"] for row in attacks.values()) / len(numbers),
        "number_forward_passes": defence.evaluations,
        "multiply_adds": multiply_adds(defence, points.x[:1]),
        "outcomes": {"images": numbers, "correct": answers},
        "seconds": time.perf_counter() - began,
    }
    return out, worst


def effort_facts(effort: Effort, autoattack: bool) -> dict[str, Any]:
    """Return the numbers of an effort that an evaluation used."""
    facts = {"steps": effort.steps, "queries": effort.queries, "targets": effort.targets}
    facts = facts if autoattack else effort.attack._asdict()
    return facts | {f"{name}_draws": n for name, n in effort.draws._asdict().items()}


def robustbench_fields(result: Mapping[str, Any], official: bool) -> dict[str, str]:
    """Return the accuracies in RobustBench's fields, % as text: `autoattack_acc` by AutoAttack's own budgets alone."""
    shown = {name: f"{100 * result['measures'][name]['value']:.2f}" for name in ("clean", "robust")}
    return {"clean_acc": shown["clean"]} | ({"autoattack_acc": shown["robust"]} if official else {})


def write_adversarial(path: Path, x: Tensor, y: Tensor) -> None:
    """Write images (n, c, h, w) and labels (n,) as the arrays x and y of an .npz file."""
    with atomic_path(path) as part, part.open("wb") as file:
        np.savez_compressed(file, x=x.cpu().numpy(), y=y.cpu().numpy())


def percent_interval(measure: Mapping[str, float]) -> str:
    """Return a measure in % with its interval: 73.3 [60.1, 86.5]."""
    value, low, high = (100 * measure[key] for key in ("value", "low", "high"))
    return f"{value:.1f} [{low:.1f}, {high:.1f}]"


def evaluation_lines(result: Mapping[str, Any]) -> list[str]:
    """Return the result of an evaluation, line by line."""
    head = f"{result['name']}: {result['dataset']}, {result['norm']}, ε = {result['eps']:g}, {result['n']} images, "
    head += f"{result['draws']} draws" if result["random"] else "deterministic"
    lines = [head]
    for name, (_, _, words) in REPORTED.items():
        if not result["random"] and name in ("control", "worst_of_10"):
            continue  # equal to the average
        value, low, high = (100 * result["measures"][name][key] for key in ("value", "low", "high"))
        text = words if result["random"] else words.removesuffix(", average over draws")
        lines.append(f"  {text:48} {value:5.1f} {'points' if name.endswith('loss') else '%':6} [{low:.1f}, {high:.1f}]")
    lines.append(f"  {result['gradients_per_image']:.0f} gradients per image by {', '.join(result['attacks'])}")
    lines += [f"  note: {text}; the worst image of all attacks counts" for text in result["notes"]]
    return [*lines, *(f"  RED: {text}" for text in result["red"])]


def add_subject(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say which defence, images and ball."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a classifier of this repository (digits/natural), module:function, or robustbench:NAME",
    )
    parser.add_argument("--purifier", help="in front of it: digits/adaptive-1, or FOLDER/adaptive-1")
    parser.add_argument(
        "--data", required=True, help="a data set, an .npz file with x and y, or a folder of class folders"
    )
    parser.add_argument("--eps", required=True, help="radius of the ball, in pixel units, such as 8/255")
    parser.add_argument("--images", type=int, default=64, help="at most so many (default: 64)")
    parser.add_argument("--size", type=int, default=32, help="of a folder's images, in pixels (default: 32)")
    parser.add_argument("--channels", type=int, choices=(1, 3), default=3, help="of a folder's images (default: 3)")
    parser.add_argument("--seed", type=int, default=0, help="of the images and all noise (default: 0)")
    parser.add_argument("--json", type=Path, help="write the result to this file")


def read_subject(
    args: argparse.Namespace, norm: str = "Linf", fixed: int | None = None
) -> tuple[PurifiedClassifier, PurifiedClassifier | None, Split, list[int], float]:
    """Return defence, coarse defence, images, their numbers and the radius that arguments name, all checked."""
    eps = check_value("--eps", named.parse_radius(args.eps), Positive)
    count = check_value("--images", args.images, PositiveInt)
    if args.json:
        check_writable(args.json)
    points, numbers = named.load_images(args.data, count, args.seed, args.channels, args.size)
    model = named.named_model(args.model, args.data, norm)
    return *named.compose_defence(model, args.purifier, points.x, fixed), points, numbers, eps


def main() -> int:
    """Attack a defence and say what is left, with the control beside it and intervals over images.

    Exit status: 0; 1 for an error; 3 if attacks got no gradient, did worse than noise, or met answers that are not
    finite: then the accuracy under attack is no robustness.
    """
    example = "example: python -m lib evaluate digits/natural --purifier digits/adaptive-1 --data digits --eps 0.1"
    parser = argparse.ArgumentParser(prog="python -m lib evaluate", description=main.__doc__, epilog=example)
    add_subject(parser)
    parser.add_argument("--norm", choices=("Linf", "L2"), default="Linf", help="of the ball (default: Linf)")
    parser.add_argument("--effort", choices=EFFORTS, default="standard", help="quick: a look, no evidence")
    parser.add_argument("--draws", type=int, help="of a random defence on each image, at least 10")
    parser.add_argument("--batch-size", type=int, default=256, help="images at once (default: 256)")
    parser.add_argument("--attacks", choices=("auto", "matched", "autoattack"), default="auto")
    parser.add_argument("--resume", type=Path, help="folder for finished batches: the same call goes on from there")
    parser.add_argument("--adversarial", type=Path, help="write the worst images to this .npz file, as x and y")
    args = parser.parse_args()
    effort = EFFORTS[args.effort]
    if args.draws is not None:
        fresh = check_value("--draws", args.draws, ManyDraws)
        effort = effort._replace(draws=effort.draws._replace(fresh=fresh))
    if args.adversarial:
        check_writable(args.adversarial)
    defence, coarse, points, numbers, eps = read_subject(args, args.norm)
    if args.attacks == "autoattack" and defence.random:
        raise ValueError("expected a deterministic defence for --attacks autoattack, got a random one: take matched")
    autoattack = args.attacks == "autoattack" or (args.attacks == "auto" and not defence.random)
    draws = 1 if not defence.random else effort.each if coarse is None else 2  # many steps are dear
    at = EvaluationSettings(eps=eps, norm=args.norm, seed=args.seed, batch_size=args.batch_size, draws=draws)
    answer, worst = evaluate_defence(defence, coarse, points, numbers, at, effort, autoattack, args.resume)
    result = named.describe(args.model, args.purifier) | {
        "dataset": args.data,
        "eps": eps,
        "norm": args.norm,
        "seed": args.seed,
        "protocol": {"attacks": "autoattack" if autoattack else "matched", "effort": args.effort}
        | effort_facts(effort, autoattack),
        "commit": git_state()[0],
        "device": device_name(),
        "torch": torch.__version__,
    }
    result |= answer | robustbench_fields(answer, autoattack and args.effort == "standard")
    print("\n".join(evaluation_lines(result)))
    if args.effort == "quick":
        print("  a quick look: the attacks are weak; for numbers take --effort standard and more images")
    if args.json:
        write_json(args.json, to_jsonable(result))
    if args.adversarial:
        write_adversarial(args.adversarial, worst, points.y)
    return RED if result["red"] else 0
