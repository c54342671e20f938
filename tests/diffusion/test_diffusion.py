"""Noise levels, solvers and gradients, against Gaussian data, for which everything is known in closed form."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lib.diffusion import network, schedule, solvers
from lib.diffusion.network import build_unet, eps_model
from lib.diffusion.schedule import ABAR, CLEAN, alpha_sigma, sigma_to_t, t_to_sigma, time_grid
from lib.diffusion.solvers import reverse_process
from lib.training import train
from lib.utils.random_state import randn_like
from lib.utils.seeds import seeded_generator

MU, C = 0.3, 0.5  # mean and standard deviation of the data
SMALL = {"channels": (8, 16), "seed": 0}


def gaussian(z, t):
    """The noise that the best predictor sees in z when pixels are N(MU, C²), independently."""
    alpha, s = alpha_sigma(t)
    return s * (z - alpha * MU) / (alpha**2 * C**2 + s**2)


def flow(z, t):
    """Where the probability-flow ODE takes z: the distance from the mean shrinks with the standard deviation."""
    alpha, _ = alpha_sigma(t)
    return MU + (z / alpha - MU) * C / math.sqrt(C**2 + t_to_sigma(t) ** 2)


def draws(n, t, seed=0):
    alpha, s = alpha_sigma(t)
    x = MU + C * torch.randn(n, 1, 1, 1, generator=seeded_generator(seed, "x"), dtype=torch.float64)
    return alpha * x + s * torch.randn(x.shape, generator=seeded_generator(seed, "z"), dtype=torch.float64)


@pytest.mark.parametrize("level", [alpha_sigma, sigma_to_t])
def test_levels_of_a_batch_are_computed_on_its_own_device(level):
    """A meta tensor has no data: whatever copies it to the host, or waits for a value of it, raises."""
    parts = level(torch.zeros(3, device="meta"))
    for part in parts if isinstance(parts, tuple) else [parts]:
        assert part.device.type == "meta" and len(part) == 3 and part.dtype == torch.float32


def test_levels_and_their_inverse():
    assert t_to_sigma(99) == pytest.approx(0.3388, abs=1e-4) and t_to_sigma(49) == pytest.approx(0.173, abs=1e-3)
    assert alpha_sigma(99)[0] ** 2 == pytest.approx(0.8970, abs=1e-4) and alpha_sigma(CLEAN) == (1.0, 0.0)
    vp = math.exp(-0.5 * 19.9 * 0.1**2 - 0.1 * 0.1)  # DiffPure's continuous schedule, β from 0.1 to 20, at t* = 0.1
    assert t_to_sigma(99) == pytest.approx(math.sqrt((1 - vp) / vp), rel=0.01)
    for t in (0.0, 0.4, 37.25, 99.0, 998.9, 999.0):
        alpha, s = alpha_sigma(t)
        assert alpha**2 + s**2 == pytest.approx(1) and sigma_to_t(t_to_sigma(t)) == pytest.approx(t, abs=1e-6)
    several = torch.tensor([99.0, CLEAN, 40.5], dtype=torch.float64)
    for parts, each in zip(alpha_sigma(several), zip(*(alpha_sigma(t) for t in several.tolist())), strict=True):
        torch.testing.assert_close(parts.flatten(), torch.tensor(each, dtype=torch.float64))
    assert alpha_sigma(several)[0].shape == (3, 1, 1, 1)
    torch.testing.assert_close(sigma_to_t(torch.tensor([0.0, 0.2])), torch.tensor([CLEAN, sigma_to_t(0.2)]))
    assert sigma_to_t(0) == CLEAN and t_to_sigma(3) < t_to_sigma(3.5) < t_to_sigma(4)
    for bad in (-1.5, 1000):
        with pytest.raises(ValueError, match="expected t in"):
            alpha_sigma(bad)
    with pytest.raises(ValueError, match=r"expected σ in .* got 1000"):
        sigma_to_t(1000)


def test_grids_finer_than_the_schedule_end_below_its_first_index():
    """σ² rises linearly from a clean image to index 0, as β dt does; the network itself is asked at 0 there."""
    assert t_to_sigma(-0.75) == pytest.approx(t_to_sigma(0) / 2)
    assert sigma_to_t(t_to_sigma(-0.75)) == pytest.approx(-0.75)
    assert time_grid(99, 400)[-2] == pytest.approx(-0.75) and time_grid(99, 400)[::2] == pytest.approx(
        time_grid(99, 200)
    )
    times = []
    net = type("Net", (torch.nn.Module,), {"forward": lambda self, z, t: times.append(t) or SimpleNamespace(sample=z)})
    reverse_process(eps_model(net()), torch.zeros(2, 1, 8, 8), time_grid(0, 4), "ddim")
    assert [t.tolist() for t in times] == [[0.0, 0.0]] * 4


def test_one_ddim_step_by_hand():
    z, eps = torch.tensor([0.7]), torch.tensor([-0.2])
    now, then = alpha_sigma(99), alpha_sigma(40)
    x = (0.7 + now[1] * 0.2) / now[0]
    assert solvers.ddim_step(z, eps, now, then).item() == pytest.approx(then[0] * x - then[1] * 0.2)
    torch.testing.assert_close(solvers.ddim_step(z, eps, now, alpha_sigma(CLEAN)), torch.tensor([x]))


def test_deterministic_solvers_follow_the_probability_flow():
    z = draws(50, 99)
    exact = flow(z, 99)
    error = {
        name: [(reverse_process(gaussian, z, time_grid(99, k), name) - exact).abs().max().item() for k in (10, 20, 100)]
        for name in ("ddim", "heun")
    }
    assert error["ddim"][0] / error["ddim"][1] == pytest.approx(2, rel=0.25)  # first order
    assert error["ddim"][2] < 3e-3 and error["heun"][2] < 3e-4 and error["heun"][0] < error["ddim"][1]


@pytest.mark.parametrize("name", ["sde", "ddpm"])
def test_stochastic_solvers_end_in_the_distribution_of_the_data(name):
    z = draws(40_000, 99)
    x = reverse_process(gaussian, z, time_grid(99, 100), name, randn_like(seeded_generator(0, "noise")))
    assert x.mean().item() == pytest.approx(MU, abs=0.01) and x.std().item() == pytest.approx(C, rel=0.02)
    start = z[:1].expand(40_000, -1, -1, -1)  # and from one z to the posterior
    x = reverse_process(gaussian, start, time_grid(99, 100), name, randn_like(seeded_generator(0, "noise")))
    alpha, s = alpha_sigma(99)
    variance = 1 / (1 / C**2 + (alpha / s) ** 2)
    mean = variance * (MU / C**2 + alpha / s**2 * z[0].item())
    assert x.mean().item() == pytest.approx(mean, abs=0.01) and x.std().item() == pytest.approx(variance**0.5, rel=0.03)


def test_targets_say_the_same_noise():
    x, eps = torch.randn(2, 5, 1, 4, 4, generator=seeded_generator(0, "v"))
    alpha, s = alpha_sigma(60)
    z = alpha * x + s * eps
    torch.testing.assert_close(network.to_eps(alpha * eps - s * x, z, (alpha, s), "v"), eps)
    assert network.to_eps(eps, z, (alpha, s), "epsilon") is eps


@pytest.mark.parametrize("target", network.PREDICTION_TARGETS)
def test_training_finds_the_noise_of_gaussian_data(target):
    pixels = torch.full((512, 1, 4, 4), 0.5) + 0.1 * torch.randn(512, 1, 4, 4, generator=seeded_generator(0, "data"))
    net = build_unet(1, 4, (16, 16), seed=0)
    loss = network.denoising_loss(target, t_max=99)
    rows = train(net, loss, (pixels,), epochs=20, batch_size=64, lr=3e-3, ema=0.9, progress=False).history
    z = schedule.add_noise(pixels, 99, randn_like(seeded_generator(1, "z"))).float()
    alpha, s = alpha_sigma(99)
    truth = s * z / (alpha**2 * 0.2**2 + s**2)  # scaled data: mean 0, standard deviation 0.2
    with torch.no_grad():
        eps_hat = eps_model(net, target)(z, 99)
    assert (eps_hat - truth).square().mean() < 0.1 * truth.square().mean() and rows[-1]["loss"] < rows[0]["loss"]


def double(**options):
    return eps_model(build_unet(1, 8, **SMALL | options).double().eval(), "v")


@pytest.mark.parametrize("name", ["sde", "ddpm", "ddim", "heun"])
def test_gradients_through_the_whole_chain_are_finite_differences(name):
    predict, x = (
        double(),
        torch.rand(2, 1, 8, 8, generator=seeded_generator(0, "x"), dtype=torch.float64).requires_grad_(),
    )

    def chain(x):
        return (
            solvers.diffpure(predict, x, randn_like(seeded_generator(0, "noise")), steps=6, solver=name).square().sum()
        )

    grad = torch.autograd.grad(chain(x), x)[0]
    along = torch.randn(x.shape, generator=seeded_generator(1, "d"), dtype=torch.float64)
    with torch.no_grad():
        slope = (chain(x + 1e-5 * along) - chain(x - 1e-5 * along)).item() / 2e-5
    assert (grad * along).sum().item() == pytest.approx(slope, rel=1e-6)
    assert grad.abs().amax((1, 2, 3)).min() > 0


def saved_bytes(steps, save_memory):
    """The gradient of a purification and the bytes that are saved for its backward pass."""
    predict, x = (
        double(),
        torch.rand(4, 1, 8, 8, generator=seeded_generator(0, "x"), dtype=torch.float64).requires_grad_(),
    )
    seen = {}

    def pack(tensor):
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = solvers.diffpure(
            predict, x, randn_like(seeded_generator(0, "noise")), steps=steps, save_memory=save_memory
        )
    return torch.autograd.grad(out.square().sum(), x)[0], sum(seen.values())


def test_saving_memory_changes_no_gradient_and_saves_images_only():
    (own, much), (same, little) = saved_bytes(20, False), saved_bytes(20, True)
    assert torch.equal(own, same)
    image = 4 * 64 * 8
    assert little < 20 * 3 * image < much / 20  # the images between the steps and their noise


def test_noise_is_the_generators_and_the_network_is_the_seeds():
    predict, x = double(), torch.rand(2, 1, 8, 8, dtype=torch.float64)
    state = torch.get_rng_state()
    one, two, three = (solvers.diffpure(predict, x, randn_like(seeded_generator(k, "a")), steps=3) for k in (0, 0, 1))
    assert torch.equal(one, two) and not torch.equal(one, three)
    a, b, c = (build_unet(seed=k).state_dict()["conv_in.weight"] for k in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(torch.get_rng_state(), state)
    assert build_unet(3, 32, (16, 16, 32, 32), attention=True, seed=0)(torch.rand(1, 3, 32, 32), 5).sample.shape == (
        1,
        3,
        32,
        32,
    )


def test_bad_settings_are_refused():
    z = torch.zeros(1, 1, 8, 8)
    for call, words in (
        (lambda: build_unet(1, 9, seed=0), "expected a size divisible by 2"),
        (lambda: eps_model(build_unet(seed=0), "x"), "got 'x'"),
        (lambda: network.denoising_loss("v", 1000), "t_max 1000"),
        (lambda: reverse_process(gaussian, z, time_grid(99, 4), "euler"), "got 'euler'"),
        (lambda: reverse_process(gaussian, z, time_grid(99, 4), "sde"), "sde draws noise: expected randn_like"),
        (lambda: time_grid(99, 0), "expected steps to be an integer >= 1, got 0"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    assert time_grid(99, 100) == [*range(99, -1, -1), CLEAN] and time_grid(99, 2) == [99, 49, CLEAN]
    assert len(ABAR) == 1000


@pytest.mark.parametrize("target", network.PREDICTION_TARGETS)
def test_fault_11_whole_timesteps_give_the_noise_of_the_same_numbers(target):
    """As diffusers' loops have them: int64, one for all or one per image; also numbers of numpy."""
    net, z = build_unet(1, 8, **SMALL).eval(), torch.randn(3, 1, 8, 8, generator=seeded_generator(0, "z"))
    predict = eps_model(net, target)
    with torch.no_grad():
        expected = predict(z, 99.0)
        for t in (99, np.int64(99), np.float32(99), torch.tensor(99), torch.tensor([99] * 3, dtype=torch.uint8)):
            assert torch.equal(predict(z, t), expected), t
        for t in (torch.tensor([99] * 3), torch.full((3,), 99.0), torch.full((3,), 99.0, dtype=torch.bfloat16)):
            torch.testing.assert_close(predict(z, t), predict(z, torch.full((3,), 99.0)), rtol=0, atol=0)
            torch.testing.assert_close(predict(z, t), expected)


def test_fault_11_levels_of_whole_numbers_and_halves_are_not_rounded():
    exact = alpha_sigma(torch.tensor([99.0, 7.0]))
    for dtype in (torch.int64, torch.int32, torch.float16, torch.bfloat16):
        for part, truth in zip(alpha_sigma(torch.tensor([99, 7], dtype=dtype)), exact, strict=True):
            assert part.dtype == torch.float32 and torch.equal(part, truth)
    assert sigma_to_t(torch.tensor([1])).item() == pytest.approx(sigma_to_t(1))
    x = torch.rand(2, 1, 8, 8, generator=seeded_generator(0, "x"))
    noisy = [schedule.add_noise(x, t, lambda x: 0 * x + 1) for t in (99.0, torch.tensor([99, 99]), torch.tensor(99))]
    assert torch.equal(noisy[1], noisy[2]) and all(z.dtype == x.dtype for z in noisy)
    torch.testing.assert_close(noisy[0], noisy[1])
    steps = torch.tensor([99, 49, -1])
    assert torch.equal(
        reverse_process(gaussian, x, steps, "ddim"), reverse_process(gaussian, x, [99.0, 49.0, CLEAN], "ddim")
    )


def test_fault_11_what_is_no_index_is_refused():
    z = torch.zeros(2, 1, 8, 8)
    predict = eps_model(build_unet(1, 8, **SMALL))
    for call, words in (
        (lambda: alpha_sigma(math.nan), "expected t in"),
        (lambda: alpha_sigma(torch.tensor([1000])), "expected t in"),
        (lambda: alpha_sigma(torch.tensor([3.0, math.nan])), "expected t in"),
        (lambda: predict(z, torch.tensor([1, 2, 3])), "one for each of 2 images, got 3"),
        (lambda: time_grid(math.inf, 3), "expected t to be"),
        (lambda: time_grid(True, 3), "expected t to be"),
        (lambda: reverse_process(gaussian, z, [3.0, 50.0], "ddim"), "falling times"),
        (lambda: reverse_process(gaussian, z, [50.0], "ddim"), "falling times"),
        (lambda: build_unet(1, 8, (), seed=0), "expected channels"),
        (lambda: build_unet(1, 8, (0, 8), seed=0), "expected channels"),
        (lambda: build_unet(1, 0, seed=0), "expected size"),
        (lambda: build_unet(1, 8, (8, 12), attention=True, seed=0), "divisible by 8"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
