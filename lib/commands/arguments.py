"""The arguments that the commands share: which defence, which images, which ball, and how hard to attack."""

import argparse
import platform
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import Field

from lib.commands import named
from lib.data import Split
from lib.evaluation.attack_plan import EvaluationSettings
from lib.evaluation.matched_attacks import AttackEffort, MeasuringDraws
from lib.pipeline.provenance import device_name, git_state
from lib.purified_classifier import PurifiedClassifier
from lib.utils.draws import N_DRAWS
from lib.utils.files import check_writable
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
ManyDraws = Annotated[Integer, Field(ge=N_DRAWS)]
RED = 3  # exit status of a command whose own checks speak against what it measured


class AttackCall(NamedTuple):
    """What `evaluate` and `attack` attack: the first arguments of `lib.commands.evaluate.evaluate_defence`.

    `coarse`: the defence with few steps, on which attacks are made, or None; `numbers`: of the images in their source;
    `autoattack`: whether by AutoAttack's attacks, else by the matched set.
    """

    defence: PurifiedClassifier
    coarse: PurifiedClassifier | None
    points: Split
    numbers: list[int]
    at: EvaluationSettings
    effort: Effort
    autoattack: bool


def add_subject(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say which defence, images and ball."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a classifier of this repository (digits/natural), module:function, or robustbench:NAME",
    )
    parser.add_argument("--purifier", help="in front of it: digits/adaptive-1, or FOLDER/adaptive-1")
    parser.add_argument(
        "--data",
        required=True,
        help="a data set, an .npz file with x and y, a folder of class folders, or module:function of a torch Dataset",
    )
    parser.add_argument("--eps", required=True, help="radius of the ball, in pixel units, such as 8/255")
    parser.add_argument("--norm", choices=("Linf", "L2"), default="Linf", help="of the ball (default: Linf)")
    parser.add_argument("--images", type=int, default=64, help="at most so many (default: 64)")
    where = f"a named model's, else {named.SIZE}"
    parser.add_argument("--size", type=int, help=f"of one's own images, in pixels (default: {where} for a folder)")
    where = f"a named model's, else {named.CHANNELS}"
    parser.add_argument("--channels", type=int, choices=(1, 3), help=f"of one's own images (default: {where})")
    parser.add_argument("--seed", type=int, default=0, help="of the images and all noise (default: 0)")


class AttackSubject(NamedTuple):
    """Defence, coarse defence, images, their numbers in their source and the radius that arguments name.

    `images`: what a record says of the images, see `lib.commands.named.draw_images`.
    """

    defence: PurifiedClassifier
    coarse: PurifiedClassifier | None
    points: Split
    numbers: list[int]
    eps: float
    images: dict[str, Any]


def read_subject(args: argparse.Namespace) -> AttackSubject:
    """Return what the arguments of `add_subject` name, all checked; ValueError for what cannot be attacked."""
    eps = check_value("--eps", named.parse_radius(args.eps), Positive)
    count = check_value("--images", args.images, PositiveInt)
    size = check_value("--size", args.size, PositiveInt | None)
    form = named.image_form(args.model, args.purifier)
    points, numbers, images = named.draw_images(args.data, count, args.seed, args.channels or form[0], size or form[1])
    model = named.named_model(args.model, args.data, args.norm)
    return AttackSubject(*named.compose_defence(model, args.purifier, points.x), points, numbers, eps, images)


def check_outputs(*paths: Path | None) -> None:
    """Check that every file that is asked for can be written, before the work whose result it is to hold."""
    for path in paths:
        if path is not None:
            check_writable(path)


def add_attack(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say how hard to attack and where to go on from."""
    parser.add_argument("--effort", choices=EFFORTS, default="standard", help="quick: a look, no evidence")
    parser.add_argument("--draws", type=int, help="of a random defence on each image, at least 10")
    parser.add_argument("--batch-size", type=int, default=256, help="images at once (default: 256)")
    parser.add_argument("--attacks", choices=("auto", "matched", "autoattack"), default="auto")
    parser.add_argument("--resume", type=Path, help="folder for finished batches: the same call goes on from there")


def read_attack(args: argparse.Namespace) -> tuple[AttackCall, dict[str, Any]]:
    """Return what `add_subject` and `add_attack` ask for, and what a record says of the images.

    ValueError for what cannot be attacked.
    """
    effort = EFFORTS[args.effort]
    if args.draws is not None:
        fresh = check_value("--draws", args.draws, ManyDraws)
        effort = effort._replace(draws=effort.draws._replace(fresh=fresh))
    size = check_value("--batch-size", args.batch_size, PositiveInt)
    defence, coarse, points, numbers, eps, images = read_subject(args)
    if args.attacks == "autoattack" and defence.random:
        raise ValueError("expected a deterministic defence for --attacks autoattack, got a random one: take matched")
    autoattack = args.attacks == "autoattack" or (args.attacks == "auto" and not defence.random)
    draws = 1 if not defence.random else effort.each if coarse is None else 2  # many steps are dear
    at = EvaluationSettings(eps=eps, norm=args.norm, seed=args.seed, batch_size=size, draws=draws)
    return AttackCall(defence, coarse, points, numbers, at, effort, autoattack), images


def effort_facts(effort: Effort, autoattack: bool) -> dict[str, Any]:
    """Return the numbers of an effort that an evaluation used."""
    facts = {"steps": effort.steps, "queries": effort.queries, "targets": effort.targets}
    facts = facts if autoattack else effort.attack._asdict()
    return facts | {f"{name}_draws": n for name, n in effort.draws._asdict().items()}


def call_facts(args: argparse.Namespace, call: AttackCall, images: dict[str, Any]) -> dict[str, Any]:
    """Return what a record says of the call that made it: defence, images, ball, protocol, code and versions."""
    return named.describe(args.model, args.purifier) | {
        "dataset": args.data,
        "source": images,
        "eps": call.at.eps,
        "norm": call.at.norm,
        "seed": call.at.seed,
        "protocol": {"attacks": "autoattack" if call.autoattack else "matched", "effort": args.effort}
        | effort_facts(call.effort, call.autoattack),
        "commit": git_state()[0],
        "command": f"python -m lib {shlex.join(sys.argv)}",
        "device": device_name(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
