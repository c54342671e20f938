"""Randomised smoothing against closed forms and an independent bound."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from scipy.stats import binom, norm
from torch import nn

from lib.diffusion.network import load_network, save_network
from lib.diffusion.schedule import add_noise, alpha_sigma, sigma_to_t, to_pixel_range
from lib.distillation import few_step
from lib.evaluation.certify import (
    ABSTAIN,
    CertificateWarning,
    certified_accuracy,
    certify,
    lower_bound,
    one_step_denoiser,
)
from lib.utils.random_state import randn_like
from lib.utils.seeds import seeded_generator


def undone(sigma):
    """The sampler that only takes off the scale: the image with its noise."""
    alpha = alpha_sigma(sigma_to_t(2 * sigma))[0]
    return lambda z, randn_like: to_pixel_range(z / alpha)


class Half(nn.Module):
    """Answers class 1 where the mean of all pixels is above `at`: its smoothed answer and radius are known."""

    def __init__(self, at):
        super().__init__()
        self.at = at

    def forward(self, x):
        above = x.flatten(1).mean(1) - self.at
        return torch.stack([-above, above], 1)


def test_the_bound_is_the_p_at_which_so_many_are_just_likely_enough():
    for k, n, alpha in ((1, 10, 0.05), (990, 1000, 0.001), (1000, 1000, 0.001)):
        exact = brentq(lambda p, k=k, n=n, a=alpha: binom.sf(k - 1, n, p) - a, 1e-9, 1 - 1e-12)
        assert lower_bound(k, n, alpha) == pytest.approx(exact, rel=1e-6)
    assert lower_bound(0, 10, 0.001) == 0


def test_a_linear_classifiers_radius_is_its_distance_to_the_boundary():
    sigma, x = 0.1, torch.full((2, 1, 8, 8), 0.5)
    x[1] = 0.4995
    far = 0.02 * 8  # of the mean from `at`, times √d: the distance in L2
    model = Half(0.48)
    classes, radii = certify(undone(sigma), model, x[:1], sigma, n=20000, seed=1)
    bound = sigma * norm.ppf(lower_bound(round(20000 * norm.cdf(far / sigma)), 20000, 0.001))
    assert classes[0] == 1 and bound < far and radii[0] == pytest.approx(bound, rel=0.03)
    assert radii[0] < far  # no more than is true
    again = certify(undone(sigma), model, x, sigma, n=500, seed=1)
    alone = certify(undone(sigma), model, x[:1], sigma, n=500, seed=1)
    assert again[1][0] == alone[1][0] and again[1][0] < radii[0]  # fewer draws promise less


def test_it_abstains_where_no_class_has_the_majority():
    x = torch.full((1, 1, 8, 8), 0.5)
    classes, radii = certify(undone(0.1), Half(0.5), x, 0.1, n=1000, seed=3)
    assert classes[0] == ABSTAIN and radii[0] == 0


@pytest.mark.parametrize(
    "options",
    [{"sigma": 0.0}, {"sigma": "0.1"}, {"n": 0}, {"n": 10.0}, {"n0": -1}, {"n0": True}, {"failure_probability": 1.0}]
    + [{"failure_probability": 0}, {"failure_probability": np.nan}, {"seed": 0.5}, {"sigma": np.inf}],
)
def test_fault_34_settings_are_checked(options):
    with pytest.raises(ValueError, match=f"expected {next(iter(options))} to be .*, got "):
        certify(undone(0.1), Half(0.5), torch.full((1, 1, 8, 8), 0.5), **{"sigma": 0.1} | options)


@pytest.mark.parametrize("value", [np.nan, np.inf, -0.1, 255.0])
def test_fault_34_images_that_are_none_are_refused(value):
    x = torch.full((1, 1, 8, 8), 0.5)
    x[0, 0, 0, 0] = value
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        certify(undone(0.1), Half(0.4), x, 0.1, n=10)


def test_fault_34_answers_that_are_not_finite_are_of_no_class():
    """Neither for class 0, of which all would be, nor for another: a tenth of NaN takes a tenth of the successes."""
    x, plain = torch.full((1, 1, 8, 8), 0.5), Half(0.2)

    def spoilt(share, value):
        return lambda x: torch.where((torch.arange(len(x)) < share * len(x))[:, None], value, plain(x))

    for value in (np.nan, np.inf, -np.inf):
        with pytest.warns(CertificateWarning):
            classes, radii = certify(undone(0.1), spoilt(1, value), x, 0.1, n=200)
        assert classes[0] == ABSTAIN and radii[0] == 0
        with pytest.warns(CertificateWarning):
            classes, radii = certify(undone(0.1), spoilt(0.1, value), x, 0.1, n=500)
        assert classes[0] == 1 and radii[0] == pytest.approx(0.1 * norm.ppf(lower_bound(450, 500, 0.001)))
    with pytest.warns(CertificateWarning):
        broken = certify(lambda z, randn_like: z * np.nan, plain, x, 0.1, n=200)
    assert broken[0][0] == ABSTAIN


def test_fault_34_answers_that_are_not_finite_are_counted_in_one_warning():
    x, plain = torch.full((2, 1, 8, 8), 0.5), Half(0.2)

    def spoilt(x):  # the first three answers of each batch
        return plain(x).index_fill(0, torch.arange(3), np.nan)

    message = "answers were not finite in 18 of 1400 draws: they count against every class"
    with pytest.warns(CertificateWarning) as caught:  # two images in batches of 100, 500 and 100 draws
        certify(undone(0.1), spoilt, x, 0.1, n=600)
    assert [str(w.message) for w in caught] == [message]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        certify(undone(0.1), plain, x, 0.1, n=50)


def test_fault_34_a_denoiser_of_another_sigma_is_refused(models):
    sigma, x, model = 0.1, torch.full((1, 1, 8, 8), 0.5), Half(0.4)
    for name in ("teacher", "cd"):
        denoiser = one_step_denoiser(models, name, sigma)
        with pytest.raises(ValueError, match=r"expected a sampler for sigma 0\.2, got one for 0\.1"):
            certify(denoiser, model, x, 0.2, n=10)
        certify(denoiser, model, x, sigma, n=10)


def test_fault_34_certify_leaves_no_trace_and_repeats():
    x, net = torch.rand(2, 1, 8, 8), nn.Sequential(nn.BatchNorm2d(1), Half(0.4)).train()
    model, state = lambda z: net(z) + 0.1 * torch.randn(2), torch.get_rng_state()
    one, two = (certify(undone(0.1), model, x, 0.1, n=50, seed=1) for _ in range(2))
    assert np.array_equal(one[1], two[1]) and torch.equal(state, torch.get_rng_state())
    assert net.training and net[0].num_batches_tracked == 0


def test_fault_34_certified_accuracy_refuses_what_does_not_match():
    classes, radii, y = np.array([1, 2]), np.array([0.3, 0.5]), torch.tensor([1, 2])
    for values in (
        (classes[:1], radii, y),
        (classes, radii[:1], y),
        (classes, radii, y[:1]),
        (classes, radii, y[:, None]),
    ):
        with pytest.raises(ValueError, match="of one length"):
            certified_accuracy(*values, [0.1])
    for bad, at in ((np.array([0.3, np.nan]), [0.1]), (-radii, [0.1]), (radii, [np.nan])):
        with pytest.raises(ValueError, match="of at least 0, got"):
            certified_accuracy(classes, bad, y, at)


def test_a_student_is_certified_as_the_function_that_it_was_trained_as(models, tmp_path):
    """The same weights, saved with and without the skip connection, are two functions."""
    recipe, scalings = few_step.load_config(models)
    few_step.save_config(tmp_path, recipe, scalings)
    net, sigma = load_network(models / "cd"), scalings.sigma_max / 2
    z = add_noise(torch.rand(4, 1, 8, 8), recipe.t, randn_like(seeded_generator(0, "z")))
    for name, skip in (("cd", True), ("noskip", False)):
        save_network(net, tmp_path / name, {"skip": skip})
        sampler = few_step.consistency_sampler(net, replace(scalings, skip=skip), 1, recipe)
        with torch.no_grad():
            torch.testing.assert_close(
                one_step_denoiser(tmp_path, name, sigma)(z, torch.randn_like), sampler(z, torch.randn_like)
            )


def test_certified_accuracy_counts_right_classes_with_a_large_enough_radius():
    classes, radii = np.array([1, 2, ABSTAIN, 0]), np.array([0.3, 0.5, 0.0, 0.1])
    assert certified_accuracy(classes, radii, torch.tensor([1, 3, 1, 0]), [0.0, 0.1, 0.2, 0.4]) == [0.5, 0.5, 0.25, 0.0]
