"""The fast path of a GPU changes neither values nor names; here it compiles with backends that a CPU has."""

import copy

import pytest
import torch
from torch import nn

from lib.diffusion.network import build_unet, denoising_loss
from lib.training import train
from lib.utils import gpu_path
from lib.utils.gpu_path import speed_up


def small_network():
    """A network with batch normalisation; the tests check types in those of `lib.models`, which no compiler traces."""
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10)
    return nn.Sequential(*layers)


def gradient(net, x):
    x = x.clone().requires_grad_(True)
    z = net(x)
    return z, torch.autograd.grad(z.logsumexp(1).sum(), x)[0]


def test_a_cpu_is_left_alone():
    net = small_network()
    assert speed_up(net) is net and net._compiled_call_impl is None
    assert all(w.is_contiguous() for w in net.parameters())


@pytest.mark.filterwarnings("ignore")  # of torch's compiler
def test_a_gpu_compiles(monkeypatch):
    monkeypatch.setattr(gpu_path, "use_gpu", lambda: True)
    assert speed_up(small_network())._compiled_call_impl is not None


@pytest.mark.filterwarnings("ignore")  # of torch's compiler
@pytest.mark.parametrize("mode", [False, True])
def test_outputs_and_gradients_are_those_of_the_plain_network(mode):
    net, x = small_network().train(mode), torch.rand(6, 3, 8, 8)
    fast = speed_up(copy.deepcopy(net), backend="aot_eager")
    assert fast.state_dict().keys() == net.state_dict().keys()
    for a, b in zip(gradient(net, x), gradient(fast, x), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), fast.parameters(), strict=True))


@pytest.mark.filterwarnings("ignore")
def test_a_copy_is_not_compiled_and_follows_its_own_weights():
    fast = speed_up(small_network().eval(), backend="aot_eager")
    x = torch.rand(2, 3, 8, 8)
    before, other = fast(x), copy.deepcopy(fast)
    with torch.no_grad():
        other[-1].bias += 1
    assert other._compiled_call_impl is None
    assert torch.allclose(other(x), before + 1, atol=1e-5) and torch.allclose(fast(x), before)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_training_takes_the_same_path(precision):
    """With averaged weights, which are a copy, and mixed precision, which replaces the forward pass for a while."""

    def history(fast):
        net = build_unet(3, 8, (8, 8), seed=0)
        if fast:
            speed_up(net, backend="aot_eager")
        options = {"epochs": 2, "batch_size": 4, "ema": 0.5, "clip": 1.0, "precision": precision, "progress": False}
        x = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        score = lambda m: -float(m(x, torch.zeros(8)).sample.square().mean())  # noqa: E731
        return train(net, denoising_loss("v", 149), (x,), validate=score, **options).history

    for plain, fast in zip(history(False), history(True), strict=True):
        for key, rough in (("loss", 1e-3), ("score", 1e-2)):
            assert fast[key] == pytest.approx(plain[key], rel=rough if precision == "bf16" else 1e-4)
