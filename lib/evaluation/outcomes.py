"""Outcomes per image and draw: repeated predictions, accuracy, worst of N, majority, and their compact text form."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lib.attacks.eot_pgd import batch_sizes
from lib.models import NO_CLASS, predict_classes
from lib.utils.intervals import wilson

GRAPH_LIMIT = 10**6  # pixels times network evaluations in one graph: some GB
BATCH_LIMIT = 1024  # images at once without a graph


def passes_per_batch(model: Callable, images: Float[Tensor, "n c h w"], passes: int, *, graph: bool) -> int:
    """Return how many of some passes of the same images through a model are made as one batch.

    Draws may share a batch only where each image has noise of its own. That is what a model says of itself by the
    attribute `independent_noise`, and by `evaluations` how many network evaluations one image takes (1 without it).

    Args:
        model: classifier of images in [0, 1].
        images: the batch (n, c, h, w).
        passes: how often each image is to be passed.
        graph: whether the passes are differentiated, which takes memory for every evaluation.

    Returns:
        A number from 1 to `passes`, or 1.
    """
    if not getattr(model, "independent_noise", False):
        return 1
    evaluations = getattr(model, "evaluations", 1)
    room = GRAPH_LIMIT // (images.numel() * evaluations) if graph else BATCH_LIMIT // len(images)
    return max(1, min(passes, room))


@torch.no_grad()
def repeated_logits(
    model: Callable, x: Float[Tensor, "n c h w"], draws: int, at_once: int = 1
) -> Float[Tensor, "draws n k"]:
    """Pass images through a model several times, without a graph.

    Args:
        model: classifier of images in [0, 1], on the device of the images.
        x: images (n, c, h, w).
        draws: passes of each image.
        at_once: passes in one batch, more than 1 only where noise is each image's own (`passes_per_batch`).

    Returns:
        The logits (draws, n, k).
    """
    parts = [x.repeat(k, 1, 1, 1) for k in batch_sizes(draws, at_once)]
    return torch.cat([model(part) for part in parts]).unflatten(0, (draws, len(x)))


def repeated_predictions(
    model: Callable, x: Float[Tensor, "n c h w"], draws: int, at_once: int = 1
) -> Int[Tensor, "draws n"]:
    """Classify images several times.

    Args:
        model: classifier of images in [0, 1].
        x: images (n, c, h, w).
        draws: passes of each image.
        at_once: passes in one batch, see `repeated_logits`.

    Returns:
        The predicted classes (draws, n), `lib.models.NO_CLASS` for an answer that is not finite.
    """
    parts = [x.repeat(k, 1, 1, 1) for k in batch_sizes(draws, at_once)]
    return torch.cat([predict_classes(model, part, len(part)) for part in parts]).view(draws, len(x))


def outcomes(votes: np.ndarray, y: np.ndarray) -> dict[str, np.ndarray]:
    """Return per example the share of correct predictions, whether all are correct, and whether they are the majority.

    Args:
        votes: predicted classes (draws, n).
        y: labels (n,).

    Returns:
        `accuracy`, `worst_of_n` and `majority`, each (n,). The label has the majority when it has more votes than any
        other class; a tie is lost.
    """
    correct = votes == y
    most = np.max([0 * y, *(((votes == k) & ~correct).sum(0) for k in np.unique(votes))], axis=0)
    return {"accuracy": correct.mean(0), "worst_of_n": correct.all(0) * 1.0, "majority": (correct.sum(0) > most) * 1.0}


def outcome_shares(outcome: dict[str, np.ndarray], draws: int) -> dict[str, Any]:
    """Return the mean over examples and its Wilson interval for each measure (all are the same for one draw)."""
    out: dict[str, Any] = {}
    for name in outcome if draws > 1 else ("accuracy",):
        total, n = float(outcome[name].sum()), len(outcome[name])
        out |= {name: total / n, f"{name}_interval": list(wilson(round(total), n))}
    return out


def count_not_finite(votes: np.ndarray) -> int:
    """Return for how many examples some prediction (draws, n) rests on an answer that is not finite."""
    return int((votes == NO_CLASS).any(0).sum())


def pack_bits(flags: np.ndarray) -> str:
    """Return booleans as a string of 0 and 1, one per example."""
    return "".join("01"[int(flag)] for flag in flags)


def unpack_bits(text: str) -> Bool[np.ndarray, " n"]:
    """Return the booleans of a string that `pack_bits` wrote."""
    return np.array([c == "1" for c in text], dtype=bool)
