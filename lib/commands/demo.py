"""Files of the page in `docs/demo`, which attacks and purifies digits in a browser: `python -m lib.commands.demo`.

It writes the networks (`pair.onnx`, `classifier.onnx`) and `demo.json`: test digits, the perturbations that attacks of
this repository make for them, and what the cards of the networks say was measured. `make demo` puts onnxruntime beside
them.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from lib import pretrained
from lib.attacks.api import attack
from lib.commands import named
from lib.commands.arguments import EFFORTS, Effort
from lib.commands.evaluate import evaluate_defence
from lib.commands.export import check_parity
from lib.commands.onnx_benchmark import CLASSIFIER, EPS, PURIFIER
from lib.commands.onnx_files import OnnxFile, named_parts, onnx_bytes
from lib.data import Split
from lib.diffusion.network import load_facts
from lib.evaluation.attack_plan import EvaluationSettings
from lib.models import predict_classes
from lib.utils.files import ROOT, read_json, write_bytes, write_json
from lib.utils.processes import print_in_any_locale

DEMO = Path("docs/demo")
STORED = 10_000  # perturbations are stored as whole numbers of so many parts of a pixel's range


def demo_digits(model: Callable, points: Split, steps: int) -> tuple[list[int], Tensor]:
    """Choose two digits of each class: the first that a classifier gets right, and the first that an attack breaks.

    Args:
        model: the classifier.
        points: images and labels to choose from.
        steps: of the attack, APGD on the classifier alone, within `EPS`.

    Returns:
        Places of the chosen digits, in the order of classes, and their attacked images. A class without a digit that
        breaks has its second one in place of it.
    """
    right = predict_classes(model, points.x, len(points.y)) == points.y
    attacked = attack("apgd-ce", model, *points, EPS, steps=steps, progress=False)
    broken = right & (predict_classes(model, attacked, len(points.y)) != points.y)
    rows: list[int] = []
    for c in range(10):
        first, *others = (right & (points.y == c)).nonzero()[:, 0].tolist()
        rows += [first, next((k for k in others if broken[k]), others[0])]
    return rows, attacked[rows]


def pair_perturbed(model: Callable, points: Split, effort: Effort) -> Tensor:
    """Return the worst images of the matched set, with exact gradients through purifier and classifier."""
    defence, _ = named.compose_defence(model, PURIFIER, points.x)
    at = EvaluationSettings(eps=EPS, draws=effort.each)
    return evaluate_defence(defence, None, points, list(range(len(points.y))), at, effort, autoattack=False)[1].images


def measured_facts() -> dict[str, Any]:
    """Return what the cards say of the classifier, of the purifier before it, and of TRADES' classifier."""
    keys = ("clean", "control", "accuracy", "worst_of_10", "multiply_adds")
    cards = {
        name: read_json(pretrained.pretrained_folder(f"digits/{name}") / pretrained.CARD)
        for name in ("natural", "trades")
    }
    models, spec = named.purifier_place(PURIFIER)
    about = load_facts(models / spec.rpartition("-")[0])["about"]
    rows = {
        "classifier": cards["natural"]["metrics"]["none"],
        "pair": about["metrics"][spec],
        "trades": cards["trades"]["metrics"]["trades"],
    }
    return {name: {key: row[key] for key in keys} for name, row in rows.items()} | {"limits": about["limits"]}


def write_demo(folder: Path, count: int = 10_000, effort: Effort = EFFORTS["standard"]) -> list[Path]:
    """Write the page's networks and data; ValueError for a network that answers other than torch does.

    Args:
        folder: of the page.
        count: test digits to choose from, at most.
        effort: of the attacks.

    Returns:
        The files.
    """
    written = []
    for name, parts in {"pair": named_parts(PURIFIER, CLASSIFIER), "classifier": named_parts(CLASSIFIER)}.items():
        content = onnx_bytes(parts)
        check_parity(OnnxFile(content), parts)
        written.append(folder / f"{name}.onnx")
        write_bytes(written[-1], content)
    model = named.named_model(CLASSIFIER, "digits")
    points, numbers = named.load_images("digits", count, 0)
    rows, alone = demo_digits(model, points, effort.steps)
    points = Split(points.x[rows], points.y[rows])
    images = {"classifier": alone, "pair": pair_perturbed(model, points, effort)}
    data = {
        "eps": EPS,
        "stored": STORED,
        "labels": points.y.tolist(),
        "numbers": [numbers[k] for k in rows],
        "sixteenths": points.x.mul(16).round().int().flatten(1).tolist(),
        "perturbations": {
            name: (x - points.x).mul(STORED).round().int().flatten(1).tolist() for name, x in images.items()
        },
        "measured": measured_facts(),
    }
    write_json(folder / "demo.json", data)
    return [*written, folder / "demo.json"]


def main() -> None:
    """Write the networks and data of the page docs/demo."""
    argparse.ArgumentParser(prog="python -m lib.commands.demo", description=main.__doc__).parse_args()
    print_in_any_locale()
    for path in write_demo(ROOT / DEMO):
        print(f"{path.relative_to(ROOT)}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
