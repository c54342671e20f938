"""What figures, sentences and claims read of a record's answers: a measure of one defence per image."""

from collections.abc import Mapping
from typing import Any

from jaxtyping import Float
from numpy import ndarray

from lib.utils.draws import NO_ATTACK, image_measures, unpack_draws

LOSSES = {"loss": "accuracy", "worst_loss": "worst_of_10"}  # of which measure, clean minus under the threat


def answer_values(answers: Mapping[str, Any], condition: str, measure: str) -> Float[ndarray, " n"]:
    """Return a measure of a defence per image.

    Args:
        answers: of the defence, condition → packed answers, as in the `outcomes` of a record.
        condition: an attack's label, such as "matched", or "clean".
        measure: one of `lib.utils.draws.DRAW_MEASURES`, or of `LOSSES`: what the attack takes away of one.

    Returns:
        Probabilities in [0, 1], or differences of them (n,), in the order of the answers.

    Raises:
        KeyError: for a condition or measure that is not there.
        ValueError: for a measure other than the accuracy of fewer than ten draws, more than one.
    """
    if measure in LOSSES:
        part = LOSSES[measure]
        return answer_values(answers, NO_ATTACK, part) - answer_values(answers, condition, part)
    correct = unpack_draws(answers[condition])
    return correct.mean(0) if measure == "accuracy" else image_measures(correct)[measure]  # others need ten draws
