"""One registry of attacks behind one call, `attack`, which checks its input and its output and leaves no trace.

| attack | implementation | why |
|---|---|---|
| fgsm | `lib.pgd` | torchattacks takes the mean loss: small gradients underflow in big batches only |
| pgd, eotpgd | `lib.pgd` | torchattacks returns the last iterate even if an earlier one was misclassified |
| apgd-ce, apgd-dlr, apgd-t | `lib.apgd` | torchattacks: 10 steps, overwrites the random state, noise depends \
on the batch; APGD-T L2 steps all images by the first one's step size and fails below 4 classes |
| square | `lib.square` | torchattacks: one square for a whole batch, never on the last row and column |
| cw | `lib.carlini_wagner` | torchattacks: frozen on pixels at 0 or 1, wrong margin for negative logits, one c |
| deepfool | `lib.deepfool` | torchattacks: one image at a time, NaN pixels where a gradient is 0 |
| jsma-f, jsma-z | `lib.jsma` | torchattacks: logits only, one image at a time, target (y + 1) mod 10 |
| fab-t | torchattacks 3.5.1 | right per image; here with 100 steps, random state and `param.grad` fenced off |
| autoattack | apgd-ce, apgd-t, fab-t, square | torchattacks runs the first three with 10 steps instead of 100 |
| autoattack-rand | apgd-ce, apgd-dlr | 100 steps of 20 EOT samples, for stochastic models |
| transfer | `lib.wrappers` | made on a surrogate with high confidence: torchattacks has none |
| noise | `lib.square` | uniform noise in the ball: the control that uses no gradient |

An image's noise depends on the seed and the image alone (`lib.noise`): a deterministic model gives it the same result
in any batch, up to rounding in the forward pass. Stochastic models draw from a forked global generator, batch by batch.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torchattacks
from torch import Tensor, nn

from lib.apgd import apgd, apgd_targeted
from lib.carlini_wagner import carlini_wagner
from lib.data import check_images
from lib.deepfool import deepfool
from lib.jsma import jsma
from lib.pgd import Images, Labels, Logits, ascent, column, loss_named, pgd, project, success
from lib.progress import tqdm
from lib.seeds import derive
from lib.square import random_noise, square
from lib.wrappers import transfer, undisturbed

Model = Callable[[Images], Logits]


class Plain(nn.Module):
    """Shows `model` to torchattacks as a float32 module with one idle parameter and nothing else to change."""

    def __init__(self, model: Model, like: Tensor) -> None:
        super().__init__()
        self.idle = nn.Parameter(torch.zeros_like(like[0, 0, 0, 0]), requires_grad=False)
        self.call = (model,)  # in a tuple: torchattacks must not find its train/eval flags

    def forward(self, x: Images) -> Logits:
        return self.call[0](x.to(self.idle.dtype)).float()


def fgsm(
    model: Model,
    x: Images,
    y: Labels,
    eps: float,
    norm: str = "Linf",
    seed: int = 0,
    *,
    loss: str = "ce",
    tau: float = 100.0,
) -> Images:
    """Returns x + eps sign(gradient of the loss, one of `lib.pgd.LOSSES`), in [0, 1] (Goodfellow et al. 2015).

    One pass says which images are misclassified already, too: they stay as they are.
    """
    z, _, grad = ascent(model, x, y, loss_named(loss, tau))
    check_answers(z, len(x))
    return project(x + eps * grad.sign() * column((~success(z, y)).to(x.dtype)), x, eps, norm)


def fab_t(
    model: Model,
    x: Images,
    y: Labels,
    eps: float,
    norm: str = "Linf",
    seed: int = 0,
    *,
    steps: int = 100,
    targets: int = 9,
) -> Images:
    """Returns the points of torchattacks' targeted FAB (Croce and Hein 2020b), one restart without a random start."""
    with torch.no_grad():
        classes = min(model(x[:1]).shape[1], targets + 1)
    run = torchattacks.FAB(Plain(model, x), norm, eps, steps, seed=seed % 2**32, multi_targeted=True, n_classes=classes)
    return run(x.float(), y).to(x.dtype)


def relay(
    model: Model, x: Images, y: Labels, eps: float, norm: str, seed: int, *, parts: tuple[tuple[str, dict], ...]
) -> Images:
    """Returns the points of several attacks in a row, each on those images that resisted the ones before it."""
    x_adv, todo = x.clone(), torch.arange(len(x), device=x.device)
    for name, options in parts:
        if not len(todo):
            break
        entry = REGISTRY[name]
        x_adv[todo] = entry.run(model, x[todo], y[todo], eps, norm, derive(seed, name), **entry.fixed, **options)
        with torch.no_grad():
            todo = todo[~success(model(x_adv[todo]), y[todo])]
    return x_adv


def autoattack(
    model: Model,
    x: Images,
    y: Labels,
    eps: float,
    norm: str = "Linf",
    seed: int = 0,
    *,
    steps: int = 100,
    targets: int = 9,
    queries: int = 5000,
) -> Images:
    """Returns the points of AutoAttack's standard version (Croce and Hein 2020): four attacks, one restart each."""
    some = {"steps": steps, "targets": targets}
    parts = ("apgd-ce", {"steps": steps}), ("apgd-t", some), ("fab-t", some), ("square", {"queries": queries})
    return relay(model, x, y, eps, norm, seed, parts=parts)


def autoattack_rand(
    model: Model,
    x: Images,
    y: Labels,
    eps: float,
    norm: str = "Linf",
    seed: int = 0,
    *,
    steps: int = 100,
    eot: int = 20,
) -> Images:
    """Returns the points of AutoAttack's version for stochastic models: APGD-CE, then APGD-DLR, gradients averaged."""
    some = {"steps": steps, "eot": eot}
    return relay(model, x, y, eps, norm, seed, parts=(("apgd-ce", some), ("apgd-dlr", some)))


@dataclass(frozen=True)
class Entry:
    """An attack: its function, its norms (the first is the default), fixed options, whether it needs eps, and whether
    its one pass finds the images that are misclassified already, so that no pass is spent on them before."""

    run: Callable[..., Images]
    norms: tuple[str, ...]
    fixed: dict[str, Any] = field(default_factory=dict)
    needs_eps: bool = True
    one_pass: bool = False


BALLS = ("Linf", "L2")
REGISTRY = {
    "fgsm": Entry(fgsm, ("Linf",), one_pass=True),
    "pgd": Entry(pgd, BALLS),
    "eotpgd": Entry(partial(pgd, eot=10), BALLS),
    "apgd-ce": Entry(apgd, BALLS, {"loss": "ce"}),
    "apgd-dlr": Entry(apgd, BALLS, {"loss": "dlr"}),
    "apgd-t": Entry(apgd_targeted, BALLS),
    "fab-t": Entry(fab_t, BALLS),
    "square": Entry(square, BALLS),
    "autoattack": Entry(autoattack, BALLS),
    "autoattack-rand": Entry(autoattack_rand, BALLS),
    "noise": Entry(random_noise, BALLS),
    "transfer": Entry(transfer, BALLS),
    "cw": Entry(carlini_wagner, ("L2",), needs_eps=False),
    "deepfool": Entry(deepfool, ("L2",), needs_eps=False),
    "jsma-f": Entry(jsma, ("L0",), {"softmax": True}, needs_eps=False),
    "jsma-z": Entry(jsma, ("L0",), {"softmax": False}, needs_eps=False),
}


def options_of(name: str) -> dict[str, Any]:
    """Returns the options of an attack with their defaults; ValueError for an unknown attack."""
    if name not in REGISTRY:
        raise ValueError(f"unknown attack {name!r}: choose one of {', '.join(sorted(REGISTRY))}")
    parameters = inspect.signature(REGISTRY[name].run).parameters.values()
    free = (p for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in REGISTRY[name].fixed)
    return {p.name: p.default for p in free}


def check_answers(z: Tensor, n: int) -> None:
    """Raises ValueError if the answers to `n` images are NaN, of a wrong shape or probabilities."""
    if z.ndim != 2 or len(z) != n or z.shape[1] < 2:
        raise ValueError(f"the model answers {tuple(z.shape)} for {n} images: logits (n, classes >= 2) are due")
    if z.isnan().any():
        raise ValueError(f"the model answers NaN for {int(z.isnan().any(1).sum())} of {n} images")
    if (z >= 0).all() and torch.allclose(z.sum(1), torch.ones_like(z[:, 0]), atol=1e-3, rtol=0):
        raise ValueError("the model answers probabilities (rows >= 0 with sum 1): give the logits before the softmax")


@torch.no_grad()
def answers(model: Callable[[Tensor], Tensor], x: Tensor, batch_size: int) -> Tensor:
    """Returns the logits of `x`, batch by batch; ValueError if they are none (see `check_answers`)."""
    z = torch.cat([model(part) for part in x.split(batch_size)])
    check_answers(z, len(x))
    return z


def check_labels(name: str, y: Tensor, x: Tensor, classes: int | None = None) -> None:
    """Raises ValueError unless `y` holds one class number per image, below `classes` where given."""
    if y.dtype != torch.int64 or y.shape != x.shape[:1] or y.device != x.device:
        due = f"int64 of shape ({len(x)},) on {x.device}"
        raise ValueError(f"{name} is {y.dtype} of shape {tuple(y.shape)} on {y.device}: {due} is due")
    if classes is not None and not (int(y.min()) >= 0 and int(y.max()) < classes):
        raise ValueError(f"{name} lies in {int(y.min())}..{int(y.max())}: the model has the classes 0..{classes - 1}")


def check_call(name: str, eps: float | None, norm: str | None, batch_size: int, mode: str, options: dict) -> str:
    """Returns the norm after checking a call's settings; ValueError, or TypeError for unknown options."""
    valid = options_of(name)
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


def distance(x_adv: Images, x: Images, norm: str) -> Tensor:
    """Returns each image's distance: the number of changed values (L0), Euclidean (L2) or largest (Linf)."""
    order = {"L0": 0, "L2": 2, "Linf": torch.inf}[norm]
    return torch.linalg.vector_norm((x_adv - x).flatten(1), order, dim=1)


def check_result(x_adv: Images, x: Images, eps: float | None, norm: str) -> None:
    """Raises RuntimeError if images are not finite, outside [0, 1] or, but for rounding, outside the ball."""
    if not (x_adv.isfinite().all() and x_adv.min() >= 0 and x_adv.max() <= 1):
        raise RuntimeError("the attack left [0, 1]: this is a bug in lib")
    if eps is not None and not (distance(x_adv, x, norm) <= eps * (1 + 1e-5) + 1e-6).all():
        raise RuntimeError(f"the attack left the {norm} ball of {eps}: this is a bug in lib")


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
    `mode`: "eval", or "keep" for the model's own train/eval flags; `options`: see `options_of(name)`.

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
    with undisturbed(model, seed, x.device, mode):
        z = answers(model, x[:1] if entry.one_pass else x, batch_size)
        check_labels("y", y, x, z.shape[1])
        if target is not None:
            check_labels("target", target, x, z.shape[1])
        todo = torch.arange(len(x), device=x.device)
        if not entry.one_pass:
            todo = todo[~success(z, y, target, options.get("kappa", 0.0))]
        x_adv = x.clone()
        with tqdm(total=len(todo), desc=name, unit="image", leave=False, disable=not progress) as bar:
            for rows in todo.split(batch_size) if len(todo) else ():
                some = options if target is None else options | {"target": target[rows]}
                found = entry.run(model, x[rows], y[rows], eps, norm, seed, **entry.fixed, **some).detach()
                x_adv[rows] = found if eps is None or norm == "L0" else project(found, x[rows], eps, norm)
                bar.update(len(rows))
    check_result(x_adv, x, eps, norm)
    return x_adv
