"""Consistency distillation against Gaussian data, whose consistency map is known in closed form."""

import math

import pytest
import torch
from torch import nn

from lib.diffusion.network import build_unet, eps_model
from lib.diffusion.schedule import sigma_to_t
from lib.distillation import consistency as cm
from lib.training import train
from lib.utils.random_state import randn_like
from lib.utils.seeds import seeded_generator
from tests.diffusion.test_diffusion import MU, C, gaussian

AT = cm.consistency_scalings(0.34, C)
LOW = AT.config.sigma_min


def closed_form(x, sigma):
    """Where the path through x at level σ is at σ_min."""
    return MU + (x - MU) * ((C**2 + LOW**2) / (C**2 + sigma**2)) ** 0.5


def points(n, sigma, seed=0):
    u = MU + C * torch.randn(n, 1, 1, 1, generator=seeded_generator(seed, "u"), dtype=torch.float64)
    return u + sigma * torch.randn(u.shape, generator=seeded_generator(seed, "e"), dtype=torch.float64)


class Affine(nn.Module):
    """F(x, t) = a x + b with a and b of its own for each level: enough for the paths of a Gaussian."""

    def __init__(self, sigmas):
        super().__init__()
        self.t = 250 * sigmas.log()
        self.w = nn.Parameter(torch.zeros(len(sigmas), 2, dtype=torch.float64))

    def forward(self, x, t):
        w = self.w[(self.t[None] - t[:, None]).abs().argmin(1)]
        return type("Output", (), {"sample": w[:, 0, None, None, None] * x + w[:, 1, None, None, None]})


def test_the_boundary_condition_is_exact_and_the_skip_an_option():
    x = points(8, LOW)
    net = Affine(torch.tensor([LOW], dtype=torch.float64))
    net.w.data += 3.0
    torch.testing.assert_close(
        cm.consistency_fn(net, x, torch.tensor(LOW, dtype=torch.float64), AT), x, rtol=0, atol=1e-12
    )
    skip, out = AT.get_scalings_for_boundary_condition(torch.tensor(0.34))
    assert skip.item() == pytest.approx(C**2 / ((0.34 - LOW) ** 2 + C**2)) and skip > 0.69
    assert out.item() == pytest.approx((0.34 - LOW) * C / math.sqrt(0.34**2 + C**2))
    free = cm.consistency_scalings(0.34, C, skip=False)
    found = cm.consistency_fn(net, x, torch.tensor(0.34, dtype=torch.float64), free)
    torch.testing.assert_close(found, 3 * x / math.sqrt(0.34**2 + C**2) + 3)  # nothing of x but through F


def test_the_grid_is_that_of_karras_and_of_the_scheduler():
    sigmas = cm.karras_sigmas(AT, 40)
    assert sigmas[0].item() == pytest.approx(0.34) and sigmas[-1].item() == pytest.approx(LOW)
    assert (sigmas.diff() < 0).all() and sigmas[20] < 0.34 / 2
    torch.testing.assert_close(cm.consistency_scalings(0.34, C).sigmas, sigmas)


@pytest.mark.parametrize(("solver", "tolerance"), [("heun", 1e-4), ("ddim", 2e-2)])
def test_teacher_steps_stay_on_their_path(solver, tolerance):
    sigmas = cm.karras_sigmas(AT, 20)
    x = points(len(sigmas) - 1, 0.34)
    x = MU + (x - MU) * ((C**2 + sigmas[:-1, None, None, None] ** 2) / (C**2 + 0.34**2)).sqrt()
    then = cm.ode_step(gaussian, x, sigmas[:-1], sigmas[1:], solver)
    far, near = (s[:, None, None, None] for s in (sigmas[:-1], sigmas[1:]))
    torch.testing.assert_close(closed_form(then, near), closed_form(x, far), rtol=0, atol=tolerance)


@pytest.mark.parametrize(("decay", "weight"), [(0.0, "gap"), (0.5, "uniform")])
def test_the_learnt_map_is_the_closed_form(decay, weight):
    sigmas = cm.karras_sigmas(AT, 12)
    student = cm.EMATarget(Affine(sigmas), decay)
    pixels = (points(2048, 0.0) + 1) / 2
    loss = cm.consistency_loss(gaussian, AT, epochs=60, levels=(12, 12), measure=cm.image_distance("l2"), weight=weight)
    train(student, loss, (pixels,), epochs=60, batch_size=256, lr=0.05, progress=False)
    x = points(100, 0.34, seed=3)
    with torch.no_grad():
        found = cm.consistency_sample(student.net, x, AT, 1)
    torch.testing.assert_close(found, closed_form(x, 0.34), rtol=0, atol=5e-3)


def test_one_jump_is_one_step_of_the_scheduler_and_more_steps_draw_noise():
    net = build_unet(1, 8, (8, 16), seed=0)
    x = torch.randn(3, 1, 8, 8, generator=seeded_generator(0, "x"))
    with torch.no_grad():
        one = cm.consistency_sample(net, x, AT, 1)
        torch.testing.assert_close(one, cm.consistency_fn(net, x, torch.tensor(0.34), AT), rtol=1e-5, atol=1e-5)
        free = cm.consistency_scalings(0.34, C, skip=False)
        torch.testing.assert_close(
            cm.consistency_sample(net, x, free, 1), cm.consistency_fn(net, x, torch.tensor(0.34), free)
        )
        two, again, other = (
            cm.consistency_sample(net, x, AT, 2, randn_like(seeded_generator(k, "n"))) for k in (0, 0, 1)
        )
    assert torch.equal(two, again) and not torch.equal(two, other) and not torch.equal(two, one)


def test_gradients_through_four_steps_are_finite_differences():
    net = build_unet(1, 8, (8, 16), seed=0).double()
    x = torch.randn(2, 1, 8, 8, generator=seeded_generator(0, "x"), dtype=torch.float64).requires_grad_()

    def chain(x):
        return cm.consistency_sample(net, x, AT, 4, randn_like(seeded_generator(0, "n"))).square().sum()

    grad = torch.autograd.grad(chain(x), x)[0]
    along = torch.randn(x.shape, generator=seeded_generator(1, "d"), dtype=torch.float64)
    with torch.no_grad():
        slope = (chain(x + 1e-5 * along) - chain(x - 1e-5 * along)).item() / 2e-5
    assert (grad * along).sum().item() == pytest.approx(slope, rel=1e-6)


def test_targets_have_no_gradient_and_the_slow_copy_is_in_the_state():
    net = build_unet(1, 4, (8, 8), seed=0)
    model = cm.EMATarget(net, 0.9)
    loss = cm.consistency_loss(eps_model(build_unet(1, 4, (8, 8), seed=1)), AT, epochs=2)
    x = torch.rand(8, 1, 4, 4, generator=seeded_generator(0, "x"))
    value, logs = loss(model, x, generator=seeded_generator(0, "g"), epoch=0)
    value.backward()
    assert logs == {"levels": 10.0} and loss(model, x, generator=seeded_generator(0, "g"), epoch=1)[1] == {
        "levels": 20.0
    }
    assert all(p.grad is None for p in model.target.parameters()) and all(p.grad is not None for p in net.parameters())
    with torch.no_grad():
        net.conv_in.bias += 1.0
    before = model.target.conv_in.bias.clone()
    torch.testing.assert_close(model.slow().conv_in.bias, 0.9 * before + 0.1 * net.conv_in.bias)
    assert any(key.startswith("target.") for key in model.state_dict())
    assert cm.EMATarget(net).slow() is net


def test_distances_by_hand():
    a, b = torch.zeros(2, 1, 2, 2), torch.tensor([3.0, 4.0, 0.0, 0.0]).reshape(1, 1, 2, 2).expand(2, -1, -1, -1)
    c = 0.00054 * 2
    assert cm.image_distance("l2")(a, b).tolist() == pytest.approx([6.25, 6.25])
    assert cm.image_distance("huber")(a, b).tolist() == pytest.approx([math.sqrt(25 + c**2) - c] * 2)
    assert cm.image_distance("features", lambda x: x.flatten(1)[:, :1])(a, b).tolist() == pytest.approx([9.0, 9.0])


def test_the_number_of_levels_doubles_on_schedule():
    counts = [cm.num_scales(share, 10, 80) for share in (0, 0.24, 0.25, 0.5, 0.74, 0.75, 0.99)]
    assert counts == [10, 10, 20, 40, 40, 80, 80]
    assert [cm.num_scales(share, 10, 50) for share in (0, 0.99)] == [10, 50]
    assert cm.num_scales(0.9, 12, 12) == 12


def test_bad_settings_are_refused():
    for call, words in (
        (lambda: cm.consistency_scalings(0.34, 0.0), "of data 0.0"),
        (lambda: cm.consistency_scalings(0.005, 0.5), "0 < min < max"),
        (lambda: cm.image_distance("lpips"), "distance 'lpips'"),
        (lambda: cm.image_distance("features"), "with a function `features`"),
        (lambda: cm.EMATarget(nn.Identity(), 1.0), "decay is 1.0"),
        (lambda: cm.consistency_loss(gaussian, AT, epochs=1, weight="snr"), "weight 'snr'"),
    ):
        with pytest.raises(ValueError, match=words):
            call()


@pytest.mark.parametrize("target", ["epsilon", "v"])
def test_a_warm_start_is_the_teachers_denoiser_with_the_boundary_exact(target):
    net, at = build_unet(1, 8, (8, 8), seed=0).double(), cm.consistency_scalings(0.34, 0.7)
    warm, x = (
        cm.PreconditionedTeacher(net, at, target),
        torch.randn(4, 1, 8, 8, generator=seeded_generator(0, "x"), dtype=torch.float64),
    )
    for sigma in (0.34, 0.1, 0.02, LOW):
        alpha, gap = 1 / math.sqrt(1 + sigma**2), sigma - LOW
        with torch.no_grad():
            said = net(alpha * x, torch.tensor(sigma_to_t(sigma))).sample
            seen = x - gap * said if target == "epsilon" else x / (1 + gap**2) - gap * alpha * said
            found = cm.consistency_fn(warm, x, torch.tensor(sigma, dtype=torch.float64), at)
        torch.testing.assert_close(found, seen, rtol=1e-5, atol=1e-6)  # the network has a float32 time embedding
    torch.testing.assert_close(found, x, rtol=0, atol=1e-12)
    z = x.mul(1 / math.sqrt(1 + 0.34**2))  # where σ_min is far below σ, this is nearly the undistilled step
    with torch.no_grad():
        eps = eps_model(net, target)(z, sigma_to_t(0.34))
    torch.testing.assert_close(cm.consistency_fn(warm, x, torch.tensor(0.34), at), x - 0.34 * eps, rtol=0.05, atol=0.05)
    with pytest.raises(ValueError, match="skip is False"):
        cm.PreconditionedTeacher(net, cm.consistency_scalings(0.34, 0.7, skip=False), target)
