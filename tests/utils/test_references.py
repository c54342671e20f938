"""The networks inside any callable are reached."""

import sys
from functools import cache, partial
from types import ModuleType, SimpleNamespace

import numpy as np
import torch
from torch import nn

from lib.utils.references import function_references, reachable, reachable_modules

GLOBAL_NET = nn.Linear(2, 2)


class Plain:
    def __init__(self, net):
        self._net = net

    def __call__(self, x):
        return self._net(x)

    def other(self, x):
        return GLOBAL_NET(x)


def test_networks_are_reached_through_every_kind_of_wrapper():
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    held = nn.Identity()
    held.sampler = lambda x: net(x)
    wrappers = [net, lambda x: net(x), partial(lambda f, x: f(x), net), net.forward, Plain(net), Plain(net).__call__]
    wrappers += [lambda x, f=net: f(x), held, torch.no_grad()(lambda x: net(x)), lambda x: [m(x) for m in (net,)]]
    for model in wrappers:
        assert net[1] in reachable_modules(model), model
    assert GLOBAL_NET in reachable_modules(lambda x: GLOBAL_NET(x))
    assert GLOBAL_NET in reachable_modules(Plain(None).other)


def test_circles_end_and_libraries_are_not_walked():
    loop: list = []
    loop.append(loop)
    assert reachable_modules(lambda x: (loop, torch, np)) == []


def test_a_functions_references():
    k = 3
    names = function_references(lambda x, d=2: np.sum(x) + k + d)
    assert names["np"] is np and names["k"] == 3 and names["default 0"] == 2


class Shared:
    rng = np.random.default_rng(0)

    def helper(self, x):
        return GLOBAL_NET(x) + self.rng.normal()


class Child(Shared):
    __slots__ = ("own",)

    def __call__(self, x):
        return self.helper(x)


def test_fault_08_15_classes_slots_modules_and_caches_are_looked_into(monkeypatch):
    child, module = Child(), ModuleType("a_users_module")
    child.own, module.net = nn.Identity(), nn.Identity()
    monkeypatch.setitem(sys.modules, module.__name__, module)
    space = SimpleNamespace(net=nn.Identity())
    assert {id(child.own), id(GLOBAL_NET), id(Shared.rng)} <= set(map(id, reachable(child)))
    assert Shared.rng in reachable(lambda x: x + Shared.rng.normal()) and Shared.rng in reachable(Shared.rng.normal)
    assert module.net in reachable_modules(lambda x: module.net(x))
    assert space.net in reachable_modules(lambda x: space.net(x))
    assert GLOBAL_NET in reachable_modules(cache(lambda x: GLOBAL_NET(x)))
