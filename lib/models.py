"""Classifiers: a small CNN family and the CIFAR-style ResNets; pixels in [0, 1] go in, logits come out.

Normalisation is the model's first layer, so that attacks act in pixel space and no caller can forget it.
"""

import math
from collections.abc import Callable

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lib.seeds import derive


def on_gpu() -> bool:
    """Says whether experiments run on a CUDA GPU: where there is one, unless `ACCELERATE_USE_CPU=true` keeps it out."""
    return torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")


def device() -> torch.device:
    """Returns where networks are trained and asked: the GPU, else the CPU.

    Other accelerators are left alone: Apple's has no float64.
    """
    return PartialState(cpu=not on_gpu()).device


def beside(model: Callable, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Returns tensors, such as images and labels, on the device of a network's weights; without weights as they are."""
    weights = model.parameters() if isinstance(model, nn.Module) else ()
    place = next((w.device for w in weights), None)
    return tuple(t.to(place) if place else t for t in tensors)


class Normalize(nn.Module):
    """Maps pixels in [0, 1] to zero mean and unit variance per channel; `mean`, `std`: one or one per channel."""

    def __init__(self, mean: float | list[float] = 0.5, std: float | list[float] = 0.5) -> None:
        super().__init__()
        for name, value in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.as_tensor(value, dtype=torch.float32).reshape(1, -1, 1, 1))

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        return (x - self.mean) / self.std


def cnn(in_channels: int = 1, size: int = 8, classes: int = 10, width: int = 16, dropout: float = 0.0) -> nn.Sequential:
    """Returns a CNN without batch normalisation: a 3x3 convolution of `width` channels, then one of twice as many
    channels and stride 2 for each halving down to 4x4, then one linear layer (1.6 k parameters at width 4 on 8x8).
    """
    layers: list[nn.Module] = [Normalize(), nn.Conv2d(in_channels, width, 3, padding=1), nn.ReLU()]
    while size > 4:
        layers += [nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.ReLU()]
        width, size = 2 * width, math.ceil(size / 2)
    return nn.Sequential(*layers, nn.Flatten(), nn.Dropout(dropout), nn.Linear(width * size * size, classes))


class Residual(nn.Module):
    """A pre-2016 residual block: two 3x3 convolutions (basic) or 1x1-3x3-1x1 with expansion 4 (bottleneck)."""

    def __init__(self, inputs: int, planes: int, stride: int, bottleneck: bool) -> None:
        super().__init__()
        outputs = planes * (4 if bottleneck else 1)
        sizes = [(inputs, planes, 1, 1), (planes, planes, 3, stride), (planes, outputs, 1, 1)]
        sizes = sizes if bottleneck else [(inputs, planes, 3, stride), (planes, outputs, 3, 1)]
        layers: list[nn.Module] = []
        for a, b, kernel, step in sizes:
            layers += [nn.Conv2d(a, b, kernel, step, kernel // 2, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
        self.body = nn.Sequential(*layers[:-1])
        self.skip = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.skip = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.skip(x))


BLOCKS = {"resnet18": (False, (2, 2, 2, 2)), "resnet34": (False, (3, 4, 6, 3)), "resnet50": (True, (3, 4, 6, 3))}


def resnet(arch: str, in_channels: int = 3, classes: int = 10, width: int = 64) -> nn.Sequential:
    """Returns the CIFAR form of He et al. 2015's ResNet (3x3 stem, no max-pooling): resnet18, resnet34 or resnet50."""
    bottleneck, counts = BLOCKS[arch]
    channels = width
    layers: list[nn.Module] = [Normalize(), nn.Conv2d(in_channels, width, 3, 1, 1, bias=False)]
    layers += [nn.BatchNorm2d(width), nn.ReLU()]
    for stage, count in enumerate(counts):
        for block in range(count):
            stride = 2 if stage > 0 and block == 0 else 1
            layers.append(Residual(channels, width * 2**stage, stride, bottleneck))
            channels = width * 2**stage * (4 if bottleneck else 1)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


ARCHITECTURES = ("cnn", *BLOCKS)


def build(
    arch: str,
    *,
    in_channels: int = 1,
    size: int = 8,
    classes: int = 10,
    width: int | None = None,
    dropout: float = 0.0,
    seed: int,
) -> nn.Module:
    """Returns a classifier whose initial weights depend on `seed` alone; the global generator is left untouched.

    `arch`: one of `ARCHITECTURES`; `width`: channels of the first layer (16 for `cnn`, 64 for ResNets when None);
    `dropout` (before the last layer) is for `cnn`. Raises ValueError for an unknown architecture.
    """
    if arch not in ARCHITECTURES:
        raise ValueError(f"unknown architecture {arch!r}: choose one of {', '.join(ARCHITECTURES)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "init"))
        if arch == "cnn":
            return cnn(in_channels, size, classes, width or 16, dropout)
        return resnet(arch, in_channels, classes, width or 64)


class Ensemble(nn.Module):
    """Averages its members' logits (`mean="logits"`) or probabilities (`mean="probabilities"`, answering log p)."""

    def __init__(self, members: list[nn.Module], mean: str = "logits") -> None:
        super().__init__()
        if mean not in ("logits", "probabilities"):
            raise ValueError(f"mean is {mean!r}: choose 'logits' or 'probabilities'")
        self.members, self.mean = nn.ModuleList(members), mean

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k"]:
        logits = torch.stack([member(x) for member in self.members])
        if self.mean == "logits":
            return logits.mean(0)
        return logits.log_softmax(-1).logsumexp(0) - math.log(len(self.members))


def parameters(model: nn.Module) -> int:
    """Returns the number of trainable parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
