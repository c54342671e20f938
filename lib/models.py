"""Classifiers: a small CNN family and the CIFAR-style ResNets; pixels in [0, 1] go in, logits come out.

Normalisation is the model's first layer, so that attacks act in pixel space and no caller can omit it.
"""

import importlib
import math
from collections.abc import Callable
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from lib.utils.device import to_model_device
from lib.utils.random_state import restored_flags
from lib.utils.seeds import derive_seed
from lib.utils.validation import BelowOne, Integer, PositiveInt, check_settings, check_value


class Normalize(nn.Module):
    """Map pixels in [0, 1] to zero mean and unit variance per channel; `mean`, `std`: one or one per channel."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: float | list[float] = 0.5, std: float | list[float] = 0.5) -> None:
        super().__init__()
        for name, value in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.as_tensor(value, dtype=torch.float32).reshape(1, -1, 1, 1))

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        return (x - self.mean) / self.std


def cnn(in_channels: int = 1, size: int = 8, classes: int = 10, width: int = 16, dropout: float = 0.0) -> nn.Sequential:
    """Return a CNN without batch normalisation, of 1.6 k parameters at width 4 on 8x8.

    A 3x3 convolution of `width` channels, then one of stride 2 and twice as many channels for each halving down to 4x4,
    then one linear layer.
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
    """Return the CIFAR form of He et al. 2015's ResNet (3x3 stem, no max-pooling): resnet18, resnet34 or resnet50."""
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


def build_classifier(
    arch: str,
    *,
    in_channels: PositiveInt = 1,
    size: PositiveInt = 8,
    classes: Annotated[Integer, Field(ge=2)] = 10,
    width: PositiveInt | None = None,
    dropout: BelowOne = 0.0,
    seed: Integer,
) -> nn.Module:
    """Return a classifier whose initial weights depend on `seed` alone; the global generator is left untouched.

    `arch`: one of `ARCHITECTURES`; `width`: channels of the first layer (16 for `cnn`, 64 for ResNets when None);
    `dropout` (before the last layer) is for `cnn`. Raises ValueError for settings that no network has.
    """
    check_value("arch", arch, Literal[ARCHITECTURES])
    values = {"in_channels": in_channels, "size": size, "classes": classes, "width": width}
    check_settings(build_classifier, values | {"dropout": dropout, "seed": seed})
    if dropout and arch != "cnn":
        raise ValueError(f"expected dropout 0 for {arch}, got {dropout}: only cnn has it")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "init"))
        if arch == "cnn":
            return cnn(in_channels, size, classes, 16 if width is None else width, dropout)
        return resnet(arch, in_channels, classes, 64 if width is None else width)


class Ensemble(nn.Module):
    """Average its members' logits (`mean="logits"`) or probabilities (`mean="probabilities"`: it answers log p)."""

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


def count_parameters(model: nn.Module) -> int:
    """Return the number of trainable parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def check_answer(z: Any, n: int, classes: int | None = None) -> None:
    """Check that a model's answer has the form of logits.

    Args:
        z: the answer.
        n: number of images.
        classes: number of logits of an image; any from 2 when None.

    Raises:
        ValueError: for anything but a floating-point tensor (n, classes).
    """
    shape = f"({n}, {classes or 'classes >= 2'})"
    if not isinstance(z, Tensor):
        remedy = "attack a function that returns the tensor alone, such as lambda x: model(x)[0] or model(x).logits"
        raise ValueError(f"expected logits {shape} from the model, got {type(z).__name__}: {remedy}")
    if z.ndim != 2 or len(z) != n or z.shape[1] < 2 or z.shape[1] != (classes or z.shape[1]):
        raise ValueError(f"expected logits {shape} from the model, got {tuple(z.shape)} for {n} images")
    if not z.is_floating_point():
        raise ValueError(f"expected floating-point logits from the model, got {z.dtype}: remove its argmax or rounding")


def check_logits(z: Float[Tensor, "n k"], whose: str = "the model") -> None:
    """Raise ValueError when `z` is not finite or looks like probabilities (rows in [0, 1] that sum to 1)."""
    if not torch.isfinite(z).all():
        raise ValueError(f"{whose} answers with NaN or infinity: check its weights and its inputs")
    if z.shape[1] > 1 and (z >= 0).all() and torch.allclose(z.sum(1), torch.ones(len(z), device=z.device), atol=1e-4):
        raise ValueError(f"expected logits, got probabilities from {whose}: remove its softmax")


@torch.no_grad()
def predict_logits(
    model: nn.Module, x: Float[Tensor, "n c h w"], batch_size: int = 1024, whose: str = "the teacher"
) -> Float[Tensor, "n k"]:
    """Return the model's logits on images in [0, 1], in eval mode, on the CPU; its mode is restored afterwards.

    Raises ValueError when they are probabilities or not finite.
    """
    with restored_flags(model):
        model.eval()
        z = torch.cat([model(*to_model_device(model, part)).float().cpu() for part in x.split(batch_size)])
    check_logits(z, whose)
    return z


NO_CLASS = -1  # of an answer that is not finite: it equals no label


def most_likely(z: Float[Tensor, "*n k"]) -> Int[Tensor, "*n"]:
    """Return the class of the largest logit, `NO_CLASS` where a logit is not finite: NaN's argmax would be class 0."""
    return torch.where(z.isfinite().all(-1), z.argmax(-1), NO_CLASS)


@torch.no_grad()
def batched_logits(model: Callable, x: Float[Tensor, "n c h w"], batch_size: int = 256) -> Float[Tensor, "n k"]:
    """Return a model's logits for images in [0, 1], whatever they are, in its own train/eval mode.

    Each batch is passed where the model's weights are; the logits are where the images are. Raises ValueError for
    answers that are no logits.
    """
    parts: list[Tensor] = []
    for images in x.split(batch_size):
        z = model(*to_model_device(model, images))
        check_answer(z, len(images), parts[0].shape[1] if parts else None)
        parts.append(z.to(x.device))
    return torch.cat(parts)


def predict_classes(model: Callable, x: Float[Tensor, "n c h w"], batch_size: int = 256) -> Int[Tensor, " n"]:
    """Return the predicted classes for images in [0, 1], see `batched_logits` and `most_likely`."""
    return most_likely(batched_logits(model, x, batch_size))


def logit_accuracy(z: Float[Tensor, "*draws n k"], y: Int[Tensor, " n"]) -> float:
    """Return the share in [0, 1] of logits `z` whose largest entry is at the label; logits not finite are wrong."""
    return (most_likely(z) == y).double().mean().item()


def accuracy(model: Callable, x: Float[Tensor, "n c h w"], y: Int[Tensor, " n"], batch_size: int = 256) -> float:
    """Return the share in [0, 1] of images that `model` classifies as `y`, in its own train/eval mode."""
    return (predict_classes(model, x, batch_size) == y).double().mean().item()


def list_models() -> list[str]:
    """Return the names of the classifiers that come with the repository, for `load`, sorted."""
    return importlib.import_module("lib.pretrained").classifier_names()


def load(name: str) -> nn.Module:
    """Load a classifier that comes with the repository: `lib.models.load("digits/trades")`.

    Weights are safetensors and checked against the SHA-256 of their card, see `lib.pretrained.load_classifier`, which
    imports this module. It is imported by its name here, so that no experiment, which loads none, depends on it.
    """
    return importlib.import_module("lib.pretrained").load_classifier(name)
