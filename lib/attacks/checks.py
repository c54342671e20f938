"""Checks of what goes into an attack and of what comes out of it."""

from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from lib.attacks.common import Images, Model
from lib.models import check_answer


def check_model_output(z: Any, n: int) -> None:
    """Check that a model's output for images that nobody attacked consists of logits.

    Args:
        z: the output.
        n: number of images.

    Raises:
        ValueError: for a wrong type or shape, NaN, infinity and probabilities.
    """
    check_answer(z, n)
    if not (finite := z.isfinite().all(1)).all():
        what = "NaN" if z.isnan().any() else "infinity"
        bad = int((~finite).sum())
        raise ValueError(f"expected logits from the model, got {what} for {bad} of {n} images: check its weights")
    if (z >= 0).all() and torch.allclose(z.sum(1), torch.ones_like(z[:, 0]), atol=1e-3, rtol=0):
        raise ValueError("expected logits from the model, got probabilities (rows >= 0 with sum 1): remove its softmax")


@torch.no_grad()
def checked_logits(model: Model, x: Tensor, batch_size: int) -> Tensor:
    """Compute the logits of images, batch by batch, and check them (`check_model_output`).

    Args:
        model: maps images to logits (n, k).
        x: images (n, c, h, w).
        batch_size: images in a batch.

    Returns:
        Logits (n, k), without a graph.

    Raises:
        ValueError: for a wrong type or shape, NaN, infinity and probabilities.
    """
    parts: list[Tensor] = []
    for images in x.split(batch_size):
        z = model(images)
        check_answer(z, len(images), parts[0].shape[1] if parts else None)
        parts.append(z)
    z = torch.cat(parts)
    check_model_output(z, len(x))
    return z


def check_labels(name: str, y: Any, x: Tensor, classes: int | None = None) -> None:
    """Check that a tensor holds one class number per image.

    Args:
        name: what messages call it.
        y: labels, expected as int64 (n,) on the device of the images.
        x: images (n, c, h, w).
        classes: number of classes; not checked when None.

    Raises:
        ValueError: for another dtype, shape, device or range.
    """
    if not isinstance(y, Tensor):
        shown = f"{' '.join(str(y).split())[:40]} ({type(y).__name__})"
        raise ValueError(
            f"expected {name} to be a tensor with one class for each image, got {shown}: torch.tensor(...)"
        )
    if y.dtype != torch.int64 or y.shape != x.shape[:1] or y.device != x.device:
        expected, got = (
            f"int64 of shape ({len(x)},) on {x.device}",
            f"{y.dtype} of shape {tuple(y.shape)} on {y.device}",
        )
        raise ValueError(f"expected {name} to be {expected}, got {got}")
    if classes is not None and not (int(y.min()) >= 0 and int(y.max()) < classes):
        raise ValueError(
            f"expected {name} in 0..{classes - 1}, the model's classes, got {int(y.min())}..{int(y.max())}"
        )


def perturbation_norm(x_adv: Images, x: Images, norm: str) -> Tensor:
    """Measure the perturbation of each image.

    Args:
        x_adv: perturbed images (n, c, h, w).
        x: images of the same shape.
        norm: "L0" (number of changed values), "L2" (Euclidean length) or "Linf" (largest change).

    Returns:
        Norms (n,), in pixel units.
    """
    order = {"L0": 0, "L2": 2, "Linf": torch.inf}[norm]
    dtype = torch.promote_types(x.dtype, torch.float32)  # half precision would round the norm itself
    return torch.linalg.vector_norm((x_adv.to(dtype) - x.to(dtype)).flatten(1), order, dim=1)


def outside_ball(x_adv: Images, x: Images, eps: float | None, norm: str) -> Bool[Tensor, " n"]:
    """Say which images lie outside a ball by more than rounding: the one tolerance of this library.

    Args:
        x_adv: images (n, c, h, w).
        x: centres of the balls, of the same shape.
        eps: radius, in pixel units; None for no ball.
        norm: "L0", "L2" or "Linf".

    Returns:
        True where the distance is above eps (1 + 1e-5) + 1e-6, or no number (n,).
    """
    return ~(perturbation_norm(x_adv, x, norm) <= (torch.inf if eps is None else eps * (1 + 1e-5) + 1e-6))


def check_result(x_adv: Images, x: Images, eps: float | None, norm: str) -> None:
    """Check that adversarial images lie in [0, 1] and, but for rounding, in the ball.

    Args:
        x_adv: adversarial images (n, c, h, w).
        x: images of the same shape.
        eps: radius of the ball; not checked when None.
        norm: "L0", "L2" or "Linf".

    Raises:
        RuntimeError: if they do not: a bug of an attack.
    """
    if not (x_adv.isfinite().all() and x_adv.min() >= 0 and x_adv.max() <= 1):
        raise RuntimeError("expected images in [0, 1], got others from the attack: this is a bug in lib")
    if outside_ball(x_adv, x, eps, norm).any():
        raise RuntimeError(f"expected images in the {norm} ball of {eps}, got others: this is a bug in lib")
