"""The low-frequency attack: its perturbations are smooth and bounded, and worse than others as smooth and as large."""

import pytest
import torch
from scipy.fft import dctn

from lib.attacks.gate import NoGradientWarning
from lib.attacks.low_frequency import dct_basis, low_frequency_attack, low_pass, scaled_to

EPS = 0.3


def high_energy(delta):
    """Returns the largest coefficient outside the lower half of the frequencies along each axis, by SciPy's DCT."""
    coefficients = dctn(delta.double().numpy(), axes=(2, 3), norm="ortho")
    h, w = delta.shape[2:]
    coefficients[:, :, : (h + 1) // 2, : (w + 1) // 2] = 0
    return abs(coefficients).max()


def right(model, x, y):
    return (model(x).argmax(1) == y).float().mean().item()


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (1, 1, 7, 4), (2, 1, 1, 6)])
def test_low_pass_is_the_projection_onto_the_lower_half_of_the_frequencies(shape):
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0)).double()
    low = low_pass(images)
    assert high_energy(low) < 1e-12 and high_energy(images) > 0.1
    torch.testing.assert_close(low_pass(low), low)
    h, w = ((n + 1) // 2 for n in shape[2:])
    low_part = (dctn(v.numpy(), axes=(2, 3), norm="ortho")[:, :, :h, :w] for v in (images, low))
    torch.testing.assert_close(*(torch.from_numpy(v) for v in low_part))
    torch.testing.assert_close(dct_basis(8, 8) @ dct_basis(8, 8).T, torch.eye(8).double())


@pytest.mark.parametrize("eps", [0.1, EPS])
def test_it_stays_in_the_range_within_the_radius_and_among_low_frequencies_but_for_the_clamp(cnn, points, eps):
    x, y = points
    x_adv = low_frequency_attack(cnn, x, y, eps)
    assert x_adv.min() >= 0 and x_adv.max() <= 1 and (x_adv - x).abs().max() <= eps + 1e-6
    grey = 0.35 + 0.3 * x  # which no perturbation takes out of [0, 1]
    delta = low_frequency_attack(cnn, grey, y, eps) - grey
    assert high_energy(delta) < 1e-5
    assert delta.abs().amax((1, 2, 3)).min() > 0.9 * eps and delta.abs().max() <= eps + 1e-6
    assert delta.abs().mean() > 0.5 * eps  # no pixel holds back the others


@pytest.mark.parametrize("loss", ["ce", "margin"])
def test_it_is_far_stronger_than_random_perturbations_as_smooth_and_as_large(cnn, digits, loss):
    x, y = (t[1297:1397] for t in digits)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    chance = (x + scaled_to(low_pass(noise), EPS)).clamp(0, 1)
    assert right(cnn, low_frequency_attack(cnn, x, y, EPS, loss=loss, draws=1), y) < right(cnn, chance, y) - 0.5


def test_more_draws_find_what_one_draw_misses(cnn, digits):
    x, y = (t[1297:1337] for t in digits)
    sizes = []

    def noisy(images):
        sizes.append(len(images))
        return cnn(images + 0.6 * torch.randn(images.shape))

    left = {}
    for draws in (1, 16):
        torch.manual_seed(0)
        x_adv = low_frequency_attack(noisy, x, y, EPS, steps=6, draws=draws, at_once=8)
        left[draws] = right(noisy, x_adv.repeat(200, 1, 1, 1), y.repeat(200))
    assert left[16] < left[1] - 0.03
    assert sizes.count(320) == 12 and sizes.count(40) == 6


def test_an_image_has_the_same_perturbation_in_any_batch_and_seeds_differ(cnn, points):
    x, y = points
    whole = low_frequency_attack(cnn, x, y, EPS, 3)
    torch.testing.assert_close(low_frequency_attack(cnn, x[4:6], y[4:6], EPS, 3), whole[4:6], rtol=0, atol=1e-3)
    assert not torch.equal(low_frequency_attack(cnn, x, y, EPS, 4), whole)


def test_without_a_gradient_it_says_so(cnn, points):
    with pytest.warns(NoGradientWarning, match="low_frequency_attack got no gradient"):
        low_frequency_attack(torch.no_grad()(cnn.__call__), *points, EPS)
