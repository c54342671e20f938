"""Outcomes per image and draw: repeated predictions, accuracy, worst of N, majority, and their compact text form."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lib.attacks.eot_pgd import batch_sizes
from lib.models import predict_classes
from lib.utils.intervals import wilson


def repeated_predictions(
    model: Callable, x: Float[Tensor, "n c h w"], draws: int, at_once: int = 1
) -> Int[Tensor, "draws n"]:
    """Returns the classes predicted in `draws` passes, `at_once` of them in one batch if noise is each image's own."""
    parts = [x.repeat(k, 1, 1, 1) for k in batch_sizes(draws, at_once)]
    return torch.cat([predict_classes(model, part, len(part)) for part in parts]).view(draws, len(x))


def outcomes(votes: np.ndarray, y: np.ndarray) -> dict[str, np.ndarray]:
    """Returns per example, from votes (draws n), the share of right ones, whether all are right and whether they win.

    The label wins when it has more votes than any other class: a tie is lost.
    """
    right = votes == y
    most = np.max([0 * y, *(((votes == k) & ~right).sum(0) for k in np.unique(votes))], axis=0)
    return {"accuracy": right.mean(0), "worst_of_n": right.all(0) * 1.0, "majority": (right.sum(0) > most) * 1.0}


def outcome_shares(verdict: dict[str, np.ndarray], draws: int) -> dict[str, Any]:
    """Returns the mean over examples and its Wilson interval for each verdict (all are the same for one draw)."""
    out: dict[str, Any] = {}
    for name in verdict if draws > 1 else ("accuracy",):
        total, n = float(verdict[name].sum()), len(verdict[name])
        out |= {name: total / n, f"{name}_interval": list(wilson(round(total), n))}
    return out


def pack_bits(flags: np.ndarray) -> str:
    """Returns booleans as a string of 0 and 1, one per example."""
    return "".join("01"[int(flag)] for flag in flags)


def unpack_bits(text: str) -> Bool[np.ndarray, " n"]:
    """Returns the booleans of a string that `pack_bits` wrote."""
    return np.array([c == "1" for c in text], dtype=bool)
