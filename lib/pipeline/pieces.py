"""CIFAR-10 in pieces of minutes on one GPU: `python -m lib.pipeline.pieces`.

Without names the command says which pieces are done, with measured minutes; with names it runs them, in the order of
the table: trainings write to `data/pretrained`, attacks to `data/<data set>/pieces`. A piece needs those named beside
it, from this call or an earlier one. Settings are those of the profile; on a CPU a piece of full length takes days.
"""

import argparse
import shlex
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from lib import pretrained
from lib.data import Data, Split, load_dataset
from lib.diffusion.network_files import CARD, FACTS, RECIPE
from lib.distillation.few_step import few_step_recipe
from lib.experiments import gpu_attacks, gpu_diffusion, gpu_distillation, gpu_pieces
from lib.experiments.gpu_attacks import AUTOATTACK, MATCHED_SET, STUDENTS, TEACHER
from lib.experiments.gpu_diffusion import PROGRESSIVE, PURIFIED
from lib.experiments.gpu_distillation import LABEL_COUNTS, TEMPERATURES
from lib.experiments.gpu_pieces import DEFENDED, DIFFUSION, PieceBudget
from lib.experiments.robust_distillation import AdversarialRecipe
from lib.pipeline.profile import compose_profile
from lib.pipeline.provenance import device_name, git_state
from lib.utils.files import read_json
from lib.utils.processes import print_in_any_locale

RESNET18, ROBUST_TEACHER = "resnet18", "resnet50-trades"


class Piece(NamedTuple):
    """One training or attack: its name, what it is, planned minutes of an H100, what it needs, how it is made."""

    name: str
    title: str
    minutes: float
    needs: tuple[str, ...]
    make: Callable[[Data, dict[str, Any], PieceBudget, dict[str, Any]], None]


def robust_recipe(settings: dict[str, Any], arch: str) -> AdversarialRecipe:
    """Return the recipe of the profile's experiment 3 for an architecture: its student's, or its teacher's."""
    role = "teacher" if arch == settings["teacher"] else "student"
    shared = {key: settings[key] for key in ("batch_size", "eps", "optimizer", "weight_decay", "shift", "flip")}
    shared |= {key: settings[key] for key in ("ema", "precision")}
    epochs = settings["teacher_epochs" if role == "teacher" else "epochs"]
    width, lr = settings[f"{role}_width"], settings[f"{role}_lr"]
    return AdversarialRecipe(arch=arch, width=width, epochs=epochs, lr=lr, steps=settings["attack_steps"], **shared)


def classifier_piece(name: str, title: str, minutes: float, method: str, arch: str, teacher: str = "") -> Piece:
    """Return the piece of a classifier, which a method with a teacher needs."""

    def make(data: Data, p: dict[str, Any], budget: PieceBudget, origin: dict[str, Any]) -> None:
        gpu_pieces.make_classifier(name, data, method, robust_recipe(p["rd"], arch), budget, origin, teacher)

    return Piece(name, title, minutes, (teacher,) if teacher else (), make)


def autoattack_piece(name: str) -> Piece:
    """Return the piece that attacks a classifier by AutoAttack."""

    def make(data: Data, p: dict[str, Any], budget: PieceBudget, origin: dict[str, Any]) -> None:
        gpu_attacks.measure_robustness(name, data, p["rd"], budget, origin)

    return Piece(f"{AUTOATTACK}/{name}", f"AutoAttack on {name}", 4, (name,), make)


def matched_piece(part: str, title: str, minutes: float) -> Piece:
    """Return a piece of the matched set of attacks."""
    networks = ("teacher", "cd", PROGRESSIVE, "clean", "adaptive", "label", "label-n0")
    classifiers = (DEFENDED, f"{DEFENDED}-{PURIFIED}", f"{DEFENDED}-trades")
    needs = (*classifiers, *(f"{DIFFUSION}/{name}" for name in networks))

    def make(data: Data, p: dict[str, Any], budget: PieceBudget, origin: dict[str, Any]) -> None:
        gpu_attacks.measure_matched(part, data, p["dp"], budget, origin)

    return Piece(f"{MATCHED_SET}/{part}", title, minutes, needs, make)


def variant_piece(variant: str, title: str) -> Piece:
    """Return the piece of one of experiment 5's students."""

    def make(data: Data, p: dict[str, Any], budget: PieceBudget, origin: dict[str, Any]) -> None:
        d = p["dp"]
        shared = {"eps": d["eps"], "steps": d["delta_steps"]}
        robust = shared | {"epochs": d["variant_epochs"], "lr": d["variant_lr"], "measure": d["measure"]}
        label = shared | {"epochs": d["label_epochs"], "lr": d["label_lr"], "label_weight": d["label_weight"]}
        robust["weight"] = d["adversarial_weight"]
        gpu_diffusion.make_variant(variant, data, robust, label, budget, origin)

    return Piece(f"{DIFFUSION}/{variant}", title, 4, (DEFENDED, f"{DIFFUSION}/cd"), make)


PIECES = (
    classifier_piece(DEFENDED, "ResNet-18, no adversarial images", 1.5, "natural", RESNET18),
    Piece(
        f"{DIFFUSION}/teacher",
        "diffusion model, levels up to t_max",
        6,
        (),
        lambda data, p, budget, origin: gpu_diffusion.make_teacher(data, few_step_recipe(p["diff"]), budget, origin),
    ),
    Piece(
        f"{DIFFUSION}/cd",
        "consistency student of the diffusion model",
        4,
        (DEFENDED, f"{DIFFUSION}/teacher"),
        lambda data, p, budget, origin: gpu_diffusion.make_student(data, few_step_recipe(p["diff"]), budget, origin),
    ),
    Piece(
        f"{DIFFUSION}/{PROGRESSIVE}",
        "progressive students of 4, 2 and 1 steps of the diffusion model",
        4,
        (DEFENDED, f"{DIFFUSION}/teacher"),
        lambda data, p, budget, origin: gpu_diffusion.make_progressive(
            data, few_step_recipe(p["diff"]), budget, origin
        ),
    ),
    Piece(
        f"{DEFENDED}-{PURIFIED}",
        "ResNet-18, fine-tuned on images purified by the consistency student",
        1,
        (DEFENDED, f"{DIFFUSION}/cd"),
        lambda data, p, budget, origin: gpu_diffusion.make_purified_classifier(
            data, robust_recipe(p["rd"], RESNET18), budget, origin
        ),
    ),
    variant_piece("clean", "student of clean pairs"),
    variant_piece("adaptive", "student with the adaptive constraint"),
    variant_piece("label", "student with the label term"),
    variant_piece("label-n0", "student with the label term, without noise"),
    classifier_piece("resnet18-trades", "ResNet-18 by TRADES", 6, "trades", RESNET18),
    classifier_piece(ROBUST_TEACHER, "ResNet-50 by TRADES, the robust teacher", 9, "trades", "resnet50"),
    classifier_piece("resnet18-pgd-at", "ResNet-18 by PGD-AT", 6, "pgd-at", RESNET18),
    classifier_piece("resnet18-ard", "ResNet-18 by ARD", 6, "ard", RESNET18, ROBUST_TEACHER),
    classifier_piece("resnet18-rslad", "ResNet-18 by RSLAD", 6, "rslad", RESNET18, ROBUST_TEACHER),
    classifier_piece("resnet18-guided", "ResNet-18 by guided TRADES", 6, "guided", RESNET18, ROBUST_TEACHER),
    *(autoattack_piece(name) for name in ("resnet18-trades", ROBUST_TEACHER)),
    *(autoattack_piece(f"resnet18-{method}") for method in ("pgd-at", "ard", "rslad", "guided")),
    matched_piece(STUDENTS, "the matched set on students and classifiers", 11),
    matched_piece(TEACHER, "the matched set on all defences, a fourth of the images", 11),
    Piece(
        LABEL_COUNTS,
        "classic distillation of ResNet-18 into a small CNN, by number of labels",
        10,
        (DEFENDED,),
        lambda data, p, budget, origin: gpu_distillation.measure_label_counts(data, p["kd"], budget, origin),
    ),
    Piece(
        TEMPERATURES,
        "defensive distillation of a CNN at several temperatures, attacked",
        8,
        (),
        lambda data, p, budget, origin: gpu_distillation.measure_temperatures(data, p["dd"], budget, origin),
    ),
)


def piece_card(dataset: str, name: str) -> dict[str, Any] | None:
    """Return the card of a finished piece, None for one that is not done."""
    parts = name.split("/")
    folder = pretrained.pretrained_folder(f"{dataset}/{parts[0]}")
    if len(parts) == 1:
        path = folder / CARD
        return read_json(path) if path.exists() else None
    if parts[0] != DIFFUSION:
        path = gpu_attacks.measured_file(dataset, name)
        return read_json(path) if path.exists() else None
    network = f"{PROGRESSIVE}-1" if parts[1] == PROGRESSIVE else parts[1]  # the last one that its piece writes
    path = folder / network / FACTS
    return read_json(path)["about"] if path.exists() and (folder / RECIPE).exists() else None


def pieces_table(dataset: str) -> str:
    """Return all pieces with what they need, planned and measured minutes, as Markdown."""
    rows = ["| piece | what | needs | minutes | done |", "|---|---|---|---|---|"]
    for piece in PIECES:
        card = piece_card(dataset, piece.name)
        done = f"{card['minutes']:.1f} min, {card['device']}, commit `{card['commit'][:7]}`" if card else "no"
        needs = ", ".join(f"`{name}`" for name in piece.needs) or "nothing"
        rows.append(f"| `{piece.name}` | {piece.title} | {needs} | {piece.minutes:g} | {done} |")
    return "\n".join(rows)


def choose_pieces(dataset: str, names: list[str]) -> list[Piece]:
    """Return the pieces of these names in the order of `PIECES`.

    Raises ValueError for a name that is none, and for one whose needs are neither done nor among them.
    """
    known = {piece.name: piece for piece in PIECES}
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"expected pieces among {', '.join(known)}, got {', '.join(unknown)}")
    for name in names:
        if missing := [n for n in known[name].needs if n not in names and piece_card(dataset, n) is None]:
            raise ValueError(f"expected {', '.join(missing)} before {name}: name it too")
    return [piece for piece in PIECES if piece.name in names]


def run_pieces(pieces: list[Piece], profile: str, args: argparse.Namespace) -> None:
    """Train pieces one after the other, with the profile's settings."""
    settings = compose_profile(profile)
    data = load_dataset(settings["data"]["dataset"], n_labels=args.images or None, seed=args.seed)
    if args.images:
        few = [Split(split.x[: args.images], split.y[: args.images]) for split in (data.val, data.test)]
        data = Data(data.name, data.classes, data.train, *few)
    command = shlex.join(["python", "-m", "lib.pipeline.pieces", *sys.argv[1:]])
    origin = {"commit": args.commit or git_state()[0], "command": command, "device": device_name()}
    for piece in pieces:
        budget = PieceBudget(args.minutes or piece.minutes, args.epochs, args.seed)
        print(
            f"{piece.name}: {piece.title}, {budget.epochs or budget.minutes:g} {'epochs' if budget.epochs else 'min'}"
        )
        piece.make(data, settings, budget, origin)
        card = piece_card(data.name, piece.name) or {}
        print(f"{piece.name}: {card['minutes']:.2f} min, {card['metrics']}", flush=True)


def main(arguments: list[str] | None = None) -> None:
    """Print the table of pieces, or train the named ones."""
    print_in_any_locale()
    parser = argparse.ArgumentParser(prog="python -m lib.pipeline.pieces", description=main.__doc__)
    parser.add_argument("names", nargs="*", metavar="PIECE", help="a name of the table; without one it is printed")
    parser.add_argument("--profile", default="cifar10", help="whose settings (default: cifar10)")
    parser.add_argument("--minutes", type=float, help="of each training, in place of the table's")
    parser.add_argument("--epochs", type=int, help="of each training, in place of minutes")
    parser.add_argument("--images", type=int, default=0, help="of each split, for a trial; 0: all")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and noise")
    parser.add_argument("--commit", default="", help="that the cards state, where there is no repository")
    args = parser.parse_args(arguments)
    try:
        for name in ("minutes", "epochs"):
            if (value := getattr(args, name)) is not None and not value > 0:
                raise ValueError(f"expected --{name} above 0, got {value}")
        dataset = compose_profile(args.profile)["data"]["dataset"]
        if args.names:
            run_pieces(choose_pieces(dataset, args.names), args.profile, args)
        print(pieces_table(dataset))
    except (OSError, ValueError) as error:
        raise SystemExit(f"{parser.prog}: {error}") from None


if __name__ == "__main__":
    main()
