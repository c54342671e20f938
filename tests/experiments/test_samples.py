"""Test images of a seed, and the outcomes of defences on them."""

import numpy as np
import pytest
import torch
from torch import nn

from lib.data import load_dataset
from lib.evaluation.robust_accuracy import robust_accuracy
from lib.experiments import samples
from lib.utils.draws import pack_draws, unpack_draws


class Threshold(nn.Module):
    """Two classes, told apart by whether the one pixel is above 0.5."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(10.0))

    def forward(self, x):
        z = self.scale * (x.flatten(1)[:, :1] - 0.5)
        return torch.cat([-z, z], 1)


def test_images_are_drawn_anew_for_each_seed_and_have_their_numbers():
    data = load_dataset("digits")
    few, numbers = samples.evaluation_images(data, 8, 3)
    _, more = samples.evaluation_images(data, 40, 3)
    assert numbers == more[:8] and len(set(more)) == 40
    assert torch.equal(few.x, data.test.x[numbers]) and torch.equal(few.y, data.test.y[numbers])
    assert set(samples.evaluation_images(data, 40, 4)[1]) != set(more) and numbers != list(range(8))


def test_a_deterministic_answer_that_is_not_finite_is_wrong():
    z = torch.tensor([[1.0, 0.0], [torch.nan, 0.0], [torch.inf, 0.0], [0.0, 1.0]])
    answers = unpack_draws(samples.answer_outcome(z, torch.zeros(4, dtype=torch.long)))
    assert answers.tolist() == [[True, False, False, False]]


def test_outcomes_of_attacks_are_those_worked_by_hand():
    x = torch.tensor([0.95, 0.6, 0.3, 0.45])[:, None, None, None]
    y = torch.tensor([1, 1, 1, 0])  # the third is wrong from the start, the second and fourth are near the threshold
    attacks = {"near": {"name": "fgsm"}, "far": {"name": "fgsm", "eps": 0.6}}
    record = robust_accuracy(Threshold(), attacks, x, y, eps=0.2, progress=False)
    answers = samples.attack_outcomes(record, 0.2)
    bits = {name: unpack_draws(packed).tolist() for name, packed in answers.items()}
    assert bits == {
        "clean": [[True, True, False, True]],
        "near@0.2": [[True, False, False, False]],
        "far@0.2": [[True, True, False, True]],  # its images leave the ball
        "worst@0.2": [[True, False, False, False]],
    }
    assert list(samples.attack_outcomes(record)) == ["clean", "near", "far", "worst"]
    assert record["robust"]["accuracy"] == np.mean(bits["worst@0.2"])


def test_a_small_set_of_attacks_has_names_of_its_own():
    one, two, three = ({"draws": k} for k in (1, 2, 3))
    results = {"a": {"robust": 1.0, "outcomes": {"clean": one, "apgd-t": two, "worst": three}}}
    assert samples.take_outcomes(results, "quick") == {"a": {"clean": one, "quick/apgd-t": two, "quick": three}}
    assert results == {"a": {"robust": 1.0}}


def test_answers_to_other_images_are_refused_by_name():
    bits = pack_draws(np.array([[True, False, True]]))
    assert samples.record_outcomes([7, 8, 9], {"a": {"clean": bits}}, labels=[1, 2, 3]) == {
        "images": [7, 8, 9],
        "correct": {"a": {"clean": bits}},
        "labels": [1, 2, 3],
    }
    with pytest.raises(ValueError, match="outcomes of a under clean: expected 2 images, got 3: evaluate all"):
        samples.record_outcomes([7, 8], {"a": {"clean": bits}})
