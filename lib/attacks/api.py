"""One registry of attacks behind one call, `attack`, which checks its input and its output and leaves no trace.

| attack | implementation | why |
|---|---|---|
| fgsm | `lib.attacks.common` | torchattacks takes the mean loss: small gradients underflow in big batches only |
| pgd, eotpgd | `lib.attacks.common` | torchattacks returns the last iterate even if an earlier one was misclassified |
| apgd-ce, apgd-dlr, apgd-t | `lib.attacks.apgd` | torchattacks: 10 steps, overwrites the random state, noise depends \
on the batch; APGD-T L2 steps all images by the first one's step size and fails below 4 classes |
| square | `lib.attacks.square` | torchattacks: one square for a whole batch, never on the last row and column |
| cw | `lib.attacks.carlini_wagner` | torchattacks: frozen on pixels at 0 or 1, wrong margin for negative logits, one c |
| deepfool | `lib.attacks.deepfool` | torchattacks: one image at a time, NaN pixels where a gradient is 0 |
| jsma-f, jsma-z | `lib.attacks.jsma` | torchattacks: logits only, one image at a time, target (y + 1) mod 10 |
| fab-t | torchattacks 3.5.1 | right per image; here with 100 steps, random state and `param.grad` fenced off |
| autoattack | apgd-ce, apgd-t, fab-t, square | torchattacks runs the first three with 10 steps instead of 100 |
| autoattack-rand | apgd-ce, apgd-dlr | 100 steps of 20 EOT samples, for stochastic models |
| transfer | `lib.attacks.transfer` | made on a surrogate with high confidence: torchattacks has none |
| noise | `lib.attacks.square` | uniform noise in the ball: the control that uses no gradient |

An image's noise depends on the seed and the image alone (`lib.utils.per_image_rng`): a deterministic model gives it the same result
in any batch, up to rounding in the forward pass. Stochastic models draw from a forked global generator, batch by batch.
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
from lib.utils.random_state import isolated_rng


@dataclass(frozen=True)
class AttackEntry:
    """An attack: its function, its norms (the first is the default), fixed options, whether it needs eps, and whether
    its one pass finds the images that are misclassified already, so that no pass is spent on them before."""

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
    """Returns the options of an attack with their defaults; ValueError for an unknown attack."""
    if name not in REGISTRY:
        raise ValueError(f"unknown attack {name!r}: choose one of {', '.join(sorted(REGISTRY))}")
    parameters = inspect.signature(REGISTRY[name].run).parameters.values()
    free = (p for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in REGISTRY[name].fixed)
    return {p.name: p.default for p in free}


def check_call(name: str, eps: float | None, norm: str | None, batch_size: int, mode: str, options: dict) -> str:
    """Returns the norm after checking a call's settings; ValueError, or TypeError for unknown options."""
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
        raise ValueError(f"eps is {eps}: a finite radius >= 0 in pixel units is due")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}: it must be at least 1")
    if mode not in ("eval", "keep"):
        raise ValueError(f"mode is {mode!r}: choose 'eval' or 'keep' (the train/eval flags as they are)")
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
    """Returns adversarial images for `x` (n c h w in [0, 1]; `y`: int64 labels) against a model that answers logits.

    `name`: one of `REGISTRY`; `eps`: radius in pixel units, which minimal-distance attacks (cw, deepfool, jsma) may
    leave out; `norm`: the attack's first one when None; `generator`: one number drawn from it is the seed, 0 if None;
    `mode`: "eval", or "keep" for the model's own train/eval flags; `options`: see `attack_options(name)`.

    An image that meets the goal already (misclassified; by `kappa` or as `target` where the attack has these) is
    returned as it is, one that was broken once stays broken, and every result lies in the ball and in [0, 1].

    Raises ValueError for unusable input and TypeError for an unknown option, both before the attack's first step.
    """
    norm = check_call(name, eps, norm, batch_size, mode, options)
    check_images(x)
    check_labels("y", y, x)
    target = options.get("target")
    entry, x = REGISTRY[name], x.detach()
    if not len(x):
        return x.clone()
    device = generator.device if generator else "cpu"
    seed = int(torch.randint(2**62, (), generator=generator, device=device)) if generator else 0
    with isolated_rng(model, seed, x.device, mode):
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
                some = options if target is None else options | {"target": target[rows]}
                found = entry.run(model, x[rows], y[rows], eps, norm, seed, **entry.fixed, **some).detach()
                x_adv[rows] = found if eps is None or norm == "L0" else project(found, x[rows], eps, norm)
                bar.update(len(rows))
    check_result(x_adv, x, eps, norm)
    return x_adv
