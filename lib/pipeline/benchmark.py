"""Wall times, apart from the results that must repeat: `make bench` writes `data/<profile>/bench`.

The ratio within one run is what counts; milliseconds are those of one machine.
"""

import argparse
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lib.attacks.common import cross_entropy, loss_and_grad
from lib.data import load_dataset
from lib.diffusion.network import build_unet
from lib.diffusion.schedule import add_noise, t_to_sigma
from lib.distillation.adversarial import METHODS, robust_loss
from lib.distillation.consistency import ConsistencyScalings
from lib.distillation.few_step import (
    REFERENCE_STEPS,
    STEP_COUNTS,
    FewStepRecipe,
    Samplers,
    consistency_sampler,
    few_step_recipe,
    run_sampler,
    solver_sampler,
)
from lib.experiments import kd
from lib.models import Ensemble, build_classifier
from lib.pipeline.profile import read_params
from lib.purify import PurifiedClassifier, Purifier
from lib.report.claims import SPEED
from lib.utils.artifacts import results_dir
from lib.utils.device import default_device
from lib.utils.files import ROOT, read_json, write_json, write_text
from lib.utils.processes import print_in_any_locale
from lib.utils.random_state import randn_like
from lib.utils.seeds import seeded_generator


def kd_latency(params: dict, rounds: int = 5) -> dict[str, dict[str, float]]:
    """Return milliseconds per image of teacher, ensemble and student, and each one's median ratio to the student.

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


def mean_seconds(call: Callable[[], Any], repeats: int) -> float:
    """Return the mean wall time of `repeats` calls, until a GPU has done them all."""
    synchronize = torch.cuda.synchronize if default_device().type == "cuda" else lambda: None
    synchronize()
    begin = time.perf_counter()
    for _ in range(repeats):
        call()
    synchronize()
    return (time.perf_counter() - begin) / repeats


def rd_cost(params: dict, rounds: int = 7, repeats: int = 5) -> dict[str, dict[str, float]]:
    """Return what one training step of each method costs: passes, milliseconds, and two ratios, medians of `rounds`.

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
    calls = {}
    for name in METHODS:
        loss = robust_loss(name, teacher, eps=p["eps"], epochs=2, steps=p["attack_steps"])
        calls[name] = lambda loss=loss: loss(student, x, y, generator=rng, epoch=1)[0].backward()
        counted = {key: PassCounter(net) for key, net in nets.items()}
        counted_loss = robust_loss(name, counted["teacher"], eps=p["eps"], epochs=2, steps=p["attack_steps"])
        counted_loss(counted["student"], x, y, generator=rng, epoch=1)[0].backward()
        table[name] = {f"{k}, forward": net.forwards for k, net in counted.items()}
        table[name] |= {f"{k}, backward": net.backwards for k, net in counted.items()}
    timings: dict[str, list[list[float]]] = {name: [] for name in METHODS}
    for _ in range(rounds):
        pass_seconds = {}
        for key, net in nets.items():
            pass_seconds[f"{key}, forward"] = mean_seconds(lambda net=net: net(x), 4 * repeats)
            both = mean_seconds(lambda net=net: loss_and_grad(net, x, y, cross_entropy), 4 * repeats)
            pass_seconds[f"{key}, backward"] = both - pass_seconds[f"{key}, forward"]
        seconds = {name: mean_seconds(call, repeats) for name, call in calls.items()}
        for name, row in table.items():
            passes = sum(pass_seconds[key] * row[key] for key in pass_seconds)
            timings[name].append([1e3 * seconds[name], seconds[name] / seconds["pgd-at"], seconds[name] / passes])
    for name, row in table.items():
        row |= zip(("ms per step", "× PGD-AT", "× passes"), np.median(timings[name], axis=0).tolist(), strict=True)
    return table


BENCH_MODES: dict[str, Any] = {
    "eager": lambda net: net,
    "channels-last": lambda net: net.to(memory_format=torch.channels_last),
    "torch.compile": torch.compile,
}


def untrained_unet(params: dict) -> tuple[nn.Module, FewStepRecipe, ConsistencyScalings]:
    """Return the profile's U-Net with initial weights, which cost what trained ones do, its recipe and scalings."""
    data, recipe = load_dataset(params["data"]["dataset"]), few_step_recipe(params["diff"])
    net = build_unet(data.in_channels, data.size, recipe.channels, attention=recipe.attention, seed=0).eval()
    return net, recipe, ConsistencyScalings(t_to_sigma(recipe.t), sigma_data=0.5)


def sampler_speed(
    samplers: Samplers, x: Tensor, recipe: FewStepRecipe, rounds: int
) -> dict[str, dict[str, float | str]]:
    """Return the speed of purification by each sampler, noise and clamp included; the first is the baseline.

    `images/s`, `× teacher`: the ratio to the first, and `× evaluations`: that ratio over the ratio of network
    evaluations. Medians of `rounds`, in which all take turns.
    """
    noise = randn_like(seeded_generator(0, "bench"))
    calls = {
        name: lambda sampler=sampler: run_sampler(sampler, add_noise(x, recipe.t, noise))
        for name, (_, sampler) in samplers.items()
    }
    for call in calls.values():
        call()
    seconds = np.array(
        [[mean_seconds(call, max(1, 20 // samplers[name][0])) for name, call in calls.items()] for _ in range(rounds)]
    )
    ratios = np.median(seconds[:, :1] / seconds, axis=0).tolist()
    rates = (len(x) / np.median(seconds, axis=0)).tolist()
    most = next(iter(samplers.values()))[0]
    return {
        name: {"images/s": rate, "× teacher": ratio, "× evaluations": ratio * n / most}
        for (name, (n, _)), rate, ratio in zip(samplers.items(), rates, ratios, strict=True)
    }


def diff_speed(
    params: dict, rounds: int = 3, modes: dict[str, Any] = BENCH_MODES, batch: int = 256
) -> dict[str, dict[str, float | str]]:
    """Return the speed of purification by the 100-step SDE and by students in 4, 2 and 1 steps, see `sampler_speed`.

    One row per mode, batch (1 and `batch`) and sampler. A mode that does not work on this machine has one row, which
    names the reason; the traceback goes to stderr.
    """
    images = load_dataset(params["data"]["dataset"]).test.x
    table: dict[str, dict[str, float | str]] = {}
    for mode, change in modes.items():
        net, recipe, scalings = untrained_unet(params)
        try:
            net = change(net.to(default_device()))
            samplers = {"teacher, SDE in 100": (REFERENCE_STEPS, solver_sampler(net, REFERENCE_STEPS, recipe, "sde"))}
            for n in STEP_COUNTS:
                samplers[f"PD in {n}"] = (n, solver_sampler(net, n, recipe))
                samplers[f"CD in {n}"] = (n, consistency_sampler(net, scalings, n, recipe))
            for x in (images[:1], images[:batch]):
                rows = sampler_speed(samplers, x, recipe, rounds)
                table |= {f"{mode}, batch {len(x)}: {name}": row for name, row in rows.items()}
        except (RuntimeError, OSError, ImportError) as error:  # such as a missing compiler
            traceback.print_exception(error)
            reason = " ".join(str(error).split())[:200]
            table[f"{mode}: {type(error).__name__}: {reason}"] = dict.fromkeys(
                ("images/s", "× teacher", "× evaluations"), "–"
            )
    return table


def purification_speed(params: dict, rounds: int = 5, batch: int = 256, turns: int = 6) -> list[dict[str, float]]:
    """Return, per round, how many times as fast as DiffPure's 100 steps its students purify.

    "cd_1" and "cd_2" (and "ddim_1", undistilled): noise, steps and clamp, `batch` images; "…_classified": with the
    classifier; "…_alone": one image. In a round all take `turns`, so that a machine that slows down slows all of them.
    """
    data, width = load_dataset(params["data"]["dataset"]), params["dp"]["classifier_width"]
    net, recipe, scalings = untrained_unet(params)
    net = net.to(default_device())
    classifier = build_classifier("cnn", **data.spec(), width=width, seed=0).eval().to(default_device())
    samplers = {
        "sde_100": (REFERENCE_STEPS, solver_sampler(net, REFERENCE_STEPS, recipe, "sde")),
        "ddim_1": (1, solver_sampler(net, 1, recipe)),
    }
    samplers |= {f"cd_{n}": (n, consistency_sampler(net, scalings, n, recipe)) for n in (1, 2)}
    purifiers = {name: Purifier(net, sampler, recipe.t, n) for name, (n, sampler) in samplers.items()}
    classified = {name: PurifiedClassifier(purifier, classifier) for name, purifier in purifiers.items()}
    repeats = {name: max(1, 40 // n) for name, (n, _) in samplers.items()}
    x = data.test.x[:batch].to(default_device())
    kinds = (("", purifiers, x), ("_classified", classified, x), ("_alone", purifiers, x[:1]))
    rows = []
    for _ in range(rounds):
        rows.append({"n_test": len(x)})
        for kind, models, images in kinds:
            ratios = speedups(models, images, repeats, turns)
            rows[-1] |= {f"{name}{kind}": ratio for name, ratio in ratios.items()}
    return rows


@torch.no_grad()
def speedups(models: Mapping[str, nn.Module], x: Tensor, repeats: Mapping[str, int], turns: int) -> dict[str, float]:
    """Return how many times as fast as the first model the others are, in `turns` by turns; a warm-up comes first."""
    for model in models.values():
        model(x)
    seconds = dict.fromkeys(models, 0.0)
    for _ in range(turns):
        for name, model in models.items():
            seconds[name] += mean_seconds(lambda model=model: model(x), repeats[name])
    first, *others = models
    return {name: seconds[first] / seconds[name] for name in others}


def markdown_table(table: Mapping[str, Mapping[str, float | str]], first: str) -> str:
    """Return rows of numbers as a Markdown table."""
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
    print_in_any_locale()
    params = read_params()
    torch.set_num_threads(params["threads"] or torch.get_num_threads())
    latency, cost, speed = kd_latency(params), rd_cost(params), diff_speed(params)
    target = results_dir(params["profile"], "bench")
    write_json(target / "kd.json", latency)
    write_json(target / "rd.json", cost)
    write_json(target / "diff.json", speed)
    rounds = purification_speed(params)
    speeds = read_json(ROOT / SPEED)
    write_json(ROOT / SPEED, speeds | {params["profile"]: rounds})
    by_round = {f"round {i + 1}": row for i, row in enumerate(rounds)}
    text = f"""# What it costs, profile {params["profile"]}

Written by `make bench`, torch threads: {torch.get_num_threads()}. Elsewhere milliseconds differ, ratios less.

## Latency of teacher, ensemble and student (experiment 1)

{markdown_table(latency, "network")}

## One training step of each robust method (experiment 3)

`× passes`: the time over what the counted forward and backward passes take by themselves.

{markdown_table(cost, "method")}

## Purification: the teacher's 100 steps against few (experiment 4)

With noise, steps and clamp. `× evaluations`: how much faster, over how many fewer network evaluations.

{markdown_table(speed, "mode, batch, sampler")}

## Students against DiffPure's 100 steps: how many times as fast (experiment 5)

For the claims `dp.speed_1` and `dp.speed_2`; `_classified`: with the classifier, `_alone`: one image at a time.

{markdown_table(by_round, "round")}
"""
    write_text(target / "README.md", text)
    print(text)


if __name__ == "__main__":
    main()
