"""Every source of noise that a model can reach is seeded; networks are left as they were; other noise is noticed."""

import random
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from lib.attacks.api import attack
from lib.evaluation.robust_accuracy import robust_accuracy
from lib.utils import random_state
from lib.utils.random_state import restored_networks, seeded_noise
from lib.utils.seeds import derive_seed

X = torch.rand(4, 1, 2, 2, generator=torch.Generator().manual_seed(0))
CPU = X.device


class Held(nn.Module):
    """Draws from a generator that it holds under any name."""

    def __init__(self, source, draw):
        super().__init__()
        self._any_name, self.draw = source, draw

    def forward(self, x):
        return x.flatten(1) + self.draw(self._any_name)


def sources():
    rng, box = np.random.default_rng(1), SimpleNamespace(inner=[{"rng": random.Random(2)}])
    out = {
        "numpy": lambda x: x.flatten(1) + np.random.rand(),
        "random": lambda x: x.flatten(1) + random.random(),
        "torch": lambda x: x.flatten(1) + torch.rand(1),
        "closure": lambda x: x.flatten(1) + rng.normal(),
        "container": lambda x: x.flatten(1) + box.inner[0]["rng"].random(),
        "torch generator": Held(torch.Generator(), lambda g: torch.rand(1, generator=g)),
        "Generator": Held(np.random.Generator(np.random.Philox(1)), lambda g: g.normal()),
        "RandomState": Held(np.random.RandomState(1), lambda g: g.normal()),
        "Random": Held(random.Random(1), lambda g: g.gauss(0, 1)),
        "bound method": Held(np.random.default_rng(1).normal, lambda draw: draw()),
    }
    return out | {"wrapped": lambda x, f=out["Generator"]: f(x)}


@pytest.mark.parametrize("name", sources())
def test_fault_08_every_source_within_reach_is_seeded_and_restored(name):
    model = sources()[name]

    def answer(seed):
        with seeded_noise(model, seed, CPU):
            return model(X), model(X)

    (a, later), (b, _), (c, _) = answer(0), answer(0), answer(1)
    assert torch.equal(a, b) and not torch.equal(a, c) and not torch.equal(a, later)
    torch.manual_seed(7), np.random.seed(7), random.seed(7)  # what a user has seeded goes on as without the block
    once = [sources()[name](X)]
    torch.manual_seed(7), np.random.seed(7), random.seed(7)
    other = sources()[name]
    with pytest.raises(RuntimeError, match="inside"), seeded_noise(other, 0, CPU):
        other(X)
        raise RuntimeError("inside")
    if name not in ("torch generator", "random"):  # a new state of its own; beartype draws from `random` in these tests
        assert torch.equal(other(X), once[0])


@pytest.mark.parametrize("name", ["numpy", "random", "closure", "Generator"])
def test_fault_08_records_and_attacks_of_a_random_defence_repeat(name):
    noisy, y = sources()[name], torch.tensor([0, 1, 2, 3])

    def model(x):
        return torch.sin(37 * noisy(x))  # what is added decides the class

    x_adv = [attack("pgd", model, X, y, 0.1, steps=2, progress=False) for _ in range(2)]
    assert torch.equal(*x_adv)
    records = [robust_accuracy(model, ["fgsm"], X, y, eps=0.1, draws=3, progress=False) for _ in range(2)]
    assert records[0] | {"timing": 0} == records[1] | {"timing": 0}


def test_streams_of_this_projects_models_stay_as_they_are():
    model = nn.Module()
    model.generator = torch.Generator()
    model.other = np.random.default_rng(0)
    with seeded_noise(model, 5, CPU):
        draws = torch.rand(1), torch.rand(1, generator=model.generator)
    assert draws[0] == torch.rand(1, generator=torch.Generator().manual_seed(5))
    assert draws[1] == torch.rand(1, generator=torch.Generator().manual_seed(derive_seed(5, "held/0")))


def test_fault_08_noise_out_of_reach_is_noticed():
    def fresh(x):
        return x + np.random.default_rng().normal()

    def clock(x):
        return x + time.perf_counter_ns() % 1_000_003

    counter = iter(range(100))
    for model in (fresh, clock, lambda x: x + next(counter)):
        assert random_state.unseeded_noise(model, X)
    for model in [*sources().values(), lambda x: x * torch.nan, nn.Dropout(0.5).train()]:
        assert not random_state.unseeded_noise(model, X)
        assert not random_state.unseeded_noise(model, X, mode="keep")


class Drifting(nn.Module):
    """Replaces a buffer in any mode, and changes another in place."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(1))
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x):
        self.mean = 0.9 * self.mean + 0.1 * x.mean()
        self.count += 1
        return x


@pytest.mark.parametrize("mode", ["eval", "keep"])
@pytest.mark.parametrize(
    "wrap", [lambda net: net, lambda net: lambda x: net(x), lambda net: nn.Sequential(net).forward]
)
def test_fault_15_networks_are_left_as_they_were(mode, wrap):
    net = nn.Sequential(nn.BatchNorm2d(1), Drifting(), nn.Flatten(), nn.Linear(4, 3)).train()
    net[3].eval()
    model, before = wrap(net), {k: v.clone() for k, v in net.state_dict().items()}
    mean, grad = net[1].mean, torch.ones_like(net[3].weight)
    net[3].weight.grad = grad
    flags = [m.training for m in net.modules()]
    with seeded_noise(model, 0, CPU, mode):
        assert [m.training for m in net.modules()] == (flags if mode == "keep" else [False] * len(flags))
        model(X).sum().backward()
    after = net.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items()) and net[1].mean is mean
    assert [m.training for m in net.modules()] == flags and net[3].weight.grad is grad and bool((grad == 1).all())


@pytest.mark.parametrize("mode", ["eval", "keep"])
def test_fault_15_an_attack_and_an_evaluation_of_a_function_leave_its_network_alone(mode):
    net = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(4, 3)).train()
    before, y = {k: v.clone() for k, v in net.state_dict().items()}, torch.tensor([0, 1, 2, 0])
    attack("pgd", lambda z: net(z), X, y, 0.1, steps=2, progress=False, mode=mode)
    robust_accuracy(lambda z: net(z), ["fgsm"], X, y, eps=0.1, progress=False, mode=mode)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items()) and net.training


def test_lazy_buffers_and_new_ones_survive():
    net = nn.LazyBatchNorm1d()
    with restored_networks(lambda x: net(x)):
        net(X.flatten(1))
    assert net.running_mean.shape == (4,)
