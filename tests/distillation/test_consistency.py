"""Consistency distillation against Gaussian data, whose consistency map is known in closed form."""

import math

import pytest
import torch
from diffusers import CMStochasticIterativeScheduler
from torch import nn

from lib.diffusion.network import build_unet, eps_model
from lib.diffusion.schedule import sigma_to_t
from lib.distillation import consistency as cm
from lib.training import train
from lib.utils.random_state import randn_like
from lib.utils.seeds import seeded_generator
from tests.diffusion.test_diffusion import MU, C, gaussian

SCALINGS = cm.ConsistencyScalings(0.34, C)
LOW = SCALINGS.sigma_min


def scheduler(scalings):
    """Diffusers' implementation of the same levels, scalings and sampling."""
    names = ("sigma_min", "sigma_max", "sigma_data", "rho")
    return CMStochasticIterativeScheduler(**{name: getattr(scalings, name) for name in names}, clip_denoised=False)


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
        cm.consistency_fn(net, x, torch.tensor(LOW, dtype=torch.float64), SCALINGS), x, rtol=0, atol=1e-12
    )
    skip, out = SCALINGS.c_skip_out(torch.tensor(0.34))
    assert skip.item() == pytest.approx(C**2 / ((0.34 - LOW) ** 2 + C**2)) and skip > 0.69
    assert out.item() == pytest.approx((0.34 - LOW) * C / math.sqrt(0.34**2 + C**2))
    no_skip = cm.ConsistencyScalings(0.34, C, skip=False)
    outputs = cm.consistency_fn(net, x, torch.tensor(0.34, dtype=torch.float64), no_skip)
    torch.testing.assert_close(outputs, 3 * x / math.sqrt(0.34**2 + C**2) + 3)  # nothing of x but through F


def test_the_grid_is_that_of_karras_and_of_diffusers():
    sigmas = cm.karras_sigmas(SCALINGS, 40)
    assert sigmas[0].item() == pytest.approx(0.34) and sigmas[-1].item() == pytest.approx(LOW)
    assert (sigmas.diff() < 0).all() and sigmas[20] < 0.34 / 2
    torch.testing.assert_close(scheduler(SCALINGS).sigmas, sigmas)


@pytest.mark.parametrize(("solver", "tolerance"), [("heun", 1e-4), ("ddim", 2e-2)])
def test_teacher_steps_stay_on_their_path(solver, tolerance):
    sigmas = cm.karras_sigmas(SCALINGS, 20)
    x = points(len(sigmas) - 1, 0.34)
    x = MU + (x - MU) * ((C**2 + sigmas[:-1, None, None, None] ** 2) / (C**2 + 0.34**2)).sqrt()
    then = cm.ode_step(gaussian, x, sigmas[:-1], sigmas[1:], solver)
    far, near = (s[:, None, None, None] for s in (sigmas[:-1], sigmas[1:]))
    torch.testing.assert_close(closed_form(then, near), closed_form(x, far), rtol=0, atol=tolerance)


@pytest.mark.parametrize(("decay", "weight"), [(0.0, "inverse"), (0.5, "uniform")])
def test_the_learnt_map_is_the_closed_form(decay, weight):
    sigmas = cm.karras_sigmas(SCALINGS, 12)
    student = cm.EMATarget(Affine(sigmas), decay)
    pixels = (points(2048, 0.0) + 1) / 2
    loss = cm.consistency_loss(
        gaussian, SCALINGS, epochs=60, levels=(12, 12), distance=cm.image_distance("l2"), weight=weight
    )

    def unbounded(model, x, **options):  # a normal distribution is not within [0, 1], as images are
        return loss(model, x[:, 0], **options)

    train(student, unbounded, (pixels[:, None],), epochs=60, batch_size=256, lr=0.05, progress=False)
    x = points(100, 0.34, seed=3)
    with torch.no_grad():
        outputs = cm.consistency_sample(student.net, x, SCALINGS, 1)
    torch.testing.assert_close(outputs, closed_form(x, 0.34), rtol=0, atol=5e-3)


def test_one_step_is_the_consistency_function_and_more_steps_draw_noise():
    net = build_unet(1, 8, (8, 16), seed=0)
    x = torch.randn(3, 1, 8, 8, generator=seeded_generator(0, "x"))
    with torch.no_grad():
        one = cm.consistency_sample(net, x, SCALINGS, 1)
        torch.testing.assert_close(one, cm.consistency_fn(net, x, torch.tensor(0.34), SCALINGS), rtol=1e-5, atol=1e-5)
        no_skip = cm.ConsistencyScalings(0.34, C, skip=False)
        torch.testing.assert_close(
            cm.consistency_sample(net, x, no_skip, 1), cm.consistency_fn(net, x, torch.tensor(0.34), no_skip)
        )
        two, again, other = (
            cm.consistency_sample(net, x, SCALINGS, 2, randn_like(seeded_generator(k, "n"))) for k in (0, 0, 1)
        )
    assert torch.equal(two, again) and not torch.equal(two, other) and not torch.equal(two, one)


@pytest.mark.parametrize("sigma_max", [0.34, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8, 40])
def test_sampling_is_that_of_diffusers_to_the_bit(steps, sigma_max):
    scalings, net = cm.ConsistencyScalings(sigma_max, C), build_unet(1, 8, (8, 16), seed=0)
    x = start = torch.randn(3, 1, 8, 8, generator=seeded_generator(0, "x"))
    rng, their_rng, theirs = seeded_generator(0, "n"), seeded_generator(0, "n"), scheduler(scalings)
    theirs.set_timesteps(steps)
    with torch.no_grad():
        for t in theirs.timesteps:
            output = net(theirs.scale_model_input(x, t), t.to(x).expand(len(x))).sample
            x = theirs.step(output, t, x, generator=their_rng).prev_sample
        assert torch.equal(cm.consistency_sample(net, start, scalings, steps, randn_like(rng)), x)
    assert torch.equal(rng.get_state(), their_rng.get_state())


def test_gradients_through_four_steps_are_finite_differences():
    net = build_unet(1, 8, (8, 16), seed=0).double()
    x = torch.randn(2, 1, 8, 8, generator=seeded_generator(0, "x"), dtype=torch.float64).requires_grad_()

    def chain(x):
        return cm.consistency_sample(net, x, SCALINGS, 4, randn_like(seeded_generator(0, "n"))).square().sum()

    grad = torch.autograd.grad(chain(x), x)[0]
    along = torch.randn(x.shape, generator=seeded_generator(1, "d"), dtype=torch.float64)
    with torch.no_grad():
        slope = (chain(x + 1e-5 * along) - chain(x - 1e-5 * along)).item() / 2e-5
    assert (grad * along).sum().item() == pytest.approx(slope, rel=1e-6)


def test_targets_have_no_gradient_and_the_averaged_weights_are_in_the_state():
    net = build_unet(1, 4, (8, 8), seed=0)
    model = cm.EMATarget(net, 0.9)
    loss = cm.consistency_loss(eps_model(build_unet(1, 4, (8, 8), seed=1)), SCALINGS, epochs=2)
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
    torch.testing.assert_close(model.update_target().conv_in.bias, 0.9 * before + 0.1 * net.conv_in.bias)
    assert any(key.startswith("target.") for key in model.state_dict())
    assert cm.EMATarget(net).update_target() is net


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
        (lambda: cm.ConsistencyScalings(0.34, 0.0), "sigma_data > 0, got .* and 0.0"),
        (lambda: cm.ConsistencyScalings(0.005, 0.5), "expected 0 < sigma_min < sigma_max"),
        (lambda: cm.image_distance("lpips"), "got 'lpips'"),
        (lambda: cm.image_distance("features"), "expected a function of images"),
        (lambda: cm.EMATarget(nn.Identity(), 1.0), "got decay 1.0"),
        (lambda: cm.consistency_sample(nn.Identity(), torch.zeros(1, 1, 2, 2), SCALINGS, 2), "expected randn_like"),
        (lambda: cm.consistency_sample(nn.Identity(), torch.zeros(1, 1, 2, 2), SCALINGS, 41), "1 to 40"),
        (lambda: cm.consistency_loss(gaussian, SCALINGS, epochs=1, weight="snr"), "weight 'snr'"),
    ):
        with pytest.raises(ValueError, match=words):
            call()


@pytest.mark.parametrize("target", ["epsilon", "v"])
def test_a_preconditioned_teacher_is_its_denoiser_with_the_boundary_exact(target):
    net, scalings = build_unet(1, 8, (8, 8), seed=0).double(), cm.ConsistencyScalings(0.34, 0.7)
    preconditioned, x = (
        cm.PreconditionedTeacher(net, scalings, target),
        torch.randn(4, 1, 8, 8, generator=seeded_generator(0, "x"), dtype=torch.float64),
    )
    for sigma in (0.34, 0.1, 0.02, LOW):
        alpha_t, above = 1 / math.sqrt(1 + sigma**2), sigma - LOW
        with torch.no_grad():
            output = net(alpha_t * x, torch.tensor(sigma_to_t(sigma))).sample
            denoised = x - above * output
            if target == "v":
                denoised = x / (1 + above**2) - above * alpha_t * output
            outputs = cm.consistency_fn(preconditioned, x, torch.tensor(sigma, dtype=torch.float64), scalings)
        torch.testing.assert_close(outputs, denoised, rtol=1e-5, atol=1e-6)  # the network has a float32 time embedding
    torch.testing.assert_close(outputs, x, rtol=0, atol=1e-12)
    z = x.mul(1 / math.sqrt(1 + 0.34**2))  # where σ_min is far below σ, this is nearly the undistilled step
    with torch.no_grad():
        eps = eps_model(net, target)(z, sigma_to_t(0.34))
    torch.testing.assert_close(
        cm.consistency_fn(preconditioned, x, torch.tensor(0.34), scalings), x - 0.34 * eps, rtol=0.05, atol=0.05
    )
    with pytest.raises(ValueError, match="expected scalings with skip=True"):
        cm.PreconditionedTeacher(net, cm.ConsistencyScalings(0.34, 0.7, skip=False), target)
