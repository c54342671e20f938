"""Measures per image from packed answers, by hand."""

import numpy as np
import pytest

from lib.report.answers import LOSSES, answer_values
from lib.utils.draws import DRAW_MEASURES, pack_draws

CLEAN = np.ones((20, 3), bool)
ATTACKED = np.stack([np.arange(20) < right for right in (20, 19, 4)], 1)  # of 20 draws of three images
ANSWERS = {"clean": pack_draws(CLEAN), "matched": pack_draws(ATTACKED)}


def test_measures_and_losses_per_image_are_those_worked_by_hand():
    expected = {
        "accuracy": [1, 0.95, 0.2],
        "worst_of_10": [1, 0.5, 0],  # the one wrong draw of 20 is among ten in half of all choices
        "majority_of_10": [1, 1, 0],
        "loss": [0, 0.05, 0.8],
        "worst_loss": [0, 0.5, 1],
    }
    assert set(expected) == {*DRAW_MEASURES, *LOSSES}
    for measure, values in expected.items():
        assert answer_values(ANSWERS, "matched", measure) == pytest.approx(np.array(values)), measure
        assert (answer_values(ANSWERS, "clean", measure) == (0 if measure in LOSSES else 1)).all()


def test_the_accuracy_alone_needs_no_ten_draws():
    few = {"clean": pack_draws(CLEAN[:2]), "fgsm": pack_draws(ATTACKED[3:5])}
    assert answer_values(few, "fgsm", "accuracy").tolist() == [1, 1, 0.5]
    assert answer_values(few, "fgsm", "loss").tolist() == [0, 0, 0.5]
    with pytest.raises(ValueError, match="at least 10 draws"):
        answer_values(few, "fgsm", "worst_of_10")


def test_what_is_not_there_is_named():
    for missing, condition, measure in (("queries", "queries", "accuracy"), ("median", "matched", "median")):
        with pytest.raises(KeyError, match=missing):
            answer_values(ANSWERS, condition, measure)
