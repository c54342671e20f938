"""The test images of a seed, and which of them each defence classifies correctly: the `outcomes` of a record.

Images are drawn anew for each seed, so that an interval over seeds covers the choice of images too.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from lib.data import Data, Split
from lib.evaluation.outcomes import unpack_bits
from lib.models import most_likely
from lib.utils.draws import NO_ATTACK, pack_draws
from lib.utils.seeds import seeded_generator

WORST = "worst"  # the condition of the worst case per image over a set of attacks


def evaluation_images(data: Data, count: int, seed: int) -> tuple[Split, list[int]]:
    """Return `count` test images, drawn once for a seed, and their numbers in the test split.

    All defences and attacks of the seed get these; fewer are the first of more.
    """
    rows = torch.randperm(len(data.test.y), generator=seeded_generator(seed, "points"))[:count]
    return Split(data.test.x[rows], data.test.y[rows]), rows.tolist()


def ball_condition(condition: str, eps: float) -> str:
    """Return the name of a condition in the ball of radius `eps`, such as fgsm@0.1."""
    return f"{condition}@{eps:g}"


def answer_outcome(z: Float[Tensor, "n k"], y: Int[Tensor, " n"]) -> dict[str, Any]:
    """Return which images deterministic logits classify correctly, as a record holds it; those not finite are wrong."""
    return pack_draws((most_likely(z) == y).cpu().numpy()[None])


def attack_outcomes(record: Mapping[str, Any], eps: float | None = None) -> dict[str, dict[str, Any]]:
    """Return which images one deterministic model classifies correctly under each attack.

    Args:
        record: of `lib.evaluation.robust_accuracy.robust_accuracy`.
        eps: a radius that the names of the conditions get, None for none.

    Returns:
        Condition → what `pack_draws` returns.
    """
    examples = record["examples"]
    right = unpack_bits(examples["correct_clean"])
    under = {label: right & ~unpack_bits(bits) for label, bits in examples["broken_by"].items()}
    under[WORST] = np.all([right, *under.values()], axis=0)
    under = under if eps is None else {ball_condition(name, eps): bits for name, bits in under.items()}
    return {name: pack_draws(bits[None]) for name, bits in ({NO_ATTACK: right} | under).items()}


def take_outcomes(results: Mapping[str, dict], small: str = "") -> dict[str, dict[str, dict[str, Any]]]:
    """Remove the `outcomes` from results by defence and return them, defence → condition → packed answers.

    `small`: the name of another set of attacks, which the conditions other than `clean` get: it is that of the worst
    case over this set, and each attack's begins with it.
    """
    out = {name: result.pop("outcomes") for name, result in results.items()}
    if not small:
        return out
    names = {NO_ATTACK: NO_ATTACK, WORST: small}
    return {
        name: {names.get(label, f"{small}/{label}"): bits for label, bits in each.items()} for name, each in out.items()
    }


def record_outcomes(numbers: Sequence[int], correct: Mapping[str, Mapping[str, Any]], **more: Any) -> dict[str, Any]:
    """Return the `outcomes` of a record: numbers of the test images, and defence → condition → packed answers.

    Raises ValueError, which names defence and condition, for answers to another number of images.
    """
    for defence, conditions in correct.items():
        for condition, packed in conditions.items():
            if packed["n"] != len(numbers):
                where = f"{defence} under {condition}"
                raise ValueError(
                    f"outcomes of {where}: expected {len(numbers)} images, got {packed['n']}: evaluate all"
                )
    return {"images": list(numbers), "correct": {name: dict(each) for name, each in correct.items()}, **more}
