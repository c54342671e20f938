"""PGD on the expected loss: the average that it climbs, where it ends, and that it goes on after a lucky success."""

import math

import pytest
import torch

from lib.attacks.common import margin
from lib.attacks.eot_pgd import batch_sizes, eot_pgd, expected_loss
from lib.attacks.pgd import pgd
from lib.data import load_dataset

EPS = 0.15


@pytest.fixture
def points(cnn):
    data = load_dataset("digits").test
    right = cnn(data.x[:60]).argmax(1) == data.y[:60]
    return data.x[:60][right][:40], data.y[:60][right][:40]


@pytest.mark.parametrize("at_once", [1, 3, 7, 64])
def test_draws_made_at_once_are_as_independent_as_one_by_one(at_once):
    """Two logits (w x, 0) with w uniform in [0, 2] for each image and draw; the gradient's variance says how many."""
    rng, sizes, slopes = torch.Generator().manual_seed(0), [], []

    def noisy(x):
        sizes.append(len(x))
        w = 2 * torch.rand(x.shape, generator=rng)
        slopes.append(w.flatten())
        return torch.cat([w * x, 0 * x], 1).flatten(1)

    x, y = torch.full((500, 1, 1, 1), 1e-3), torch.zeros(500, dtype=torch.int64)
    value, grad = expected_loss(noisy, x, y, 7, at_once)
    assert sum(sizes) == 7 * 500 and max(sizes) == 500 * min(7, at_once)
    mean = torch.cat(slopes).unflatten(0, (7, 500)).mean(0)
    torch.testing.assert_close(grad.flatten(), -mean / 2, rtol=2e-3, atol=0)  # d/dx log(1 + exp(-w x)) at 0 is -w / 2
    torch.testing.assert_close(value, torch.full((500,), math.log(2)), rtol=0, atol=1e-2)
    assert grad.std().item() == pytest.approx(math.sqrt(1 / 3 / 7) / 2, rel=0.1)
    with pytest.raises(ValueError, match=r"expected at_once >= 1 .* got 0"):
        batch_sizes(7, 0)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("draws", [1, 3])
def test_without_noise_it_is_pgd_that_never_stops(cnn, points, norm, draws):
    x, y = points
    eps = EPS if norm == "Linf" else 1.0
    x_adv = eot_pgd(cnn, x, y, eps, norm, 3, steps=6, alpha=eps / 4, restarts=2, draws=draws, at_once=2)
    expected = pgd(cnn, x, y, eps, norm, 3, steps=6, alpha=eps / 4, restarts=2, kappa=1e6)
    torch.testing.assert_close(x_adv, expected, rtol=0, atol=1e-5)
    stopped = pgd(cnn, x, y, eps, norm, 3, steps=6, alpha=eps / 4, restarts=2)
    assert margin(cnn(x_adv), y).mean() < margin(cnn(stopped), y).mean() - 1  # barely wrong is right in the next draw


def test_more_draws_find_what_one_draw_misses(cnn, points):
    """Noise as large as the ball hides the gradient from one pass."""
    x, y = points

    def noisy(images):
        return cnn(images + 0.5 * torch.randn(images.shape))

    left = {}
    for draws in (1, 16):
        torch.manual_seed(0)
        x_adv = eot_pgd(noisy, x, y, EPS, steps=15, alpha=EPS / 4, draws=draws, at_once=16)
        assert x_adv.min() >= 0 and x_adv.max() <= 1 and (x_adv - x).abs().max() <= EPS + 1e-6
        left[draws] = expected_loss(noisy, x_adv, y, 200, 50)[0].mean().item()
    assert left[16] > left[1] + 0.2


def test_a_loss_without_gradient_is_the_same_loss(cnn, points):
    (value, grad), (again, none) = (expected_loss(cnn, *points, 2, 2, gradient=flag) for flag in (True, False))
    assert torch.equal(value, again) and grad.abs().amax() > 0 and not none.any()
