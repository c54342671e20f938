"""Times our attacks against torchattacks' and, where installed, foolbox's: same model, images, eps and steps.

    python -m tests.bench.bench_attacks [--images 256] [--repeats 5] [--threads 2] [--json FILE]

Runs alternate; a ratio is our median time over theirs, below 1 where ours is faster.
"""

import argparse
import contextlib
import io
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torchattacks
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from lib.attacks.api import attack
from lib.models import build_classifier

try:
    import foolbox
except ImportError:
    foolbox = None

Case = tuple[str, str, Callable[[Tensor, Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]


def victim(width: int = 16, size: int = 8) -> tuple[nn.Module, Tensor, Tensor]:
    """Return a CNN trained on 1297 of sklearn's digits, enlarged to `size`, and the other 500 with their labels."""
    bunch = load_digits()
    x, y = torch.tensor(bunch.images, dtype=torch.float32)[:, None] / 16, torch.tensor(bunch.target)
    x = F.interpolate(x, size=(size, size))
    model = build_classifier("cnn", width=width, size=size, seed=0)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(15):
        for a, b in zip(x[:1297].split(64), y[:1297].split(64)):
            optimizer.zero_grad()
            F.cross_entropy(model(a), b).backward()
            optimizer.step()
    return model.eval(), x[1297:], y[1297:]


def cases(model: nn.Module) -> list[Case]:
    """Return (name, library, ours, theirs) with the same eps, steps and step sizes on both sides."""
    ta = torchattacks

    def ours(name: str, eps: float | None = None, norm: str | None = None, **options):
        return lambda x, y: attack(name, model, x, y, eps, norm, progress=False, batch_size=512, **options)

    a, b = {"alpha": 0.0125}, {"alpha": 0.0625}
    pairs = [
        ("fgsm", ours("fgsm", 0.1), ta.FGSM(model, 0.1)),
        ("pgd Linf 20", ours("pgd", 0.1, **a), ta.PGD(model, 0.1, steps=20, **a)),
        ("pgd Linf 20, eps 0.02", ours("pgd", 0.02, alpha=0.0025), ta.PGD(model, 0.02, 0.0025, 20)),
        ("pgd L2 20", ours("pgd", 0.5, "L2", **b), ta.PGDL2(model, 0.5, steps=20, **b)),
        ("eotpgd 10x10", ours("eotpgd", 0.1, steps=10, alpha=0.025), ta.EOTPGD(model, 0.1, 0.025, 10, 10)),
        ("apgd-ce Linf 50", ours("apgd-ce", 0.1, steps=50), ta.APGD(model, eps=0.1, steps=50)),
        ("apgd-dlr L2 50", ours("apgd-dlr", 0.5, "L2", steps=50), ta.APGD(model, "L2", 0.5, 50, loss="dlr")),
        ("apgd-t Linf 20", ours("apgd-t", 0.1, steps=20), ta.APGDT(model, eps=0.1, steps=20)),
        ("square Linf 300", ours("square", 0.1, queries=300), ta.Square(model, eps=0.1, n_queries=300)),
        ("square L2 300", ours("square", 0.5, "L2", queries=300), ta.Square(model, "L2", 0.5, 300)),
        ("fab-t Linf 10", ours("fab-t", 0.1, steps=10), ta.FAB(model, eps=0.1, multi_targeted=True)),
        ("cw 100, one c", ours("cw", steps=100, searches=1, abort=False), cw_fair(model, steps=100)),
        ("deepfool", lambda x, y: ours("deepfool")(x[:64], y[:64]), lambda x, y: ta.DeepFool(model)(x[:64], y[:64])),
        ("jsma-z", lambda x, y: jsma(ours, x, y), lambda x, y: ta.JSMA(model, gamma=10 / 64)(x[:64], y[:64])),
    ]
    out = [(name, "torchattacks", mine, theirs) for name, mine, theirs in pairs]
    if foolbox:
        fa, wrapped = foolbox.attacks, foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
        search = {"binary_search_steps": 9, "steps": 100, "stepsize": 0.05}
        pairs = [
            ("fgsm", 0.1, ours("fgsm", 0.1), fa.LinfFastGradientAttack()),
            ("pgd Linf 20", 0.1, ours("pgd", 0.1, **a), fa.LinfPGD(abs_stepsize=0.0125, steps=20)),
            ("pgd L2 20", 0.5, ours("pgd", 0.5, "L2", **b), fa.L2PGD(abs_stepsize=0.0625, steps=20)),
            ("cw 9 x 100", None, ours("cw", steps=100), fa.L2CarliniWagnerAttack(**search)),
            ("deepfool", None, ours("deepfool"), fa.L2DeepFoolAttack(steps=50, loss="logits")),
        ]
        for name, eps, mine, theirs in pairs:
            out.append((name, "foolbox", mine, lambda x, y, run=theirs, eps=eps: run(wrapped, x, y, epsilons=eps)[1]))
    return out


def cw_fair(model: nn.Module, **options):
    """Return torchattacks' CW on pixels off the bounds, where it is not frozen."""
    raw = torchattacks.CW(model, **options)
    return lambda x, y: raw(x.clamp(1e-3, 1 - 1e-3), y)


def jsma(ours: Callable, x: Tensor, y: Tensor) -> Tensor:
    """Return our JSMA-Z towards the class that is hard-wired in torchattacks."""
    return ours("jsma-z", target=(y[:64] + 1) % 10, gamma=10 / 64)(x[:64], y[:64])


def seconds(run: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> tuple[float, Tensor]:
    """Return the wall time of one call and its images."""
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        x_adv = run(x, y)
    return time.perf_counter() - start, x_adv


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in (("images", 256), ("repeats", 5), ("threads", 2), ("width", 16)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, x, y = victim(args.width)
    right = (model(x).argmax(1) == y).nonzero().squeeze(1)[: args.images]
    x, y = x[right], y[right]
    rows = []
    for name, library, *sides in cases(model):
        times: list[list[float]] = [[], []]
        for repeat in range(args.repeats + 1):
            both = [seconds(run, x, y) for run in sides]
            if repeat:  # the first round warms up
                for side, (duration, _) in zip(times, both):
                    side.append(duration)
        ours, theirs = (statistics.median(side) for side in times)
        left = [100 * (model(a).argmax(1) == y[: len(a)]).double().mean().item() for _, a in both]
        rows.append(
            {
                "attack": name,
                "library": library,
                "ours_s": ours,
                "theirs_s": theirs,
                "ratio": ours / theirs,
                "left": left,
            }
        )
        text = f"{name:22s} {library:13s} {ours:8.3f} s {theirs:8.3f} s  ratio {ours / theirs:5.2f}"
        print(f"{text}  accuracy left {left[0]:5.1f} {left[1]:5.1f} %", flush=True)
    if args.json:
        args.json.write_text(json.dumps({"settings": vars(args) | {"json": str(args.json)}, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
