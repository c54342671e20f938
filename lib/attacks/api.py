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
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lib.attacks.apgd import apgd, apgd_targeted
from lib.attacks.autoattack import autoattack, autoattack_rand
from lib.attacks.carlini_wagner import carlini_wagner
from lib.attacks.checks import check_labels, check_result, checked_logits
from lib.attacks.common import Images, Model, goal_met, project
from lib.attacks.deepfool import deepfool
from lib.attacks.fab import fab_t
from lib.attacks.jsma import jsma
from lib.attacks.pgd import fgsm, pgd
from lib.attacks.square import random_noise, square
from lib.attacks.transfer import transfer
from lib.data import check_images
from lib.utils.progress import tqdm
from lib.utils.random_state import seeded_noise


@dataclass(frozen=True)
class AttackEntry:
    """An attack of the registry.

    Attributes:
        run: the attack; its keyword-only parameters are its options.
        norms: the norms that it has; the first is the default.
        fixed: options that the name decides.
        needs_eps: whether it needs a radius.
        one_pass: whether its one pass also finds the images that are misclassified already, so that `attack` spends
            none on them before.
    """

    run: Callable[..., Images]
    norms: tuple[str, ...]
    fixed: dict[str, Any] = field(default_factory=dict)
    needs_eps: bool = True
    one_pass: bool = False


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
    "autoattack-rand": AttackEntry(autoattack_rand, BALLS),
    "noise": AttackEntry(random_noise, BALLS),
    "transfer": AttackEntry(transfer, BALLS),
    "cw": AttackEntry(carlini_wagner, ("L2",), needs_eps=False),
    "deepfool": AttackEntry(deepfool, ("L2",), needs_eps=False),
    "jsma-f": AttackEntry(jsma, ("L0",), {"softmax": True}, needs_eps=False),
    "jsma-z": AttackEntry(jsma, ("L0",), {"softmax": False}, needs_eps=False),
}


def attack_options(name: str) -> dict[str, Any]:
    """Return the options of an attack.

    Args:
        name: one of `REGISTRY`.

    Returns:
        The default of each option by its name.

    Raises:
        ValueError: for an unknown attack.
    """
    if name not in REGISTRY:
        raise ValueError(f"unknown attack {name!r}: choose one of {', '.join(sorted(REGISTRY))}")
    parameters = inspect.signature(REGISTRY[name].run).parameters.values()
    free = (p for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in REGISTRY[name].fixed)
    return {p.name: p.default for p in free}


def _check_call(name: str, eps: float | None, norm: str | None, batch_size: int, mode: str, options: dict) -> str:
    """Return the norm after checking a call's settings; ValueError, or TypeError for unknown options."""
    valid = attack_options(name)
    unknown = sorted(set(options) - set(valid))
    if unknown:
        raise TypeError(f"{name} has no option {', '.join(unknown)}: its options are {', '.join(valid) or 'none'}")
    norms = REGISTRY[name].norms
    if norm is not None and norm not in norms:
        raise ValueError(f"{name} has no norm {norm!r}: choose one of {', '.join(norms)}")
    if eps is None and REGISTRY[name].needs_eps:
        raise ValueError(f"{name} needs eps, the radius of the {norm or norms[0]} ball in pixel units, e.g. 8 / 255")
    if eps is not None and not 0 <= eps < float("inf"):
        raise ValueError(f"expected eps to be a finite radius >= 0 in pixel units, got {eps}")
    if batch_size < 1:
        raise ValueError(f"expected batch_size >= 1, got {batch_size}")
    if mode not in ("eval", "keep"):
        raise ValueError(f"expected mode 'eval', or 'keep' for the train/eval flags as they are, got {mode!r}")
    return norm or norms[0]


def attack(
    name: str,
    model: Model,
    x: Tensor,
    y: Tensor,
    eps: float | None = None,
    norm: str | None = None,
    generator: torch.Generator | None = None,
    *,
    batch_size: int = 256,
    progress: bool = True,
    mode: str = "eval",
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

    Raises:
        ValueError: for unusable input, before the attack's first step.
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
    norm = _check_call(name, eps, norm, batch_size, mode, options)
    check_images(x)
    check_labels("y", y, x)
    target = options.get("target")
    entry, x = REGISTRY[name], x.detach()
    if not len(x):
        return x.clone()
    device = generator.device if generator else "cpu"
    seed = int(torch.randint(2**62, (), generator=generator, device=device)) if generator else 0
    with seeded_noise(model, seed, x.device, mode):
        z = checked_logits(model, x[:1] if entry.one_pass else x, batch_size)
        check_labels("y", y, x, z.shape[1])
        if target is not None:
            check_labels("target", target, x, z.shape[1])
        todo = torch.arange(len(x), device=x.device)
        if not entry.one_pass:
            todo = todo[~goal_met(z, y, target, options.get("kappa", 0.0))]
        x_adv = x.clone()
        with tqdm(total=len(todo), desc=name, unit="image", leave=False, disable=not progress) as bar:
            for rows in todo.split(batch_size) if len(todo) else ():
                own = entry.fixed | options | ({} if target is None else {"target": target[rows]})
                points = entry.run(model, x[rows], y[rows], eps, norm, seed, **own).detach()
                x_adv[rows] = points if eps is None or norm == "L0" else project(points, x[rows], eps, norm)
                bar.update(len(rows))
    check_result(x_adv, x, eps, norm)
    return x_adv
