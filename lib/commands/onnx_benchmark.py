"""What an exported pair costs and withstands: `python -m lib.commands.onnx_benchmark` writes `data/digits/bench`.

Latency of purifier and classifier by torch as it is, compiled, and by onnxruntime with float32 and int8 weights: all by
turns within one run, as times over torch's own. Accuracy of the float and the int8 pair on the same images and noises:
without attack, under the matched set of attacks, which has exact gradients and is made on the float pair, and under
Square, which needs no gradient and is made on each file itself.
"""

import argparse
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor

from lib.attacks.api import attack
from lib.commands import named
from lib.commands.arguments import EFFORTS, Effort
from lib.commands.evaluate import evaluate_defence, multiply_adds
from lib.commands.measures import measure_answers, percent_interval
from lib.commands.onnx_files import (
    PARITY,
    OnnxFile,
    OnnxParts,
    named_parts,
    onnx_bytes,
    parity,
    quantized_bytes,
    quantized_share,
    random_inputs,
)
from lib.data import Split
from lib.evaluation.attack_plan import EvaluationSettings
from lib.evaluation.matched_attacks import correct_draws, worst_images
from lib.pipeline.benchmark import markdown_table
from lib.pipeline.provenance import device_name, git_state
from lib.purified_classifier import PurifiedClassifier
from lib.utils.artifacts import results_dir
from lib.utils.draws import MATCHED, NO_ATTACK, pack_draws
from lib.utils.files import write_json, write_text
from lib.utils.processes import print_in_any_locale
from lib.utils.seeds import derive_seed, seeded_generator
from lib.utils.validation import PositiveInt, check_value

PURIFIER, CLASSIFIER, EPS = "digits/adaptive-1", "digits/natural", 0.1
LATENCY_BATCHES, SQUARE, WORSE = (1, 256), "square", "worst"
EAGER, FLOAT_FILE, INT8_FILE = "torch", "onnxruntime float32", "onnxruntime int8"
TURN = 0.05  # seconds of a runtime's turn in a round, at least five calls
RUNTIMES = (EAGER, "torch.compile", FLOAT_FILE, INT8_FILE)


def compiled_parts(name: str) -> OnnxParts:
    """Return parts whose networks torch.compile compiles; what is around them, the noise levels, stays as it is."""
    parts = named_parts(name)
    for net in (parts.classifier, getattr(parts.purifier, "net", None)):
        if net is not None:
            net.compile(dynamic=False)
    return parts


def runtime_calls(parts: OnnxParts, name: str, n: int) -> dict[str, Callable[[], Any]]:
    """Return one call for each of `RUNTIMES` that passes n images, with the same noise; a failed compiler has none.

    Raises ValueError if what was compiled answers something else.
    """
    inputs, content = random_inputs(parts, n), onnx_bytes(parts)
    files = {FLOAT_FILE: OnnxFile(content, 1), INT8_FILE: OnnxFile(quantized_bytes(content), 1)}
    calls: dict[str, Callable[[], Any]] = {EAGER: lambda: parts(*inputs)}
    compiled = compiled_parts(name)
    try:
        apart = max((a - b).abs().max().item() for a, b in zip(parts(*inputs), compiled(*inputs), strict=True))
    except (RuntimeError, OSError, ImportError):  # such as a missing compiler
        apart = 0.0
    else:
        calls[RUNTIMES[1]] = lambda: compiled(*inputs)
    if apart > PARITY:
        raise ValueError(f"expected torch.compile to answer what torch does, got outputs {apart:.2g} apart")
    return calls | {runtime: lambda file=file: file.run(*inputs) for runtime, file in files.items()}


def median_seconds(call: Callable[[], Any], repeats: int) -> float:
    """Return the median wall time of a call, which other work on the machine changes less than the mean."""
    times = [time.perf_counter()]
    for _ in range(repeats):
        call()
        times.append(time.perf_counter())
    return float(np.median(np.diff(times)))


@torch.no_grad()
def latency_rows(name: str, rounds: int, batches: tuple[int, ...] = LATENCY_BATCHES) -> dict[str, dict[str, float]]:
    """Return one row per size of batch and runtime, see `RUNTIMES`, on one thread.

    `ms`: median time of a call; `× torch`: its median time in a round over that of torch in the same round, below 1 for
    what is faster: the median over rounds; `low`, `high`: quartiles of that ratio.
    """
    parts, rows = named_parts(name).eval(), {}
    for n in batches:
        calls = runtime_calls(parts, name, n)
        repeats = {label: max(5, round(TURN / median_seconds(call, 5))) for label, call in calls.items()}
        seconds = [
            {label: median_seconds(call, repeats[label]) for label, call in calls.items()} for _ in range(rounds)
        ]
        for label in calls:
            low, ratio, high = np.quantile([turn[label] / turn[EAGER] for turn in seconds], (0.25, 0.5, 0.75)).tolist()
            ms = 1e3 * float(np.median([turn[label] for turn in seconds]))
            rows[f"batch {n}, {label}"] = {"ms": ms, "× torch": ratio, "low": low, "high": high}
    return rows


def file_defence(content: bytes) -> PurifiedClassifier:
    """Return a file as a defence that evaluations take: its noise is that of the global random state."""
    return PurifiedClassifier(named.OwnNoise(independent_noise=True), OnnxFile(content, torch.get_num_threads()))


def square_images(defence: PurifiedClassifier, points: Split, at: EvaluationSettings, queries: int) -> Tensor:
    """Return images attacked by Square, which asks the defence for answers alone."""
    seed = seeded_generator(derive_seed(at.seed, "onnx/square"), "attack")
    options = {"queries": queries, "batch_size": at.batch_size, "progress": False}
    return attack("square", defence, *points, at.eps, at.norm, seed, **options)


def pair_accuracy(
    pairs: Mapping[str, PurifiedClassifier],
    points: Split,
    numbers: list[int],
    at: EvaluationSettings,
    effort: Effort,
    queries: int,
) -> dict[str, Any]:
    """Measure pairs on the same images and noises, without attack and under three.

    Args:
        pairs: by name; the first has gradients, on it the matched set of attacks is made.
        points: images and labels.
        numbers: of the images.
        at: ball, seed, batch size and draws.
        effort: of the matched set.
        queries: of Square, which is made on each pair itself.

    Returns:
        Name → condition → measure → value, low, high, as `lib.commands.evaluate` has them: "matched", "square", and
        "worst", the worse of the two for each image, chosen on other draws; "same answers": the share of answers to
        images without attack, draw by draw, that are right or wrong as the first pair's are.
    """
    first, *_ = pairs
    matched = evaluate_defence(pairs[first], None, points, numbers, at, effort, autoattack=False)[1].images
    out: dict[str, Any] = {}
    right: dict[str, np.ndarray] = {}
    for name, pair in pairs.items():
        images = {MATCHED: matched, SQUARE: square_images(pair, points, at, queries)}
        images[WORSE] = worst_images(pair, images, points.y, effort.draws, at.seed).images
        fresh = effort.draws.fresh
        right[name] = correct_draws(pair, points.x, points.y, fresh, at.seed, f"onnx/{NO_ATTACK}")[0]
        out[name] = {}
        for condition, x in images.items():
            answers = correct_draws(pair, x, points.y, fresh, at.seed, f"onnx/{condition}")[0]
            packed = {NO_ATTACK: pack_draws(right[name]), MATCHED: pack_draws(answers)}
            out[name][condition] = measure_answers(packed, numbers)
        out[name]["same answers"] = float((right[name] == right[first]).mean())
    return out


def accuracy_rows(accuracy: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Return the rows of a table of accuracies, % with 95 % intervals over images."""
    return {
        name: {
            "no attack": percent_interval(row[MATCHED]["clean"]),
            "attacks on the float pair": percent_interval(row[MATCHED]["robust"]),
            "Square on itself": percent_interval(row[SQUARE]["robust"]),
            "the worse of both": percent_interval(row[WORSE]["robust"]),
            "right in ten of ten draws: no attack": percent_interval(row[MATCHED]["control"]),
            "the worse of both, ten of ten": percent_interval(row[WORSE]["worst_of_10"]),
        }
        for name, row in accuracy.items()
    }


def onnx_report(result: Mapping[str, Any]) -> str:
    """Return the result as a Markdown page."""
    adds, protocol = result["multiply_adds"], result["protocol"]
    quantized = ", ".join(f"{share} {kind}" for kind, share in result["quantized"].items())
    same = ", ".join(f"{100 * row['same answers']:.2f} % of {name}" for name, row in result["accuracy"].items())
    return f"""# Exported to ONNX: {PURIFIER} before {CLASSIFIER}

Written by `python -m lib.commands.onnx_benchmark`; commit {result["commit"][:7]}, {result["device"]}.

The file's outputs are within {result["parity"]:.1e} of torch's on random images and noises. Its int8 version has 8-bit
weights in {quantized} operators (onnxruntime's dynamic quantisation), all else in float32.

## Latency

Times over those of torch in the same round, below 1 for what is faster: median and quartiles (low, high) of
{protocol["rounds"]} rounds by turns, on one thread of a machine that also did other work, whose milliseconds these are.
torch.compile compiles the networks, not the levels of noise around them; its answers are checked against torch's. Noise
is drawn beforehand. The purifier takes {adds["purifier"]:,} multiply-adds for an image, the classifier
{adds["classifier"]:,}: {adds["purifier"] / adds["classifier"]:.1f} times as many.

### Purifier

{markdown_table(result["latency"]["purifier"], "batch, runtime")}

### Classifier

{markdown_table(result["latency"]["classifier"], "batch, runtime")}

## Accuracy

{protocol["n"]} test images, Linf, ε = {EPS:g}, {protocol["fresh_draws"]} draws for each image, %; in brackets 95 %
intervals over images. The matched set of attacks ({protocol["effort"]} effort) has exact gradients of the float pair,
averaged over the noise. Square, {protocol["queries"]} queries, is made on each pair itself. An int8 pair has no
gradient of its own, so what is left of it here is an upper bound.

{markdown_table(accuracy_rows(result["accuracy"]), "pair")}

Answers to images without attack that are right or wrong as torch's are under the same noise: {same}.
"""


def main() -> None:
    """Measure latency and accuracy of an exported pair; write the numbers and a page with their tables."""
    parser = argparse.ArgumentParser(prog="python -m lib.commands.onnx_benchmark", description=main.__doc__)
    parser.add_argument("--images", type=int, default=256, help="test images of the accuracies (default: 256)")
    parser.add_argument("--rounds", type=int, default=15, help="of the latencies, by turns (default: 15)")
    parser.add_argument("--queries", type=int, default=500, help="of Square (default: 500)")
    parser.add_argument("--effort", choices=EFFORTS, default="standard", help="of the matched set")
    args = parser.parse_args()
    print_in_any_locale()
    count, rounds, queries = (
        check_value(f"--{k}", getattr(args, k), PositiveInt) for k in ("images", "rounds", "queries")
    )
    torch.set_num_threads(1)
    parts, effort = named_parts(PURIFIER, CLASSIFIER), EFFORTS[args.effort]
    content = onnx_bytes(parts)
    small = quantized_bytes(content)
    points, numbers = named.load_images("digits", count, 0)
    whole, _ = named.compose_defence(named.named_model(CLASSIFIER, "digits"), PURIFIER, points.x)
    pairs = {EAGER: whole, FLOAT_FILE: file_defence(content), INT8_FILE: file_defence(small)}
    at = EvaluationSettings(eps=EPS, draws=effort.each)
    result = {
        "accuracy": pair_accuracy(pairs, points, numbers, at, effort, queries),
        "latency": {"purifier": latency_rows(PURIFIER, rounds), "classifier": latency_rows(CLASSIFIER, rounds)},
        "multiply_adds": {
            name: multiply_adds(part, points.x[:1])
            for name, part in {"purifier": whole.purifier, "classifier": whole.classifier}.items()
        },
        "quantized": quantized_share(small),
        "parity": parity(OnnxFile(content), parts).difference,
        "protocol": {"n": len(numbers), "rounds": rounds, "queries": queries, "effort": args.effort}
        | {"fresh_draws": effort.draws.fresh, "eps": EPS, "threads": 1},
        "images": numbers,
        "commit": git_state()[0],
        "device": device_name(),
        "versions": {"torch": torch.__version__, "onnxruntime": onnxruntime.__version__},
    }
    target, page = results_dir("digits", "bench"), onnx_report(result)
    write_json(target / "onnx.json", result)
    write_text(target / "onnx.md", page)
    print(page)


if __name__ == "__main__":
    main()
