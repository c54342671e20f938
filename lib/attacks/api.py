"""One registry of attacks behind one call, `attack`, which checks its input and its output and leaves no trace.

An image's noise depends on the seed and the image alone (`lib.utils.per_image_rng`): a deterministic model gives it the
same result in any batch, up to rounding in the forward pass. The noise of random models comes from a forked global
generator, batch by batch.

Why not torchattacks 3.5.1 alone (shown in `tests/attacks/test_torchattacks_regressions.py`):

| attack | in torchattacks |
|---|---|
| fgsm | the loss is a mean: small gradients underflow in big batches only |
| pgd, eotpgd | the last iterate is returned even if an earlier one was misclassified |
| apgd-ce, apgd-dlr, apgd-t | 10 steps, the random state is overwritten, noise depends on the batch |
| apgd-t | all images step by the first one's L2 step size; fails below 4 classes |
| square | one square for a whole batch, never on the last row and column |
| cw | frozen on pixels at 0 or 1, wrong margin for negative logits, one c |
| deepfool | one image at a time, NaN pixels where a gradient is 0 |
| jsma-f, jsma-z | logits only, one image at a time, target (y + 1) mod 10 |
| fab-t | right per image: it is used here, with 100 steps and random state and `param.grad` fenced off |
| autoattack, autoattack-rand | 10 steps in place of 100 |
| transfer | not there |
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lib.attacks.apgd import apgd, apgd_targeted
from lib.attacks.autoattack import autoattack, autoattack_rand
from lib.attacks.carlini_wagner import carlini_wagner
from lib.attacks.checks import check_labels, check_result, checked_logits, outside_ball
from lib.attacks.common import Images, goal_met, per_image, project
from lib.attacks.deepfool import deepfool
from lib.attacks.fab import fab_t
from lib.attacks.gate import ModelGate, plain_autograd, roundings, working_copy
from lib.attacks.jsma import jsma
from lib.attacks.pgd import fgsm, pgd
from lib.attacks.square import random_noise, square
from lib.attacks.transfer import transfer
from lib.data import check_images
from lib.utils.progress import tqdm
from lib.utils.random_state import seeded_noise
from lib.utils.validation import NonNegative, PositiveInt, check_settings, check_value


@dataclass(frozen=True)
class AttackEntry:
    """An attack of the registry.

    Attributes:
        run: the attack; its keyword-only parameters are its options, and their annotations say what is valid.
        norms: the norms that it has; the first is the default.
        fixed: options that the name decides.
        needs_eps: whether it needs a radius.
        one_pass: whether its one pass also finds the images that are misclassified already, so that `attack` spends
            none on them before.
        classes: number of classes that it needs, besides what its loss needs.
    """

    run: Callable[..., Images]
    norms: tuple[str, ...]
    fixed: dict[str, Any] = field(default_factory=dict)
    needs_eps: bool = True
    one_pass: bool = False
    classes: int = 2


BALLS = ("Linf", "L2")
REGISTRY = {
    "fgsm": AttackEntry(fgsm, ("Linf",), one_pass=True),
    "pgd": AttackEntry(pgd, BALLS),
    "eotpgd": AttackEntry(partial(pgd, eot=10), BALLS),
    "apgd-ce": AttackEntry(apgd, BALLS, {"loss": "ce"}),
    "apgd-dlr": AttackEntry(apgd, BALLS, {"loss": "dlr"}),
    "apgd-t": AttackEntry(apgd_targeted, BALLS),
    "fab-t": AttackEntry(fab_t, BALLS),
    "square": AttackEntry(square, BALLS),
    "autoattack": AttackEntry(autoattack, BALLS),
    "autoattack-rand": AttackEntry(autoattack_rand, BALLS, classes=3),
    "noise": AttackEntry(random_noise, BALLS),
    "transfer": AttackEntry(transfer, BALLS),
    "cw": AttackEntry(carlini_wagner, ("L2",), needs_eps=False),
    "deepfool": AttackEntry(deepfool, ("L2",), needs_eps=False),
    "jsma-f": AttackEntry(jsma, ("L0",), {"softmax": True}, needs_eps=False),
    "jsma-z": AttackEntry(jsma, ("L0",), {"softmax": False}, needs_eps=False),
}


def attack_options(name: Any) -> dict[str, Any]:
    """Return the options of an attack.

    Args:
        name: one of `REGISTRY`.

    Returns:
        The default of each option by its name, `inspect.Parameter.empty` for one that must be given.

    Raises:
        ValueError: for an unknown attack.
    """
    if not isinstance(name, str) or name not in REGISTRY:
        raise ValueError(f"unknown attack {name!r}: choose one of {', '.join(sorted(REGISTRY))}")
    parameters = inspect.signature(REGISTRY[name].run).parameters.values()
    free = (p for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in REGISTRY[name].fixed)
    return {p.name: p.default for p in free}


class CheckedCall(NamedTuple):
    """The settings of a call of `attack` after their check: numbers are Python's own, the norm is never None."""

    eps: float | None
    norm: str
    options: dict[str, Any]


def check_call(
    name: Any,
    eps: Any = None,
    norm: Any = None,
    options: Mapping[str, Any] | None = None,
    *,
    batch_size: Any = 256,
    mode: Any = "eval",
) -> CheckedCall:
    """Check a call of `attack` as far as that goes without model and images.

    Args:
        name: one of `REGISTRY`.
        eps: radius of the ball, in pixel units, finite and >= 0; None for attacks that do without.
        norm: one of the attack's norms; its first one when None.
        options: the attack's own options by name.
        batch_size: images in a batch, >= 1.
        mode: "eval" or "keep".

    Returns:
        The radius, norm and options to call it with.

    Raises:
        ValueError: for an unknown attack or norm, a missing radius or option, a setting of another type or range.
        TypeError: for an unknown option.
    """
    valid, options = attack_options(name), dict(options or {})
    if unknown := sorted(set(options) - set(valid)):
        raise TypeError(f"{name} has no option {', '.join(unknown)}: its options are {', '.join(valid) or 'none'}")
    norms = REGISTRY[name].norms
    if norm is not None and norm not in norms:
        raise ValueError(f"{name} has no norm {norm!r}: choose one of {', '.join(norms)}")
    norm = norm or norms[0]
    if eps is None and REGISTRY[name].needs_eps:
        raise ValueError(f"{name} needs eps, the radius of the {norm} ball in pixel units, e.g. 8 / 255")
    eps = check_value("eps", eps, NonNegative | None)
    check_value("batch_size", batch_size, PositiveInt)
    check_value("mode", mode, Literal["eval", "keep"])
    if missing := [k for k, default in valid.items() if default is inspect.Parameter.empty and k not in options]:
        raise ValueError(f"{name} needs {missing[0]}=...: see `lib.attacks.api.attack_options({name!r})`")
    settings = {k: v for k, v in options.items() if k != "target"}  # labels, which depend on the images
    options |= check_settings(REGISTRY[name].run, settings, f"{name}'s ")
    if options.get("by") == "cw" and norm != "L2":
        raise ValueError(f"expected {name}'s by to be 'pgd', or 'cw' with norm L2, got 'cw' with norm {norm}")
    return CheckedCall(eps, norm, options)


def check_classes(name: str, options: Mapping[str, Any], classes: int) -> None:
    """Check that an attack can attack a model of that many classes.

    Args:
        name: one of `REGISTRY`.
        options: the attack's own options by name, as `check_call` returns them.
        classes: number of the model's logits.

    Raises:
        ValueError: for too few.
    """
    loss = (attack_options(name) | REGISTRY[name].fixed | dict(options)).get("loss")
    needs = 3 if loss == "dlr" else REGISTRY[name].classes
    if classes < needs:
        raise ValueError(f"{name} expected at least {needs} classes for the DLR loss, got {classes}: use another loss")


def _rounded(
    gate: ModelGate,
    x_adv: Images,
    x: Tensor,
    y: Tensor,
    target: Tensor | None,
    eps: float | None,
    norm: str,
    kappa: float,
    batch_size: int,
) -> Tensor:
    """Return images in the precision of `x`: rounded towards `x`, or else so that they meet the goal in the ball."""
    out, *others = roundings(x_adv, x)
    for other in others:
        with torch.no_grad():
            z = torch.cat([gate(part.float()) for part in out.split(batch_size)])
            z_other = torch.cat([gate(part.float()) for part in other.split(batch_size)])
        better = (
            goal_met(z_other, y, target, kappa) & ~goal_met(z, y, target, kappa) & ~outside_ball(other, x, eps, norm)
        )
        out = torch.where(per_image(better), other, out)
    return out


def attack(
    name: Any,
    model: Any,
    x: Any,
    y: Any,
    eps: Any = None,
    norm: Any = None,
    generator: Any = None,
    *,
    batch_size: Any = 256,
    progress: bool = True,
    mode: Any = "eval",
    **options: Any,
) -> Tensor:
    """Attack a model and return adversarial images.

    An image that meets the goal already (misclassified; by `kappa` or as `target` where the attack has these) is
    returned as it is, and one that was broken once stays broken. Random states, train/eval flags and `param.grad` are
    as before afterwards.

    Args:
        name: one of `REGISTRY`; the table in `lib.attacks` has the papers.
        model: maps images to logits (n, k), k >= 2.
        x: images (n, c, h, w), floating-point, in [0, 1].
        y: labels (n,), int64, on the device of the images.
        eps: radius of the ball, in pixel units (jsma: number of values); cw, deepfool and jsma may do without.
        norm: "Linf", "L2" or "L0"; the attack's first one when None.
        generator: one number drawn from it is the seed; 0 when None.
        batch_size: images in a batch.
        progress: whether to show a progress bar.
        mode: "eval" for eval mode, "keep" for the model's own train/eval flags.
        **options: see `attack_options(name)`.

    Returns:
        Adversarial images of the same shape and dtype, in the ball and in [0, 1], without a graph.

    Warns:
        NoGradientWarning: if the attack follows gradients and the model gave it none (`lib.attacks.gate`).
        AttackWarning: if answers to attacked images were not finite: they count as misclassified.

    Raises:
        ValueError: for unusable input, before the attack's first step; for answers that are no logits, at any pass.
        TypeError: for an unknown option.
        RuntimeError: if the attack returned images outside the ball or [0, 1], a bug.

    Example:
        >>> from lib.models import accuracy, build_classifier
        >>> model = build_classifier("cnn", width=4, seed=0).eval()
        >>> x = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> y = model(x).argmax(1)
        >>> x_adv = attack("pgd", model, x, y, eps=0.2, steps=10, progress=False)
        >>> accuracy(model, x, y), accuracy(model, x_adv, y), round((x_adv - x).abs().max().item(), 4)
        (1.0, 0.0, 0.2)
    """
    eps, norm, options = check_call(name, eps, norm, options, batch_size=batch_size, mode=mode)
    check_value("model", model, Callable)
    check_value("generator", generator, torch.Generator | None)
    check_images(x)
    check_labels("y", y, x)
    if (target := options.pop("target", None)) is not None:
        check_labels("target", target, x)
    if not len(x):
        return x.detach().clone()
    entry, gate = REGISTRY[name], ModelGate(model, x)
    device = generator.device if generator else "cpu"
    seed = int(torch.randint(2**62, (), generator=generator, device=device)) if generator else 0
    with plain_autograd(x.device), seeded_noise(model, seed, x.device, mode):
        clean, y, target = working_copy(x), y.clone(), None if target is None else target.clone()
        z = checked_logits(gate, clean[:1] if entry.one_pass else clean, batch_size)
        check_labels("y", y, x, z.shape[1])
        check_classes(name, options, z.shape[1])
        if target is not None:
            check_labels("target", target, x, z.shape[1])
        todo = torch.arange(len(x), device=x.device)
        if not entry.one_pass:
            todo = todo[~goal_met(z, y, target, options.get("kappa", 0.0))]
        x_adv = clean.clone()
        with tqdm(total=len(todo), desc=name, unit="image", leave=False, disable=not progress) as bar:
            for rows in todo.split(batch_size) if len(todo) else ():
                own = entry.fixed | options | ({} if target is None else {"target": target[rows]})
                points = entry.run(gate, clean[rows], y[rows], eps, norm, seed, **own).detach()
                x_adv[rows] = points if eps is None or norm == "L0" else project(points, clean[rows], eps, norm)
                bar.update(len(rows))
        x_adv = _rounded(gate, x_adv, x.detach(), y, target, eps, norm, options.get("kappa", 0.0), batch_size)
    check_result(x_adv, x.detach(), eps, norm)
    gate.warn(name)
    return x_adv
