"""The gate between an attack and a model: every pass is checked, brought to the model's precision, and watched.

What it watches is what an attack cannot say by itself: whether the model gave it a gradient at all. Without one a
gradient attack leaves every image as it is, which looks like robustness (Athalye et al. 2018a).
"""

import math
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lib.attacks.common import Images, Logits
from lib.models import check_answer
from lib.utils.references import reachable_modules

HALF = (torch.float16, torch.bfloat16)


class AttackWarning(UserWarning):
    """What an attack met that its images alone do not show."""


class NoGradientWarning(AttackWarning):
    """An attack that follows gradients got none, or none that is a number: what it leaves is no robustness."""


class ModelGate:
    """A model as attacks see it: logits (n, k) in the precision of the attack's images, every answer checked.

    The model gets a copy of the images, in the caller's precision or else in that of its weights, and under the
    autocast in force where the gate was built, so that attacks compute in full precision around it.

    Attributes:
        classes: number of logits; None before the first pass.
        wanted: whether an attack asked for a gradient.
        usable: whether one was neither 0 nor NaN.
        not_finite: how many gradients of images were not finite; their entries are taken for 0, infinity for the
            largest number.
        bad_answers: how many answers were not finite; they count as misclassified.
    """

    def __init__(self, model: Callable, x: Tensor, classes: int | None = None) -> None:
        self.model, self.caller, self.classes = model, x.dtype, classes
        self.dtype: torch.dtype | None = None
        self.wanted = self.usable = False
        self.not_finite = self.bad_answers = 0
        self.autocast: Callable[[], Any] = nullcontext
        if torch.is_autocast_enabled(x.device.type):  # without cache: it may hold weights of inference mode
            dtype = torch.get_autocast_dtype(x.device.type)
            self.autocast = partial(torch.autocast, x.device.type, dtype=dtype, cache_enabled=False)

    def __call__(self, x: Images) -> Logits:
        if self.dtype is not None:
            return self.run(x, self.dtype)
        failures: list[RuntimeError] = []
        for dtype in self.precisions(x):
            try:
                z = self.run(x, dtype)
            except RuntimeError as error:
                if not re.search("type|not implemented for", str(error)):
                    raise
                failures.append(error)
                continue
            self.dtype = dtype
            return z
        reason = str(failures[0]).splitlines()[0]
        raise ValueError(f"expected a model that takes images of {self.caller}, got {reason!r}") from failures[0]

    def precisions(self, x: Images) -> Iterator[torch.dtype]:
        """Yield the precisions in which the model may take images: the caller's, the attack's, its weights'."""
        yield self.caller
        tried = {self.caller}
        weights = (p.dtype for module in reachable_modules(self.model) for p in module.parameters(recurse=False))
        for dtype in (x.dtype, *weights):
            if dtype.is_floating_point and dtype not in tried:
                tried.add(dtype)
                yield dtype

    def run(self, x: Images, dtype: torch.dtype) -> Logits:
        """Return the logits of one pass in a precision; ValueError for what is no answer of a classifier."""
        given = x.to(dtype, copy=True)
        if given.requires_grad:
            self.wanted = True
            given.register_hook(self.watch_gradient)
        version = given._version
        try:
            with self.autocast():
                z = self.model(given)
        except RuntimeError as error:
            if "nference tensor" not in str(error):
                raise
            remedy = "make or load it outside torch.inference_mode()"
            raise ValueError(f"expected a model that can be differentiated, got inference tensors: {remedy}") from error
        changed = given._version != version or (self.dtype is None and not torch.equal(given, x.to(dtype)))
        if changed:
            remedy = "write x = x - mean, not x -= mean, or give it a copy, x.clone()"
            raise ValueError(f"expected a model that leaves its images as they are, got a change in place: {remedy}")
        check_answer(z, len(x), self.classes)
        self.classes = z.shape[1]
        if not math.isfinite(z.detach().sum()):  # a fast test of all at once
            self.bad_answers += int((~z.isfinite()).any(1).sum())
        return z.to(x.dtype)

    def watch_gradient(self, grad: Tensor) -> Tensor:
        """Note whether a gradient of the images is usable, and return it with 0 for NaN."""
        if not math.isfinite(grad.sum()):
            self.not_finite += int((~grad.isfinite()).flatten(1).any(1).sum())
            grad = grad.nan_to_num(0.0)
        self.usable = self.usable or bool(grad.any())
        return grad

    def warn(self, name: str, stacklevel: int = 3) -> None:
        """Warn of gradients that the attack `name` did not get, and of answers that are not finite."""
        if self.wanted and not self.usable:
            remedy = "use BPDA (`lib.attacks.bpda`), another loss, or square and transfer, which need no gradient"
            message = f"{name} got no gradient: it was 0 or NaN for all images, so that what resists proves nothing"
            warnings.warn(NoGradientWarning(f"{message}: {remedy}"), stacklevel=stacklevel)
        elif self.not_finite:
            message = f"{name} got NaN or infinity in {self.not_finite} gradients of images: it may be too weak"
            warnings.warn(NoGradientWarning(message), stacklevel=stacklevel)
        if self.bad_answers:
            message = f"the model's answers to {name} were not finite {self.bad_answers} times"
            warnings.warn(AttackWarning(f"{message}: they count as misclassified"), stacklevel=stacklevel)


@contextmanager
def plain_autograd(device: torch.device) -> Iterator[None]:
    """Lift inference mode, `no_grad` and autocast for the block, whatever the caller is in."""
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        yield


def working_copy(x: Tensor) -> Images:
    """Return images as attacks compute with them: a contiguous copy, in float32 where their precision is half."""
    dtype = torch.float32 if x.dtype in HALF else x.dtype
    return x.detach().to(dtype, copy=True, memory_format=torch.contiguous_format)


def roundings(x_adv: Images, x: Tensor) -> Iterator[Tensor]:
    """Yield images in the precision of `x`, pixels rounded towards those of `x`, to the nearest and away from `x`."""
    towards = cast_towards(x_adv, x)
    yield towards
    if x.dtype in HALF:
        nearest = x_adv.to(x.dtype)
        yield nearest
        away = (x_adv - towards.float()).sign().to(torch.int16)  # none where towards is exact
        yield (towards.view(torch.int16) + away).view(x.dtype).clamp(0, 1)


def cast_towards(x_adv: Images, x: Tensor) -> Tensor:
    """Cast images to the precision of `x`, every pixel rounded towards that of `x`, so that none leaves a ball."""
    if x.dtype not in HALF:
        return x_adv.to(x.dtype)
    out, x = x_adv.to(x.dtype) + 0.0, x + 0.0  # no -0
    beyond = (out.float() - x.float()).abs() > (x_adv - x.float()).abs()
    steps = (x.view(torch.int16) - out.view(torch.int16)).sign().to(torch.int16)  # numbers >= 0 are ordered as integers
    return torch.where(beyond, (out.view(torch.int16) + steps).view(x.dtype), out)
