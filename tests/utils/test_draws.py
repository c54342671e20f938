"""Bits per image and draw: packed without loss, and measures that equal the definition by enumeration."""

from itertools import combinations

import numpy as np
import pytest

from lib.utils.draws import all_of_n, image_measures, pack_draws, unpack_draws
from lib.utils.files import dump_canonical


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (3, 8), (12, 33)])
def test_packed_draws_come_back(shape):
    correct = np.random.default_rng(0).random(shape) < 0.6
    packed = pack_draws(correct)
    assert np.array_equal(unpack_draws(packed), correct) and dump_canonical(packed)
    assert len(packed["correct"]) <= 4 * (shape[0] * shape[1] // 24 + 1)


def test_bits_that_were_cut_are_refused():
    packed = pack_draws(np.ones((4, 6), dtype=bool))
    with pytest.raises(ValueError, match="expected 5 draws of 6 images, 4 bytes, got 3"):
        unpack_draws(packed | {"draws": 5})


def test_measures_of_ten_equal_all_choices_of_ten_draws():
    correct = np.random.default_rng(1).random((13, 20)) < np.linspace(0.2, 1, 20)
    chosen = [correct[list(rows)] for rows in combinations(range(13), 10)]
    measures = image_measures(correct)
    assert np.allclose(measures["worst_of_10"], np.mean([c.all(0) for c in chosen], axis=0))
    assert np.allclose(measures["majority_of_10"], np.mean([c.sum(0) > 5 for c in chosen], axis=0))
    assert np.array_equal(measures["accuracy"], correct.mean(0))


def test_a_deterministic_defence_has_one_answer():
    correct = np.array([[True, False, True]])
    assert all(values.tolist() == [1, 0, 1] for values in image_measures(correct).values())


def test_too_few_draws_are_refused():
    with pytest.raises(ValueError, match="at least 10 draws, or 1 for a deterministic defence, got 9"):
        all_of_n(np.array([9]), 9)
