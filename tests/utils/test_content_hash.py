"""Everything that decides how an object behaves is in its hash, or the object is refused by name."""

import collections
import copy
import enum
import io
import itertools
import os
import random
import subprocess
import sys
import threading
import time
import types
import weakref
from functools import cached_property, lru_cache, partial

import numpy as np
import pytest
import torch
from torch import nn

from lib.distillation.adversarial import robust_loss
from lib.models import build_classifier
from lib.utils.content_hash import Unhashable, content_hash
from lib.utils.files import ROOT

MODEL = """
import torch
from torch import nn
SCALE = 1.0
def helper(z):
    return z * SCALE
class Net(nn.Module):
    factor = 1.0
    def __init__(self):
        super().__init__()
        self.body, self._temperature = nn.Linear(2, 2), 1.0
        nn.init.ones_(self.body.weight), nn.init.zeros_(self.body.bias)
    @property
    def shift(self):
        return 0.0
    @staticmethod
    def rescale(z):
        return z * 1.0
    def inner(self, z):
        return helper(self.rescale(z)) / self._temperature + self.shift
    def forward(self, x):
        return self.inner(self.body(x)) * self.factor
"""


def define(source: str = MODEL) -> dict:
    """Runs a notebook's cell and returns its variables."""
    cell: dict = {"__name__": "__main__"}
    exec(compile(source, "<cell>", "exec"), cell)
    return cell


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("self.inner(self.body(x)) * self.factor", "-self.inner(self.body(x)) * self.factor"),
        ("/ self._temperature", "* self._temperature"),  # another method
        ("return z * SCALE", "return z / SCALE"),  # a function that a method reads
        ("SCALE = 1.0", "SCALE = 2.0"),
        ("factor = 1.0", "factor = 2.0"),
        ("_temperature = nn.Linear(2, 2), 1.0", "_temperature = nn.Linear(2, 2), 2.0"),
        ("return 0.0", "return 1.0"),  # a property
        ("return z * 1.0", "return z * 3.0"),  # a static method
    ],
)
def test_fault_04_an_edited_cell_makes_another_hash(old, new):
    assert MODEL.count(old) == 1
    before, again, after = (
        define(text)["Net"]() for text in (MODEL, "# a comment\n\n" + MODEL, MODEL.replace(old, new))
    )
    assert content_hash(before) == content_hash(again) != content_hash(after)
    assert content_hash(before.inner) != content_hash(after.inner)
    assert content_hash(lambda x: before(x)) != content_hash(lambda x: after(x))


def change(model: nn.Module, how: str) -> None:
    """Changes what a network computes, in one of many ways."""
    if how == "private":
        model._temperature = 9.0
    elif how == "forward":
        model.forward = lambda x: x
    elif how == "inner forward":
        model.body.forward = lambda x: x
    elif how == "hook":
        model.body.register_forward_hook(lambda module, inputs, z: -z)
    elif how == "pre-hook":
        model.register_forward_pre_hook(lambda module, inputs: (-inputs[0],))
    elif how == "gradient":
        model.body.weight.register_hook(lambda g: -g)
    elif how == "buffer":
        model.register_buffer("b", torch.ones(1))
    elif how == "mode":
        model.eval()
    elif how == "frozen":
        model.requires_grad_(False)
    elif how == "tied":
        model.other = nn.Linear(2, 2, bias=False)
        model.other.weight = model.body.weight


@pytest.mark.parametrize(
    "how", ["private", "forward", "inner forward", "hook", "pre-hook", "gradient", "buffer", "mode", "frozen", "tied"]
)
def test_fault_04_whatever_a_network_has_counts(how):
    a, b = (define()["Net"]() for _ in range(2))
    assert content_hash(a) == content_hash(b)
    change(b, how)
    assert content_hash(a) != content_hash(b) == content_hash(b)
    c = define()["Net"]()
    c.register_forward_hook(print).remove()  # torch numbers hooks; the numbers do not count
    change(c, how)
    assert content_hash(b) == content_hash(c)


def test_fault_04_a_method_that_replaces_a_librarys_counts(monkeypatch):
    net = nn.Sequential(nn.ReLU())
    before = content_hash(net)
    monkeypatch.setattr(nn.ReLU, "forward", lambda self, x: x.relu() * 2)
    assert content_hash(net) != before


def test_tied_weights_are_no_equal_ones():
    tied, equal = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    tied[1].weight = tied[0].weight
    equal.load_state_dict(tied.state_dict())
    assert content_hash(tied) != content_hash(equal)
    net = nn.Linear(2, 2)
    pairs = [(net, net), (net, copy.deepcopy(net))]
    assert len({content_hash(pair) for pair in pairs}) == 1  # what is only evaluated
    assert len({content_hash(pair, sharing=True) for pair in pairs}) == 2  # what is trained: the teacher is the student


class Slotted:
    __slots__ = ("kind",)

    def __init__(self, kind):
        self.kind = kind


class Listed(list):
    mode = 0


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


class Lazy:
    def __init__(self, k):
        self._k = k

    @cached_property
    def value(self):
        return self._k


class Texts(collections.UserDict):
    pass


def listed(mode: int, *entries: int) -> Listed:
    out = Listed(entries)
    out.mode = mode
    return out


NET = nn.Linear(1, 1)
PAIRS = {
    "type": (1, True),
    "number": (1, 1.0),
    "zero": (0.0, -0.0),
    "text": (np.array(["a", "b"]), np.array(["a", "c"])),
    "objects": (np.array([{"a": 1}, None], dtype=object), np.array([{"a": 2}, None], dtype=object)),
    "array": (np.zeros(2), np.zeros((2, 1))),
    "dtype": (np.zeros(2, np.int32), np.zeros(2, np.float32)),
    "set": ({1, 2}, {1, 3}),
    "enum": (Colour.RED, Colour.BLUE),
    "slots": (Slotted(1), Slotted(2)),
    "list": (listed(0, 1), listed(0, 2)),
    "list's attribute": (listed(0, 1), listed(1, 1)),
    "deque": (collections.deque([1]), collections.deque([2])),
    "dict": (collections.defaultdict(int, a=1), collections.defaultdict(float, a=1)),
    "library's subclass": (Texts(a=1), Texts(a=2)),
    "partial": (partial(torch.clamp, max=1), partial(torch.clamp, max=2)),
    "function in C": (torch.relu, torch.sigmoid),
    "method in C": ([1].count, [2].count),
    "library's function": (nn.functional.relu, nn.functional.gelu),
    "class": (nn.ReLU, nn.GELU),
    "module": (np, torch),
    "random": (random.Random(0), random.Random(1)),
    "numpy's generator": (np.random.default_rng(0), np.random.default_rng(1)),
    "RandomState": (np.random.RandomState(0), np.random.RandomState(1)),
    "torch's generator": (torch.Generator().manual_seed(0), torch.Generator().manual_seed(1)),
    "cached": (lru_cache(lambda x: x + 1), lru_cache(lambda x: x + 2)),
    "lazy": (Lazy(1), Lazy(2)),
    "weak": (weakref.ref(NET), weakref.ref(NET.weight)),
    "bfloat16": (torch.zeros(1, dtype=torch.bfloat16), torch.ones(1, dtype=torch.bfloat16)),
    "complex": (torch.zeros(1, dtype=torch.complex64).conj(), torch.full((1,), 1j).conj()),
    "scalar": (np.float64(1), np.float64(2)),
    "iterator": (iter([1]), iter([2])),
    "no gradient": (torch.no_grad()(lambda x: x), torch.no_grad()(lambda x: -x)),
    "loss": (robust_loss("trades", eps=0.1, epochs=2), robust_loss("trades", eps=0.1, epochs=2, beta=5.0)),
    "default": (lambda x, k=1: x + k, lambda x, k=2: x + k),
    "keyword": (lambda x, *, k=1: x + k, lambda x, *, k=2: x + k),
    "constant set": (lambda x: x in {1, 2}, lambda x: x in {1, 3}),
    "inner function": (lambda x: [i + 1 for i in x], lambda x: [i + 2 for i in x]),
}


@pytest.mark.parametrize("name", PAIRS)
def test_fault_25_objects_of_every_kind_differ_by_content(name):
    a, b = PAIRS[name]
    assert content_hash(a) == content_hash(a) != content_hash(b)
    if name not in ("module", "iterator", "weak", "no gradient", "loss", "cached"):
        assert content_hash(copy.deepcopy(a)) == content_hash(a)


def test_fault_25_modules_and_text_in_a_model_are_hashed_at_once():
    names, module, begin = np.array(["cat", "dog"]), np, time.perf_counter()
    net = build_classifier("resnet18", in_channels=3, seed=0)
    net.names, net.module = names, torch
    first = content_hash(lambda x: module.asarray(net(x)))
    assert time.perf_counter() - begin < 3  # it was 11 to 14 seconds, then a TypeError
    names[0] = "cow"
    assert content_hash(lambda x: module.asarray(net(x))) != first


def test_a_users_module_counts_by_its_file_and_by_what_is_read_of_it(tmp_path, monkeypatch):
    (tmp_path / "own_helpers.py").write_text("SCALE = 1\ndef f(x):\n    return SCALE * x\n")
    monkeypatch.syspath_prepend(tmp_path)
    import own_helpers

    def model(x):
        return own_helpers.f(x)

    def lazy(x):
        import own_helpers as late

        return late.f(x)

    try:
        before = content_hash(model), content_hash(lazy), content_hash(own_helpers)
        own_helpers.SCALE = 2
        assert content_hash(model) != before[0] and content_hash(lazy) != before[1]
        (tmp_path / "own_helpers.py").write_text("SCALE = 3\n")
        assert content_hash(own_helpers) != before[2]
    finally:
        del sys.modules["own_helpers"]


@pytest.mark.parametrize(
    ("thing", "kind"),
    [
        (threading.Lock(), "lock"),
        (threading.local(), "_local"),
        (sys.stdout.__class__(io.BytesIO()), ""),
        ((i for i in range(3)), "generator"),
        (torch.jit.ScriptModule(), "ScriptModule"),
        (torch.eye(2).to_sparse(), "Tensor"),
        (torch.empty(1, device="meta"), "Tensor"),
        (sys._getframe(), "frame"),
    ],
)
def test_fault_04_what_cannot_be_read_is_refused_by_name(thing, kind):
    holder = types.SimpleNamespace()
    for place, value in (("model", thing), ("model.a", {"a": thing}), ("model.thing", lambda x: (thing, x))):
        with pytest.raises(Unhashable, match=rf"got a {kind}\w* as {place}.*, whose state cannot be hashed: ") as error:
            content_hash(value, "model")
        assert "\n" not in str(error.value)
    holder.inner = [thing]
    with pytest.raises(Unhashable, match="inner"):
        content_hash(holder)


def test_circles_end_and_depth_is_refused():
    loop: list = [1]
    loop.append(loop)
    other: list = [1]
    other.append(other)
    assert content_hash(loop) == content_hash(other) != content_hash([1, [1]])
    for _ in range(10_000):
        loop = [loop]
    with pytest.raises(Unhashable, match="more levels"):
        content_hash(loop)


PROCESS = """
from lib.utils.content_hash import content_hash
from lib.diffusion.network import build_unet
from lib.models import build_classifier
from lib.distillation.consistency import ConsistencyScalings
objects = [{"a", "b", "c"}, build_unet(1, 8, (8, 8), seed=0), ConsistencyScalings(1.0, 0.5), lambda x: x in {"a", "b"}]
print(content_hash(objects))
"""


def test_equal_in_every_process():
    runs = [
        subprocess.run(
            [sys.executable, "-c", PROCESS],
            env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in "12"
    ]
    assert runs[0] == runs[1] and len(runs[0].strip()) == 64


def test_every_weight_counts_whatever_came_before():
    """One flipped bit anywhere, in any of many orders of the same objects."""
    rng = torch.Generator().manual_seed(0)
    net = build_classifier("cnn", width=4, seed=0)
    seen = {content_hash(net)}
    for (_, p), _ in zip(itertools.cycle(net.named_parameters()), range(20)):
        p.data.view(torch.int32).view(-1)[torch.randint(p.numel(), (1,), generator=rng)] ^= 1
        seen.add(content_hash(net))
    assert len(seen) == 21
