"""What the fast path of a GPU saves, as ratios within one run: `python -m lib.pipeline.gpu_benchmark`.

Three works, of CIFAR-10's size, with untrained networks, which cost what trained ones do: training the diffusion model,
purifying in 100 steps, and gradients through a one-step purifier and ResNet-18. Each way takes turns with plain float32
(TF32 in convolutions, torch's default); a way's gradients are held against that one's. Compiling is not timed. Writes
`data/<data set>/bench/gpu.json`; `make bench` runs it where there is a GPU.
"""

import argparse
import copy
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from torch import Tensor, nn

from lib.attacks.eot_pgd import expected_loss
from lib.diffusion.network import build_unet, denoising_loss
from lib.distillation.few_step import FewStepRecipe, few_step_recipe, solver_sampler
from lib.models import build_classifier
from lib.pipeline.benchmark import mean_seconds
from lib.pipeline.profile import compose_profile
from lib.pipeline.provenance import device_name, git_state
from lib.purify import PurifiedClassifier, Purifier
from lib.training import train
from lib.utils.artifacts import results_dir
from lib.utils.device import default_device, use_gpu
from lib.utils.files import ROOT, write_json
from lib.utils.gpu_path import Use, speed_up
from lib.utils.precision import autocast_forward
from lib.utils.processes import print_in_any_locale
from lib.utils.random_state import seeded_noise

FLOAT32 = "float32"
ROUNDS = 3


class Way(NamedTuple):
    """A way to run networks: compiled or not, in which mode, and the precision of their forward passes."""

    compiled: bool = False
    mode: str | None = None
    precision: str = "no"


WAYS = {
    FLOAT32: Way(),
    "bf16": Way(precision="bf16"),
    "compiled": Way(True),
    "compiled bf16": Way(True, precision="bf16"),
}
GRAPHS = {"CUDA graphs": Way(True, "reduce-overhead"), "CUDA graphs bf16": Way(True, "reduce-overhead", "bf16")}


class BenchSize(NamedTuple):
    """How much is timed: images of a training step and how many steps, steps of purification, images of a gradient."""

    channels: tuple[int, ...]
    side: int = 32
    width: int = 64
    batch: int = 250
    steps: int = 30
    sampling: int = 100
    images: int = 256
    passes: int = 512
    backend: str | None = None


def prepare(net: nn.Module, way: Way, size: BenchSize, images: int, use: Use = "training") -> nn.Module:
    """Return a copy of a network on the device, compiled for a use and so many images if the way says so."""
    own = copy.deepcopy(net).to(default_device())
    if not way.compiled:
        return own
    example = [torch.rand(images, 3, size.side, size.side)]
    if isinstance(net, UNet2DModel):
        example += [torch.full((images,), 99.0)]
    return speed_up(own, example, way.precision, uses=(use,), backend=size.backend, mode=way.mode)


def ratios(calls: Mapping[str, Callable[[], Any]], rounds: int = ROUNDS) -> dict[str, dict[str, float]]:
    """Return the seconds of each call and how many times as fast as `FLOAT32` it is, medians of rounds by turns."""
    for call in calls.values():
        call()  # compiles
    turns = [{name: mean_seconds(call, 1) for name, call in calls.items()} for _ in range(rounds)]
    plain = [turn[FLOAT32] for turn in turns]
    out = {}
    for name in calls:
        own = [turn[name] for turn in turns]
        times = [a / b for a, b in zip(plain, own, strict=True)]
        out[name] = {"seconds": float(np.median(own)), "ratio": float(np.median(times))}
    return out


def training_speeds(recipe: FewStepRecipe, size: BenchSize) -> dict[str, dict[str, float]]:
    """Return the speed of the diffusion model's training by `lib.training.train`, with averaged weights."""
    net, x = (
        build_unet(3, size.side, size.channels, seed=0),
        torch.rand(size.batch * size.steps, 3, size.side, size.side),
    )
    options = {"epochs": 1, "batch_size": size.batch, "lr": 1e-4, "ema": 0.999, "clip": 1.0, "progress": False}

    def call(way: Way) -> Callable[[], Any]:
        own, loss = prepare(net, way, size, size.batch), denoising_loss(recipe.target, recipe.t_max)
        return lambda: train(own, loss, (x,), precision=way.precision, **options)

    out = ratios({name: call(way) for name, way in WAYS.items()})
    for row in out.values():
        row["images_per_second"] = len(x) / row["seconds"]
    return out


def purifier_of(net: nn.Module, steps: int, recipe: FewStepRecipe, solver: str = "sde") -> Purifier:
    """Return the purifier by a solver of a diffusion network in so many steps."""
    sampler = solver_sampler(net, steps, recipe, solver)
    return Purifier(net, sampler, recipe.t, steps).to(default_device()).requires_grad_(False)


@torch.no_grad()
def sampling_speeds(recipe: FewStepRecipe, size: BenchSize, images: int) -> dict[str, dict[str, float]]:
    """Return the speed of the reverse SDE in `size.sampling` steps, for so many images at once."""
    net = build_unet(3, size.side, size.channels, seed=0).eval()
    x = torch.rand(images, 3, size.side, size.side, device=default_device())
    compared = WAYS | (GRAPHS if use_gpu() and images < size.images else {})

    def call(way: Way) -> Callable[[], Any]:
        own = prepare(net, way, size, images, "attack")
        purifier = purifier_of(own, size.sampling, recipe)

        def run() -> None:
            with torch.no_grad(), autocast_forward(own, x.device, way.precision):
                purifier(x)

        return run

    return ratios({name: call(way) for name, way in compared.items()})


def gradient_speeds(recipe: FewStepRecipe, size: BenchSize) -> dict[str, dict[str, float]]:
    """Return the speed of gradients through a one-step purifier and ResNet-18, and how far they are from `FLOAT32`'s.

    `difference`: of the gradient of the same noise, ‖g - g₀‖ / ‖g₀‖; `signs`: the share of pixels with the same sign.
    """
    net = build_unet(3, size.side, size.channels, seed=0).eval()
    classifier = build_classifier("resnet18", in_channels=3, size=size.side, width=size.width, seed=0).eval()
    x = torch.rand(size.passes // 4, 3, size.side, size.side, generator=torch.Generator().manual_seed(0))
    x, y = x.to(default_device()), torch.zeros(len(x), dtype=torch.long, device=default_device())
    gradients: dict[str, Tensor] = {}

    def call(name: str, way: Way) -> Callable[[], Any]:
        own, head = (prepare(m, way, size, 4 * len(x), "attack") for m in (net, classifier))
        defence = PurifiedClassifier(purifier_of(own, 1, recipe, "ddim"), head.requires_grad_(False))

        def run() -> None:
            with (
                autocast_forward(own, x.device, way.precision),
                autocast_forward(head, x.device, way.precision),
                seeded_noise(defence, 0, x.device),
            ):
                gradients[name] = expected_loss(defence, x, y, 4, 4)[1]

        return run

    out = ratios({name: call(name, way) for name, way in WAYS.items()})
    plain = gradients[FLOAT32]
    for name, row in out.items():
        row["difference"] = ((gradients[name] - plain).norm() / plain.norm()).item()
        row["signs"] = (gradients[name].sign() == plain.sign()).double().mean().item()
        row["passes_per_second"] = 4 * len(x) / row["seconds"]
    return out


def gpu_benchmark(recipe: FewStepRecipe, size: BenchSize) -> dict[str, Any]:
    """Return all tables, by the work they are about."""
    return {
        "training": training_speeds(recipe, size),
        f"sampling {size.sampling} steps, batch {size.images}": sampling_speeds(recipe, size, size.images),
        f"sampling {size.sampling} steps, batch 1": sampling_speeds(recipe, size, 1),
        "gradient with EOT 4 through one step and ResNet-18": gradient_speeds(recipe, size),
    }


def main(arguments: list[str] | None = None) -> None:
    """Measure and write the ratios; without a GPU do nothing."""
    print_in_any_locale()
    parser = argparse.ArgumentParser(prog="python -m lib.pipeline.gpu_benchmark", description=main.__doc__)
    parser.add_argument("--profile", default="cifar10", help="whose diffusion model (default: cifar10)")
    parser.add_argument("--commit", default="", help="that the file states, where there is no repository")
    args = parser.parse_args(arguments)
    if not use_gpu():
        print("no CUDA GPU here: nothing is measured")
        return
    settings = compose_profile(args.profile)
    recipe = few_step_recipe(settings["diff"])
    tables = gpu_benchmark(recipe, BenchSize(recipe.channels))
    out = results_dir(settings["data"]["dataset"], "bench") / "gpu.json"
    origin = {"commit": args.commit or git_state()[0], "device": device_name(), "torch": torch.__version__}
    write_json(out, origin | {"channels": recipe.channels, "tables": tables})
    for work, table in tables.items():
        print(work)
        for name, row in table.items():
            print(f"  {name:16} " + ", ".join(f"{key} {value:.4g}" for key, value in row.items()))
    print(f"written: {out.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
