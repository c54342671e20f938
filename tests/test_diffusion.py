"""Noise levels, solvers and gradients, against Gaussian data, for which everything is known in closed form."""

import math
from types import SimpleNamespace

import pytest
import torch

from lib import diffusion
from lib.diffusion import ABAR, CLEAN, grid, level, predictor, reverse, sigma_of, t_of, unet
from lib.seeds import generator
from lib.train import train

MU, C = 0.3, 0.5  # mean and standard deviation of the data
SMALL = {"channels": (8, 16), "seed": 0}


def gaussian(z, t):
    """The noise that the best predictor sees in z when pixels are N(MU, C²), independently."""
    alpha, s = level(t)
    return s * (z - alpha * MU) / (alpha**2 * C**2 + s**2)


def flow(z, t):
    """Where the probability-flow ODE takes z: the distance from the mean shrinks with the standard deviation."""
    alpha, _ = level(t)
    return MU + (z / alpha - MU) * C / math.sqrt(C**2 + sigma_of(t) ** 2)


def draws(n, t, seed=0):
    alpha, s = level(t)
    x = MU + C * torch.randn(n, 1, 1, 1, generator=generator(seed, "x"), dtype=torch.float64)
    return alpha * x + s * torch.randn(x.shape, generator=generator(seed, "z"), dtype=torch.float64)


def test_levels_and_their_inverse():
    assert sigma_of(99) == pytest.approx(0.3388, abs=1e-4) and sigma_of(49) == pytest.approx(0.173, abs=1e-3)
    assert level(99)[0] ** 2 == pytest.approx(0.8970, abs=1e-4) and level(CLEAN) == (1.0, 0.0)
    vp = math.exp(-0.5 * 19.9 * 0.1**2 - 0.1 * 0.1)  # DiffPure's continuous schedule, β from 0.1 to 20, at t* = 0.1
    assert sigma_of(99) == pytest.approx(math.sqrt((1 - vp) / vp), rel=0.01)
    for t in (0.0, 0.4, 37.25, 99.0, 998.9, 999.0):
        alpha, s = level(t)
        assert alpha**2 + s**2 == pytest.approx(1) and t_of(sigma_of(t)) == pytest.approx(t, abs=1e-6)
    several = torch.tensor([99.0, CLEAN, 40.5], dtype=torch.float64)
    for parts, each in zip(level(several), zip(*(level(t) for t in several.tolist())), strict=True):
        torch.testing.assert_close(parts.flatten(), torch.tensor(each, dtype=torch.float64))
    assert level(several)[0].shape == (3, 1, 1, 1)
    torch.testing.assert_close(t_of(torch.tensor([0.0, 0.2])), torch.tensor([CLEAN, t_of(0.2)]))
    assert t_of(0) == CLEAN and sigma_of(3) < sigma_of(3.5) < sigma_of(4)
    for bad in (-1.5, 1000):
        with pytest.raises(ValueError, match="index in"):
            level(bad)
    with pytest.raises(ValueError, match="σ is 1000"):
        t_of(1000)


def test_grids_finer_than_the_schedule_end_below_its_first_index():
    """σ² rises linearly from a clean image to index 0, as β dt does; the network itself is asked at 0 there."""
    assert sigma_of(-0.75) == pytest.approx(sigma_of(0) / 2)
    assert t_of(sigma_of(-0.75)) == pytest.approx(-0.75)
    assert grid(99, 400)[-2] == pytest.approx(-0.75) and grid(99, 400)[::2] == pytest.approx(grid(99, 200))
    asked = []
    net = type("Net", (torch.nn.Module,), {"forward": lambda self, z, t: asked.append(t) or SimpleNamespace(sample=z)})
    reverse(predictor(net()), torch.zeros(2, 1, 8, 8), grid(0, 4), "ddim")
    assert [t.tolist() for t in asked] == [[0.0, 0.0]] * 4


def test_one_ddim_step_by_hand():
    z, eps = torch.tensor([0.7]), torch.tensor([-0.2])
    now, then = level(99), level(40)
    x = (0.7 + now[1] * 0.2) / now[0]
    assert diffusion.ddim(z, eps, now, then).item() == pytest.approx(then[0] * x - then[1] * 0.2)
    torch.testing.assert_close(diffusion.ddim(z, eps, now, level(CLEAN)), torch.tensor([x]))


def test_deterministic_solvers_follow_the_probability_flow():
    z = draws(50, 99)
    exact = flow(z, 99)
    error = {
        name: [(reverse(gaussian, z, grid(99, k), name) - exact).abs().max().item() for k in (10, 20, 100)]
        for name in ("ddim", "heun")
    }
    assert error["ddim"][0] / error["ddim"][1] == pytest.approx(2, rel=0.25)  # first order
    assert error["ddim"][2] < 3e-3 and error["heun"][2] < 3e-4 and error["heun"][0] < error["ddim"][1]


@pytest.mark.parametrize("name", ["sde", "ddpm"])
def test_stochastic_solvers_end_in_the_distribution_of_the_data(name):
    z = draws(40_000, 99)
    x = reverse(gaussian, z, grid(99, 100), name, generator(0, "noise"))
    assert x.mean().item() == pytest.approx(MU, abs=0.01) and x.std().item() == pytest.approx(C, rel=0.02)
    start = z[:1].expand(40_000, -1, -1, -1)  # and from one z to the posterior
    x = reverse(gaussian, start, grid(99, 100), name, generator(0, "noise"))
    alpha, s = level(99)
    variance = 1 / (1 / C**2 + (alpha / s) ** 2)
    mean = variance * (MU / C**2 + alpha / s**2 * z[0].item())
    assert x.mean().item() == pytest.approx(mean, abs=0.01) and x.std().item() == pytest.approx(variance**0.5, rel=0.03)


def test_targets_say_the_same_noise():
    x, eps = torch.randn(2, 5, 1, 4, 4, generator=generator(0, "v"))
    alpha, s = level(60)
    z = alpha * x + s * eps
    torch.testing.assert_close(diffusion.noise_in(alpha * eps - s * x, z, (alpha, s), "v"), eps)
    assert diffusion.noise_in(eps, z, (alpha, s), "epsilon") is eps


@pytest.mark.parametrize("target", diffusion.TARGETS)
def test_training_finds_the_noise_of_gaussian_data(target):
    pixels = torch.full((512, 1, 4, 4), 0.5) + 0.1 * torch.randn(512, 1, 4, 4, generator=generator(0, "data"))
    net = unet(1, 4, (16, 16), seed=0)
    loss = diffusion.denoising(target, t_max=99)
    rows = train(net, loss, (pixels,), epochs=20, batch_size=64, lr=3e-3, ema=0.9, progress=False).history
    z = diffusion.noised(pixels, 99, generator(1, "z")).float()
    alpha, s = level(99)
    wanted = s * z / (alpha**2 * 0.2**2 + s**2)  # scaled data: mean 0, standard deviation 0.2
    with torch.no_grad():
        found = predictor(net, target)(z, 99)
    assert (found - wanted).square().mean() < 0.1 * wanted.square().mean() and rows[-1]["loss"] < rows[0]["loss"]


def double(**options):
    return predictor(unet(1, 8, **SMALL | options).double().eval(), "v")


@pytest.mark.parametrize("name", ["sde", "ddpm", "ddim", "heun"])
def test_gradients_through_the_whole_chain_are_finite_differences(name):
    predict, x = double(), torch.rand(2, 1, 8, 8, generator=generator(0, "x"), dtype=torch.float64).requires_grad_()

    def chain(x):
        return diffusion.purified(predict, x, generator(0, "noise"), steps=6, solver=name).square().sum()

    grad = torch.autograd.grad(chain(x), x)[0]
    along = torch.randn(x.shape, generator=generator(1, "d"), dtype=torch.float64)
    with torch.no_grad():
        slope = (chain(x + 1e-5 * along) - chain(x - 1e-5 * along)).item() / 2e-5
    assert (grad * along).sum().item() == pytest.approx(slope, rel=1e-6)
    assert grad.abs().amax((1, 2, 3)).min() > 0


def kept_bytes(steps, save_memory):
    """The gradient of a purification and the bytes that were kept for its backward pass."""
    predict, x = double(), torch.rand(4, 1, 8, 8, generator=generator(0, "x"), dtype=torch.float64).requires_grad_()
    seen = {}

    def pack(tensor):
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = diffusion.purified(predict, x, generator(0, "noise"), steps=steps, save_memory=save_memory)
    return torch.autograd.grad(out.square().sum(), x)[0], sum(seen.values())


def test_saving_memory_changes_no_gradient_and_keeps_images_only():
    (own, much), (same, little) = kept_bytes(20, False), kept_bytes(20, True)
    assert torch.equal(own, same)
    image = 4 * 64 * 8
    assert little < 20 * 3 * image < much / 20  # the images between the steps and their noise


def test_noise_is_the_generators_and_the_network_is_the_seeds():
    predict, x = double(), torch.rand(2, 1, 8, 8, dtype=torch.float64)
    state = torch.get_rng_state()
    one, two, three = (diffusion.purified(predict, x, generator(k, "a"), steps=3) for k in (0, 0, 1))
    assert torch.equal(one, two) and not torch.equal(one, three)
    a, b, c = (unet(seed=k).state_dict()["conv_in.weight"] for k in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(torch.get_rng_state(), state)
    assert unet(3, 32, (16, 16, 32, 32), attention=True, seed=0)(torch.rand(1, 3, 32, 32), 5).sample.shape == (
        1,
        3,
        32,
        32,
    )


def test_bad_settings_are_refused():
    z = torch.zeros(1, 1, 8, 8)
    for call, words in (
        (lambda: unet(1, 9, seed=0), "cannot be halved"),
        (lambda: predictor(unet(seed=0), "x"), "target is 'x'"),
        (lambda: diffusion.denoising("v", 1000), "t_max 1000"),
        (lambda: reverse(gaussian, z, grid(99, 4), "euler"), "unknown solver 'euler'"),
        (lambda: reverse(gaussian, z, grid(99, 4), "sde"), "give a generator"),
        (lambda: grid(99, 0), "at least one step"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    assert grid(99, 100) == [*range(99, -1, -1), CLEAN] and grid(99, 2) == [99, 49, CLEAN]
    assert len(ABAR) == 1000
