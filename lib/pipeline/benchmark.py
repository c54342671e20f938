"""What a clock says, kept apart from the results that must repeat: `make bench` writes `data/<profile>/bench`.

The ratio within one run is what counts; milliseconds are those of one machine.
"""

import argparse
import json
import time
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor, nn

from lib.attacks.common import cross_entropy, loss_and_grad
from lib.data import load_dataset
from lib.diffusion.network import build_unet
from lib.diffusion.schedule import add_noise, t_to_sigma
from lib.distillation.adversarial import METHODS, robust_loss
from lib.distillation.consistency import consistency_scalings
from lib.distillation.few_step import FewStepRecipe, consistency_sampler, run_sampler, solver_sampler
from lib.experiments import kd
from lib.models import Ensemble, build_classifier
from lib.purify import PurifiedClassifier, Purifier
from lib.report.claims import SPEED
from lib.utils.artifacts import results_dir
from lib.utils.device import default_device
from lib.utils.files import ROOT, write_json, write_text
from lib.utils.random_state import randn_like
from lib.utils.seeds import seeded_generator


def kd_latency(params: dict, rounds: int = 5) -> dict[str, dict[str, float]]:
    """Returns milliseconds per image of teacher, ensemble and student, and each one's median ratio to the student.

    The networks are those of the profile with initial weights, which cost what trained ones do; they take turns for
    `rounds` rounds, so that a machine that slows down slows all of them.
    """
    data, p = load_dataset(params["data"]["dataset"]), params["kd"]

    def net(arch, width, seed):
        return build_classifier(arch, **data.spec(), width=width, seed=seed).eval().to(default_device())

    teachers = [net(p["teacher"], p["teacher_width"], seed) for seed in range(p["members"])]
    networks = {"teacher": teachers[0], f"ensemble of {p['members']}": Ensemble(teachers)}
    networks |= {"student": net("cnn", p["student_width"], 0)}
    turns = [{name: kd.network_latency(n, data.test.x[:256]) for name, n in networks.items()} for _ in range(rounds)]
    table: dict[str, dict[str, float]] = {name: {} for name in networks}
    for name, row in table.items():
        for key in turns[0][name]:
            row[key] = float(np.median([turn[name][key] for turn in turns]))
            row[f"{key}, × student"] = float(np.median([turn[name][key] / turn["student"][key] for turn in turns]))
    return table


class CountBackward(torch.autograd.Function):
    """The identity, which counts backward passes."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, counter: "PassCounter") -> Tensor:
        ctx.counter = counter
        return z.view_as(z)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.counter.backwards += 1
        return grad, None


class PassCounter(nn.Module):
    """A network that counts its forward and backward passes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.forwards, self.backwards = model, 0, 0

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += 1
        return CountBackward.apply(self.model(x), self)


def mean_seconds(work: Any, repeats: int) -> float:
    """Returns the mean wall time of `repeats` calls of `work`, until a GPU has done them all."""
    wait = torch.cuda.synchronize if default_device().type == "cuda" else lambda: None
    wait()
    begin = time.perf_counter()
    for _ in range(repeats):
        work()
    wait()
    return (time.perf_counter() - begin) / repeats


def rd_cost(params: dict, rounds: int = 7, repeats: int = 5) -> dict[str, dict[str, float]]:
    """Returns what one training step of each method costs: passes, milliseconds, and two ratios, medians of `rounds`.

    `× PGD-AT`: time over that of PGD-AT in the same round; `× passes`: time over what the method's counted forward and
    backward passes of student and teacher take by themselves.
    """
    data, p = load_dataset(params["data"]["dataset"]), params["rd"]
    x, y = (t[: p["batch_size"]].to(default_device()) for t in data.train)
    student = build_classifier(p["student"], **data.spec(), width=p["student_width"], seed=0).to(default_device())
    teacher = build_classifier(p["teacher"], **data.spec(), width=p["teacher_width"], seed=1).to(default_device())
    teacher.eval().requires_grad_(False)
    nets, rng = {"student": student, "teacher": teacher}, seeded_generator(0, "bench", default_device())
    table: dict[str, dict[str, float]] = {}
    works = {}
    for name in METHODS:
        loss = robust_loss(name, teacher, eps=p["eps"], epochs=2, steps=p["attack_steps"])
        works[name] = lambda loss=loss: loss(student, x, y, generator=rng, epoch=1)[0].backward()
        counted = {key: PassCounter(net) for key, net in nets.items()}
        told = robust_loss(name, counted["teacher"], eps=p["eps"], epochs=2, steps=p["attack_steps"])
        told(counted["student"], x, y, generator=rng, epoch=1)[0].backward()
        table[name] = {f"{k}, forward": net.forwards for k, net in counted.items()}
        table[name] |= {f"{k}, backward": net.backwards for k, net in counted.items()}
    clocks: dict[str, list[list[float]]] = {name: [] for name in METHODS}
    for _ in range(rounds):
        unit = {}
        for key, net in nets.items():
            unit[f"{key}, forward"] = mean_seconds(lambda net=net: net(x), 4 * repeats)
            both = mean_seconds(lambda net=net: loss_and_grad(net, x, y, cross_entropy), 4 * repeats)
            unit[f"{key}, backward"] = both - unit[f"{key}, forward"]
        spent = {name: mean_seconds(work, repeats) for name, work in works.items()}
        for name, row in table.items():
            passes = sum(unit[key] * row[key] for key in unit)
            clocks[name].append([1e3 * spent[name], spent[name] / spent["pgd-at"], spent[name] / passes])
    for name, row in table.items():
        row |= zip(("ms per step", "× PGD-AT", "× passes"), np.median(clocks[name], axis=0).tolist(), strict=True)
    return table


BENCH_MODES: dict[str, Any] = {
    "eager": lambda net: net,
    "channels-last": lambda net: net.to(memory_format=torch.channels_last),
    "torch.compile": torch.compile,
}


def diff_speed(
    params: dict, rounds: int = 3, modes: dict[str, Any] = BENCH_MODES, batch: int = 256
) -> dict[str, dict[str, float | str]]:
    """Returns images per second of purification by the 100-step SDE and by students in 4, 2 and 1 steps.

    Noise, steps and clamp are included. One row per mode, batch (1 and `batch`) and way back: images/s, `× teacher`
    in the same mode and batch, and `× evaluations`: that ratio over the ratio of network evaluations, 1 when the
    network is all that costs. Medians of `rounds`, in which all take turns.
    A mode that does not work here says so instead.
    """
    data, p = load_dataset(params["data"]["dataset"]), params["diff"]
    recipe = FewStepRecipe(channels=tuple(p["channels"]), attention=p["attention"], target=p["target"], t=p["t"])
    at, rng = consistency_scalings(t_to_sigma(recipe.t), 0.5), randn_like(seeded_generator(0, "bench"))
    table: dict[str, dict[str, float | str]] = {}
    for mode, change in modes.items():
        net = build_unet(data.in_channels, data.size, recipe.channels, attention=recipe.attention, seed=0).eval()
        try:
            net = change(net.to(default_device()))
            ways = {"teacher, SDE in 100": (100, solver_sampler(net, 100, recipe, "sde"))}
            for n in (4, 2, 1):
                ways[f"PD in {n}"] = (n, solver_sampler(net, n, recipe))
                ways[f"CD in {n}"] = (n, consistency_sampler(net, at, n, recipe))
            for x in (data.test.x[:1], data.test.x[:batch]):
                works = {
                    name: lambda x=x, way=way: run_sampler(way, add_noise(x, recipe.t, rng))
                    for name, (_, way) in ways.items()
                }
                for work in works.values():
                    work()
                spent = np.array(
                    [
                        [mean_seconds(work, max(1, 20 // ways[name][0])) for name, work in works.items()]
                        for _ in range(rounds)
                    ]
                )
                faster = np.median(spent[:, :1] / spent, axis=0)
                for i, (name, (n, _)) in enumerate(ways.items()):
                    row = {"images/s": len(x) / float(np.median(spent[:, i])), "× teacher": float(faster[i])}
                    table[f"{mode}, batch {len(x)}: {name}"] = row | {"× evaluations": float(faster[i]) * n / 100}
        except Exception as error:  # a compiler may be missing, and says so in many ways
            reason = str(error).strip().splitlines()[0][:80] if str(error).strip() else ""
            table[f"{mode}: {type(error).__name__} {reason}"] = dict.fromkeys(
                ("images/s", "× teacher", "× evaluations"), "–"
            )
    return table


def purification_speed(params: dict, rounds: int = 5, batch: int = 256, turns: int = 6) -> list[dict[str, float]]:
    """Returns, per round, how many times as fast as DiffPure's 100 steps its students purify, one row per round.

    "cd_1" and "cd_2" (and "ddim_1", undistilled): noise, steps and clamp, `batch` images; "…_classified": with the
    classifier; "…_alone": one image. In a round all take `turns`, so that a machine that slows down slows all of them;
    the weights are initial ones, which cost what trained ones do.
    """
    data, p = load_dataset(params["data"]["dataset"]), params["diff"]
    recipe = FewStepRecipe(channels=tuple(p["channels"]), attention=p["attention"], target=p["target"], t=p["t"])
    at = consistency_scalings(t_to_sigma(recipe.t), 0.5)
    net = (
        build_unet(data.in_channels, data.size, recipe.channels, attention=recipe.attention, seed=0)
        .eval()
        .to(default_device())
    )
    judge = (
        build_classifier("cnn", **data.spec(), width=params["dp"]["classifier_widths"][0], seed=0)
        .eval()
        .to(default_device())
    )
    ways = {"sde_100": solver_sampler(net, 100, recipe, "sde"), "ddim_1": solver_sampler(net, 1, recipe)}
    ways |= {f"cd_{n}": consistency_sampler(net, at, n, recipe) for n in (1, 2)}
    purifiers = {name: Purifier(net, way, recipe.t, int(name.split("_")[1])) for name, way in ways.items()}
    classified = {name: PurifiedClassifier(purifier, judge) for name, purifier in purifiers.items()}
    x = data.test.x[:batch].to(default_device())
    kinds = {"": (purifiers, x), "_classified": (classified, x), "_alone": (purifiers, x[:1])}
    rows = []
    with torch.no_grad():
        for _ in range(rounds):
            row: dict[str, float] = {"n_test": len(x)}
            for kind, (works, images) in kinds.items():
                for work in works.values():
                    work(images)  # warms up
                spent = dict.fromkeys(works, 0.0)
                for _ in range(turns):
                    for name, work in works.items():
                        repeats = max(1, 40 // purifiers[name].evaluations)
                        spent[name] += mean_seconds(lambda work=work, images=images: work(images), repeats)
                row |= {f"{name}{kind}": spent["sde_100"] / spent[name] for name in works if name != "sde_100"}
            rows.append(row)
    return rows


def markdown_table(table: dict[str, dict[str, float]], first: str) -> str:
    """Returns rows of numbers as a Markdown table."""
    columns = list(next(iter(table.values())))
    lines = [f"| {first} | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    for name, row in table.items():
        cells = [f"{row[c]:.3g}" if isinstance(row[c], float) else str(row[c]) for c in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    argparse.ArgumentParser(
        prog="python -m lib.pipeline.benchmark", description="Measure what the active profile costs."
    ).parse_args()
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    torch.set_num_threads(params["threads"] or torch.get_num_threads())
    latency, cost, speed = kd_latency(params), rd_cost(params), diff_speed(params)
    target = results_dir(params["profile"], "bench")
    write_json(target / "kd.json", latency)
    write_json(target / "rd.json", cost)
    write_json(target / "diff.json", speed)
    rounds = purification_speed(params)
    known = json.loads((ROOT / SPEED).read_text())
    write_json(ROOT / SPEED, known | {params["profile"]: rounds})
    every = {f"round {i + 1}": row for i, row in enumerate(rounds)}
    text = f"""# What it costs, profile {params["profile"]}

Written by `make bench`, torch threads: {torch.get_num_threads()}. Elsewhere milliseconds differ, ratios less.

## Latency: what distillation buys (experiment 1)

{markdown_table(latency, "network")}

## One training step of each robust method (experiment 3)

`× passes`: the time over what the counted forward and backward passes take by themselves.

{markdown_table(cost, "method")}

## Purification: the teacher's 100 steps against few (experiment 4)

With noise, steps and clamp. `× evaluations`: how much faster, over how many fewer network evaluations.

{markdown_table(speed, "mode, batch, way back")}

## Students against DiffPure's 100 steps: how many times as fast (experiment 5)

What `dp.speed_1` and `dp.speed_2` are about; `_classified`: with the classifier, `_alone`: one image at a time.

{markdown_table(every, "round")}
"""
    write_text(target / "README.md", text)
    print(text)


if __name__ == "__main__":
    main()
