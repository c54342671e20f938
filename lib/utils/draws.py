"""Answers of a defence per image and draw, right or wrong: as compact text in a record, and the measures made of them.

From these bits anybody can redo the statistics. Worst of N is estimated from more than N draws without bias: of M
draws, r of them right, C(r, N) / C(M, N) is the share of choices of N draws that are all right.
"""

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np
import scipy  # its parts are imported on first use
from jaxtyping import Bool, Float, Int

NO_ATTACK, MATCHED = "clean", "matched"  # conditions: no attack; the worst image of a set of attacks
OUTSIDE = "outside"  # condition: a smooth attack outside the ball, in no worst case
TRANSFERRED = "from "  # before a defence: the condition of the images that were made for it
N_DRAWS = 10  # of worst-of-N accuracy and of the majority
DRAW_MEASURES = ("accuracy", "worst_of_10", "majority_of_10")


def pack_draws(correct: Bool[np.ndarray, "draws n"]) -> dict[str, Any]:
    """Return answers as a record holds them.

    Args:
        correct: whether the answer to each image is right, one row per draw.

    Returns:
        `draws`, `n` and `correct`, the bits row by row in base64.
    """
    bits = base64.b64encode(np.packbits(correct.reshape(-1)).tobytes()).decode("ascii")
    return {"draws": int(correct.shape[0]), "n": int(correct.shape[1]), "correct": bits}


def unpack_draws(packed: Mapping[str, Any]) -> Bool[np.ndarray, "draws n"]:
    """Return the answers that `pack_draws` packed; ValueError unless there are as many as it says."""
    draws, n = packed["draws"], packed["n"]
    raw = np.frombuffer(base64.b64decode(packed["correct"]), dtype=np.uint8)
    if len(raw) != -(-draws * n // 8):
        raise ValueError(f"expected {draws} draws of {n} images, {-(-draws * n // 8)} bytes, got {len(raw)}")
    return np.unpackbits(raw, count=draws * n).reshape(draws, n).astype(bool)


def all_of_n(right: Int[np.ndarray, " n"], draws: int, n_draws: int = N_DRAWS) -> Float[np.ndarray, " n"]:
    """Return for each image the probability that `n_draws` of its draws, chosen at random, are all right.

    Args:
        right: how many of an image's draws are right.
        draws: how many draws it has, at least `n_draws`, or 1 for a deterministic defence, whose draws are all alike.
        n_draws: draws chosen.

    Returns:
        C(right, n_draws) / C(draws, n_draws), which has no bias.
    """
    if draws == 1:
        return right.astype(float)
    if draws < n_draws:
        raise ValueError(f"expected at least {n_draws} draws, or 1 for a deterministic defence, got {draws}")
    return scipy.special.comb(right, n_draws) / scipy.special.comb(draws, n_draws)


def image_measures(correct: Bool[np.ndarray, "draws n"]) -> dict[str, Float[np.ndarray, " n"]]:
    """Return the measures of each image.

    Args:
        correct: at least `N_DRAWS` draws, or one of a deterministic defence.

    Returns:
        `accuracy`, the share of right draws; `worst_of_10` and `majority_of_10`, the probabilities that ten draws are
        all right and that more than half of ten are.
    """
    draws, right = len(correct), correct.sum(0)
    out = {"accuracy": correct.mean(0), "worst_of_10": all_of_n(right, draws)}
    majority = scipy.stats.hypergeom.sf(N_DRAWS // 2, draws, right, N_DRAWS) if draws > 1 else right.astype(float)
    return out | {"majority_of_10": np.asarray(majority, dtype=float)}
