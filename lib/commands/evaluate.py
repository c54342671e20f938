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
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lib.commands import arguments
from lib.commands.arguments import RED, Effort
from lib.commands.check import check_lines, run_checks
from lib.commands.image_sources import write_adversarial
from lib.commands.measures import evaluation_lines, measure_answers, robustbench_fields
from lib.commands.pictures import picture_rows
from lib.data import Split
from lib.evaluation.attack_plan import EvaluationSettings
from lib.evaluation.matched_attacks import LAST, matched_attacks
from lib.evaluation.outcomes import passes_per_batch, repeated_predictions
from lib.evaluation.robust_accuracy import TOLERANCE, evaluate_attacks
from lib.evaluation.thresholds import CHECKS
from lib.experiments.diffpure import worst_of_set
from lib.experiments.robust_distillation import autoattack_set
from lib.purified_classifier import PurifiedClassifier
from lib.utils.draws import MATCHED, NO_ATTACK, pack_draws
from lib.utils.files import write_json
from lib.utils.progress import tqdm
from lib.utils.random_state import seeded_noise
from lib.utils.seeds import derive_seed

CHECKED = 100  # images of the sanity checks, which resolve one point
CONDITIONS = {NO_ATTACK: "x", MATCHED: "x_adv"}  # and the images of each in a file of attacked images
WEAKER = re.compile(r" leaves .* only ")  # of a warning that one attack did worse than a simpler one


class WorstCase(NamedTuple):
    """The worst image of each example, the label of the attack that it comes from, and answers by condition.

    `answers`: classes (draws, n), `lib.models.NO_CLASS` where an answer is not finite.
    """

    images: Float[Tensor, "n c h w"]
    attacks: list[str]
    answers: dict[str, Int[Tensor, "draws n"]]


def attack_defence_by(
    defence: PurifiedClassifier,
    coarse: PurifiedClassifier | None,
    points: Split,
    at: EvaluationSettings,
    effort: Effort,
    autoattack: bool,
    resume: Path | None,
) -> tuple[dict[str, Any], Tensor, list[str]]:
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
        The record of `lib.evaluation.robust_accuracy`, the worst images (n, c, h, w), and which attack made each.
    """
    if autoattack:
        entries = autoattack_set(effort.steps, effort.queries, effort.targets)
    else:
        entries = matched_attacks(defence, effort.attack, at.seed, coarse)
    record, images = evaluate_attacks(defence, entries, *points, at, resume_dir=resume)
    worst, labels = [], []
    batches = torch.arange(len(points.y), device=points.y.device).split(at.batch_size)
    for rows in tqdm(batches, desc=LAST, unit="batch"):
        candidates, few = {label: x[rows] for label, x in images.items()}, [t[rows] for t in points]
        first, last = worst_of_set(defence, coarse is not None, candidates, few, at, effort.attack, effort.draws)
        worst.append(last.images)
        labels += [late if late == LAST else early for early, late in zip(first.labels, last.labels, strict=True)]
    return record, torch.cat(worst), labels


def answer_classes(defence: PurifiedClassifier, x: Tensor, draws: int, seed: int, purpose: str) -> Tensor:
    """Return the classes that a defence answers, (draws, n), by the noise of `correct_draws`; one draw where all agree.

    Arguments: see `lib.evaluation.matched_attacks.correct_draws`.
    """
    draws = draws if defence.random else 1
    with seeded_noise(defence, derive_seed(seed, f"draws/{purpose}"), x.device):
        return repeated_predictions(defence, x, draws, passes_per_batch(defence, x, draws, graph=False))


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
) -> tuple[dict[str, Any], WorstCase]:
    """Return what an evaluation finds, as the JSON has it, and the worst images.

    Arguments: see `attack_defence_by`; `numbers`: the images' places in their source.
    """
    began = time.perf_counter()
    record, images, labels = attack_defence_by(defence, coarse, points, at, effort, autoattack, resume)
    classes = {
        name: answer_classes(defence, x, effort.draws.fresh, at.seed, f"evaluate/{name}")
        for name, x in zip(CONDITIONS, (points.x, images), strict=True)
    }
    answers = {name: pack_draws((some == points.y).cpu().numpy()) for name, some in classes.items()}
    attacks = {
        label: {key: row[key] for key in ("accuracy", "forward", "backward", "no_gradient")}
        for label, row in record["attacks"].items()
    }
    out = {
        "n": len(numbers),
        "random": defence.random,
        "draws": len(classes[NO_ATTACK]),
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
    return out, WorstCase(images, labels, classes)


def run_evaluation(args: argparse.Namespace) -> tuple[dict[str, Any], WorstCase, arguments.AttackCall]:
    """Return the record of the evaluation that arguments ask for, the worst images, and what was attacked."""
    call, images = arguments.read_attack(args)
    answer, worst = evaluate_defence(*call, args.resume)
    official = call.autoattack and args.effort == "standard"
    result = arguments.call_facts(args, call, images) | answer | robustbench_fields(answer, official)
    result["pictures"] = picture_rows(call.defence, call.points, worst.images, worst.answers, call.at.seed)
    return result, worst, call


def save_adversarial(path: Path, result: Mapping[str, Any], worst: WorstCase, points: Split) -> None:
    """Write images, attacked images, labels, answers of both by draw, and what they were made by, as an .npz file."""
    arrays = {"x": points.x, "x_adv": worst.images, "y": points.y, "numbers": result["outcomes"]["images"]}
    arrays |= {f"answers_{CONDITIONS[name]}": classes for name, classes in worst.answers.items()}
    arrays |= {"made_by": worst.attacks, "attacks": list(result["attacks"]), "command": result["command"]}
    write_adversarial(path, arrays | {key: result[key] for key in ("name", "eps", "norm", "seed", "commit")})


def page_writer() -> Callable[[Path, dict[str, Any]], None]:
    """Return what writes an evaluation as a page; its figures need matplotlib, which is no part of the core."""
    from lib.commands.report import save_page

    return save_page


def main() -> int:
    """Attack a defence and say what is left, with the control beside it and intervals over images.

    Exit status: 0; 1 for an error; 3 if attacks got no gradient, did worse than noise, or met answers that are not
    finite: then the accuracy under attack is no robustness; or if a sanity check is red.
    """
    parser = argparse.ArgumentParser(prog="python -m lib evaluate", description=main.__doc__)
    arguments.add_subject(parser)
    arguments.add_attack(parser)
    parser.add_argument("--checks", action="store_true", help="run the sanity checks too, see check")
    parser.add_argument("--json", type=Path, help="write the result to this file")
    parser.add_argument("--html", type=Path, help="write the result, with --checks, as a page to this file, see report")
    parser.add_argument("--adversarial", type=Path, help="write the worst images to this .npz file, see attack")
    args = parser.parse_args()
    arguments.check_outputs(args.json, args.html, args.adversarial)
    write_page = page_writer() if args.html else None  # before the work
    result, worst, call = run_evaluation(args)
    print("\n".join(evaluation_lines(result)))
    if args.effort == "quick":
        print("  a quick look: the attacks are weak; for numbers take --effort standard and more images")
    if args.checks or args.html:
        some = Split(*(t[:CHECKED] for t in call.points))
        try:
            checks = run_checks(call.defence, some, result["eps"], call.at.norm, call.at.seed, "quick")
        except ValueError as error:  # no image is right
            checks = []
            result["notes"].append(f"no sanity checks: {error}")
        result["checks"], result["protocol"]["checked_images"] = checks, len(some.y)
        print("\n".join([f"sanity checks, {len(some.y)} images, quick:", *check_lines(checks)]))
    if args.json:
        write_json(args.json, result)
    if write_page:
        write_page(args.html, result)
    if args.adversarial:
        save_adversarial(args.adversarial, result, worst, call.points)
    return RED if result["red"] or any(row["flag"] for row in result.get("checks", ())) else 0
