"""Checks of what goes into an attack and of what comes out of it."""

from collections.abc import Callable

import torch
from torch import Tensor

from lib.attacks.common import Images


def check_answers(z: Tensor, n: int) -> None:
    """Raises ValueError if the answers to `n` images are NaN, of a wrong shape or probabilities."""
    if z.ndim != 2 or len(z) != n or z.shape[1] < 2:
        raise ValueError(f"the model answers {tuple(z.shape)} for {n} images: logits (n, classes >= 2) are due")
    if z.isnan().any():
        raise ValueError(f"the model answers NaN for {int(z.isnan().any(1).sum())} of {n} images")
    if (z >= 0).all() and torch.allclose(z.sum(1), torch.ones_like(z[:, 0]), atol=1e-3, rtol=0):
        raise ValueError("the model answers probabilities (rows >= 0 with sum 1): give the logits before the softmax")


@torch.no_grad()
def checked_logits(model: Callable[[Tensor], Tensor], x: Tensor, batch_size: int) -> Tensor:
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


def perturbation_norm(x_adv: Images, x: Images, norm: str) -> Tensor:
    """Returns each image's distance: the number of changed values (L0), Euclidean (L2) or largest (Linf)."""
    order = {"L0": 0, "L2": 2, "Linf": torch.inf}[norm]
    return torch.linalg.vector_norm((x_adv - x).flatten(1), order, dim=1)


def check_result(x_adv: Images, x: Images, eps: float | None, norm: str) -> None:
    """Raises RuntimeError if images are not finite, outside [0, 1] or, but for rounding, outside the ball."""
    if not (x_adv.isfinite().all() and x_adv.min() >= 0 and x_adv.max() <= 1):
        raise RuntimeError("the attack left [0, 1]: this is a bug in lib")
    if eps is not None and not (perturbation_norm(x_adv, x, norm) <= eps * (1 + 1e-5) + 1e-6).all():
        raise RuntimeError(f"the attack left the {norm} ball of {eps}: this is a bug in lib")
