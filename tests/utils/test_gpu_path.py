"""The fast path of a GPU changes neither values nor names; here it compiles with backends that a CPU has."""

import copy

import pytest
import torch
from torch import nn

from lib.diffusion.network import build_unet, denoising_loss
from lib.training import train
from lib.utils import gpu_path
from lib.utils.gpu_path import compiled_difference, is_compiled, speed_up

IMAGES = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))


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
    assert speed_up(net, [IMAGES]) is net and net._compiled_call_impl is None
    assert all(w.is_contiguous() for w in net.parameters())


@pytest.mark.filterwarnings("ignore")  # of torch's compiler
def test_a_gpu_compiles(monkeypatch):
    monkeypatch.setattr(gpu_path, "use_gpu", lambda: True)
    assert is_compiled(speed_up(small_network(), [IMAGES]))


@pytest.mark.filterwarnings("ignore")  # of torch's compiler
@pytest.mark.parametrize("mode", [False, True])
def test_outputs_and_gradients_are_those_of_the_plain_network(mode):
    net, x = small_network().train(mode), IMAGES
    fast = speed_up(copy.deepcopy(net), [x], backend="aot_eager")
    assert fast.state_dict().keys() == net.state_dict().keys()
    for a, b in zip(gradient(net, x), gradient(fast, x), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), fast.parameters(), strict=True))


@pytest.mark.filterwarnings("ignore")
def test_a_copy_is_not_compiled_and_follows_its_own_weights():
    fast = speed_up(small_network().eval(), [IMAGES], backend="aot_eager")
    x = IMAGES
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
            speed_up(net.train(), [torch.rand(4, 3, 8, 8), torch.zeros(4)], precision, backend="aot_eager")
        options = {"epochs": 2, "batch_size": 4, "ema": 0.5, "clip": 1.0, "precision": precision, "progress": False}
        x = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        score = lambda m: -float(m(x, torch.zeros(8)).sample.square().mean())  # noqa: E731
        return train(net, denoising_loss("v", 149), (x,), validate=score, **options).history

    for plain, fast in zip(history(False), history(True), strict=True):
        for key, rough in (("loss", 1e-3), ("score", 1e-2)):
            assert fast[key] == pytest.approx(plain[key], rel=rough if precision == "bf16" else 1e-4)


class HalfGradient(torch.autograd.Function):
    """The identity with a wrong gradient: what a faulty compiler makes."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad / 2


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("where", [True, False])
@pytest.mark.parametrize("fault", [lambda z: z + 1, lambda z: z * torch.nan, HalfGradient.apply])
def test_a_faulty_compiler_is_not_believed(monkeypatch, capsys, fault, where):
    """One that changes outputs, one that answers NaN and one with wrong gradients alone, in training or else."""
    net = small_network()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    plain = net._call_impl

    def compile_badly(**_):
        net._compiled_call_impl = lambda *inputs: (fault if net.training == where else torch.nn.Identity())(
            plain(*inputs)
        )

    monkeypatch.setattr(net, "compile", compile_badly)
    speed_up(net, [IMAGES], uses=("training", "attack"), backend="inductor")
    assert not is_compiled(net) and "expected gradients of the compiled network within 0.01" in capsys.readouterr().err
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())  # running means, too
    assert compiled_difference(net, copy.deepcopy(net), [IMAGES]) == 0
