"""Times an evaluation of 100 digits by PGD-20 with all checks against the same without them, in one run.

    python -m tests.bench.bench_checks [--rounds 40] [--images 100] [--eps 0.1] [--width 16] [--size 8]

The checks: plan, probe of the model, gradients watched, noise as a control, answers that are not finite. Without them
these are no-ops. Rounds alternate; the ratio is that of paired times, with a 95 % interval of its mean.
Times are of this process's CPU, so that others on the machine disturb less. The checks take some 4 ms an evaluation: of
the smallest network (8x8 pixels, 45 ms in all) that is a tenth, of images as large as Fashion-MNIST's 1 to 2 %.
"""

import argparse
import math
import statistics
import time
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch import Tensor, nn

from lib.attacks import gate
from lib.evaluation import adversarial_images, robust_accuracy
from tests.bench.bench_attacks import victim


@contextmanager
def unchecked():
    """Replace every check of an evaluation by nothing."""
    with ExitStack() as stack:
        module = robust_accuracy
        entries = {"pgd": {"name": "pgd"}}
        for where, name, value in (
            (module, "attack_plan", lambda attacks, at: entries),
            (module, "check_value", lambda *rest: None),
            (module, "check_images", lambda x: None),
            (module, "check_labels", lambda *rest: None),
            (module, "_probe", lambda *rest: (10, [])),
            (module, "check_plan", lambda *rest: None),
            (module, "has_noise", lambda at: False),
            (module, "_attack_marks", lambda *rest: []),
            (module, "count_not_finite", lambda votes: 0),
            (adversarial_images, "_check_adversarial", lambda *rest: None),
            (adversarial_images.CountingModel, "forward", count_only),
            (gate.ModelGate, "__call__", lambda self, x: self.model(x)),
            (gate.ModelGate, "warn", lambda *rest: None),
        ):
            stack.enter_context(mock.patch.object(where, name, value))
        yield


def count_only(self, x: Tensor) -> Tensor:
    """Count passes, and watch nothing."""
    self.forwards += len(x)
    z = self.model(x)
    if z.requires_grad:
        z.register_hook(self.count_backward)
    return z


def seconds(model: nn.Module, x: Tensor, y: Tensor, eps: float) -> float:
    """Return the time of one evaluation."""
    begin = time.process_time()
    robust_accuracy.robust_accuracy(model, ["pgd"], x, y, eps=eps, progress=False)
    return time.process_time() - begin


def measure(rounds: int, images: int, eps: float, width: int, size: int) -> tuple[float, float, list[float]]:
    """Return medians with and without checks, and the ratio of each round."""
    model, x, y = victim(width, size)
    x, y = x[:images], y[:images]
    times: list[tuple[float, float]] = []
    for round_number in range(rounds + 2):
        first = round_number % 2 == 0
        pair = {}
        for checked in (first, not first):
            with ExitStack() as stack:
                if not checked:
                    stack.enter_context(unchecked())
                pair[checked] = seconds(model, x, y, eps)
        if round_number >= 2:  # the first two warm up
            times.append((pair[True], pair[False]))
    with_checks, without = (statistics.median(column) for column in zip(*times))
    return with_checks, without, [a / b for a, b in times]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--eps", type=float, default=0.1)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--size", type=int, default=8, help="pixels of an image's side; 28 is Fashion-MNIST's")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with_checks, without, ratios = measure(args.rounds, args.images, args.eps, args.width, args.size)
    mean, half = statistics.mean(ratios), 1.96 * statistics.stdev(ratios) / math.sqrt(len(ratios))
    print(f"with checks {1000 * with_checks:.1f} ms, without {1000 * without:.1f} ms")
    text = f"ratio: mean {mean:.4f} ± {half:.4f}, median {statistics.median(ratios):.4f}, {len(ratios)} rounds"
    print(f"{text}, of medians {with_checks / without:.4f}")


if __name__ == "__main__":
    main()
