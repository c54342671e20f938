"""Annealed PGD: on a noisy loss whose maximum is known it ends there, and shrinking steps are why."""

import pytest
import torch

from lib.attacks.api import attack
from lib.attacks.eot_pgd import annealed_pgd, eot_pgd
from lib.utils.random_state import seeded_noise

TARGET = torch.tensor([0.62, 0.35, 0.5, 0.44]).view(1, 1, 2, 2)


class NoisyDistance(torch.nn.Module):
    """Logits (−d, 0) with d = ‖x + n − target‖²: the margin loss of class 1 is greatest at the target, E over n."""

    independent_noise, evaluations = True, 1

    def __init__(self, sigma):
        super().__init__()
        self.sigma = sigma

    def forward(self, x):
        far = (x + self.sigma * torch.randn_like(x) - TARGET).square().flatten(1).sum(1)
        return torch.stack([-far, torch.zeros_like(far)], 1)


def climb(attack, sigma, **options):
    x, y = torch.full((64, 1, 2, 2), 0.5), torch.ones(64, dtype=torch.int64)
    model = NoisyDistance(sigma)
    with seeded_noise(model, 0, x.device):
        point = attack(model, x, y, 0.2, "Linf", 3, **options)
    assert (point - x).abs().max() <= 0.2 + 1e-6 and point.min() >= 0 and point.max() <= 1
    return (point - TARGET).square().mean().sqrt().item()


def test_steps_shrink_to_the_maximum_of_an_expected_loss():
    errors = [climb(annealed_pgd, 0.05, steps=steps, draws=1, loss="margin") for steps in (10, 30, 100)]
    assert errors[2] < 0.02 and errors[2] < 0.8 * errors[1] < errors[0]


def test_steps_of_one_size_stay_farther_away_with_as_many_gradients():
    for draws in (1, 4):
        assert climb(annealed_pgd, 0.1, steps=64 // draws, draws=draws) < 0.8 * climb(eot_pgd, 0.1, steps=16, draws=4)


def test_several_draws_in_a_batch_and_one_by_one_are_as_good():
    one, batch = (climb(annealed_pgd, 0.3, steps=32, draws=4, at_once=k, loss="margin") for k in (1, 4))
    assert abs(one - batch) < 0.01


def test_it_goes_on_from_the_given_images_within_the_ball():
    start = torch.full((64, 1, 2, 2), 0.95)  # outside: it is projected first
    near = TARGET.expand(64, 1, 2, 2)
    options = {"steps": 4, "draws": 4, "loss": "margin", "first": 0.1}
    assert climb(annealed_pgd, 0.01, start=near, **options) < 0.01
    assert climb(annealed_pgd, 0.01, start=start, **options) > 0.05


@pytest.mark.parametrize("loss", ["ce", "margin", "dlr"])
def test_on_a_deterministic_model_it_is_as_strong_as_pgd(cnn, digits, loss):
    x, y = (t[1297:1397] for t in digits)
    pgd = attack("pgd", cnn, x, y, 0.1, steps=64, progress=False)
    own = annealed_pgd(cnn, x, y, 0.1, steps=64, draws=1, loss=loss)
    left = [(cnn(images).argmax(1) == y).float().mean().item() for images in (own, pgd)]
    assert left[0] <= left[1] + 0.03
