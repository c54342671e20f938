"""Random calls of every attack on random models: images in ball and box and no traces, or a clear refusal."""

import random
import warnings

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lib.attacks.api import REGISTRY, attack, attack_options
from lib.attacks.checks import outside_ball
from lib.attacks.gate import AttackWarning
from lib.models import build_classifier
from tests.attacks.test_attack_properties import CHEAP, EPS
from tests.controls import Autocast
from tests.fuzz.common import check_refusal, examples

BASE = build_classifier("cnn", width=4, dropout=0.2, seed=0)
SURROGATE = build_classifier("cnn", width=4, seed=3)
ODD = st.sampled_from([0, -1, 0.0, 1.5, 10.0, float("nan"), float("inf"), "3", None, True, np.bool_(True), [1], 1j])
FEW = st.sampled_from([1, 2, np.int64(2), np.uint8(3), torch.tensor(2)])
SMALL = st.sampled_from([0.1, 0.5, 1, np.float32(0.5), np.float64(0.9), torch.tensor(0.25)])


class Around(nn.Module):
    """A network between two functions."""

    def __init__(self, model, before=lambda x: x, after=lambda z: z):
        super().__init__()
        self.model, self.before, self.after = model, before, after

    def forward(self, x):
        return self.after(self.model(self.before(x)))


def sometimes_nan(z):
    """Answer NaN where the first logit is high."""
    return z.where(z[:, :1] < z.detach()[:, :1].median() + 1e-3, torch.nan)


WRAPPERS = {
    "plain": lambda m: m,
    "function": lambda m: lambda x: m(x),
    "double": lambda m: build_classifier("cnn", width=4, seed=0).double(),
    "bfloat16": lambda m: build_classifier("cnn", width=4, seed=0).bfloat16(),
    "autocast": Autocast,
    "detached": lambda m: Around(m, after=lambda z: z.detach()),
    "no_grad": lambda m: torch.no_grad()(m.__call__),
    "NaN": lambda m: Around(m, after=sometimes_nan),
    "NaN everywhere": lambda m: Around(m, after=lambda z: z * torch.nan),
    "tuple": lambda m: Around(m, after=lambda z: (z, z)),
    "dict": lambda m: lambda x: {"logits": m(x)},
    "numpy": lambda m: lambda x: m(x).detach().float().numpy(),
    "None": lambda m: lambda x: None,
    "in place": lambda m: Around(m, before=lambda x: x.mul_(0.5)),
    "constant": lambda m: Around(m, after=lambda z: 0 * z + torch.arange(10)),
    "equal": lambda m: Around(m, after=lambda z: 0 * z),
    "one class": lambda m: Around(m, after=lambda z: z[:, :1]),
    "two classes": lambda m: Around(m, after=lambda z: z[:, :2]),
    "three classes": lambda m: Around(m, after=lambda z: z[:, :3]),
    "squeezed": lambda m: lambda x: m(x).squeeze(),
    "strided": lambda m: Around(m, before=lambda x: x.permute(0, 3, 2, 1).contiguous().permute(0, 3, 2, 1)),
    "NaN gradient": lambda m: Around(m, before=lambda x: x + 0 * x.sqrt()),
    "random": lambda m: Around(m, after=lambda z: z + torch.randn(z.shape) + random.random()),
    "probabilities": lambda m: Around(m, after=lambda z: z.softmax(1)),
}


@st.composite
def calls(draw):
    """A call of `attack`: name, norm, radius, options, model, images, labels and the state around it."""
    name = draw(st.sampled_from(list(REGISTRY)))
    options = dict(CHEAP.get(name, {})) | ({"surrogate": SURROGATE} if name == "transfer" else {})
    for option in draw(st.lists(st.sampled_from([*attack_options(name), "none such"]), max_size=2, unique=True)):
        default = attack_options(name).get(option)
        usual = FEW if isinstance(default, int) and not isinstance(default, bool) else SMALL
        options[option] = draw(st.one_of(usual, usual, usual, ODD))
    norm = draw(st.sampled_from([*REGISTRY[name].norms] * 10 + [None, "L1"]))
    usual = EPS.get(norm or REGISTRY[name].norms[0], 0.1)
    eps = draw(st.sampled_from([usual] * 20 + [0, np.float32(usual), "8/255", None, -0.1, float("nan"), True]))
    x = torch.rand(draw(st.integers(0, 4)), 1, 8, 8, generator=torch.Generator().manual_seed(draw(st.integers(0, 9))))
    dtype = draw(st.sampled_from([torch.float32] * 3 + [torch.float16, torch.bfloat16, torch.float64]))
    change = draw(st.sampled_from(["none"] * 16 + ["permuted"] * 4 + ["permuted", "numpy", "above 1", "flat", "NaN"]))
    return name, eps, norm, options, draw(st.sampled_from(list(WRAPPERS))), x.to(dtype), change


CHANGES = {
    "none": lambda x: x,
    "permuted": lambda x: x.permute(0, 1, 3, 2),
    "numpy": lambda x: x.float().numpy(),
    "above 1": lambda x: x * 255,
    "flat": lambda x: x.flatten(1),
    "NaN": lambda x: x * torch.nan,
}


@examples(120)
@given(
    call=calls(),
    labels=st.sampled_from([torch.int64] * 20 + [torch.int32, torch.float32]),
    train=st.booleans(),
    inside=st.sampled_from([torch.enable_grad, torch.no_grad, torch.inference_mode]),
    autocast=st.sampled_from([False, False, True]),
    mode=st.sampled_from(["eval", "keep"] * 8 + ["train"]),
)
def test_calls_end_in_images_of_the_ball_or_in_a_clear_refusal(call, labels, train, inside, autocast, mode):
    name, eps, norm, options, wrapper, x, change = call
    BASE.train(train)
    SURROGATE.eval()
    x, y = CHANGES[change](x), (torch.arange(len(x)) % 2).to(labels)
    before, model = torch.as_tensor(x).clone(), WRAPPERS[wrapper](BASE)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist()  # beartype itself draws from `random`
    flags = [m.training for m in BASE.modules()]
    with inside(), torch.autocast("cpu", torch.bfloat16, enabled=autocast), warnings.catch_warnings():
        warnings.simplefilter("ignore", AttackWarning)
        modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")
        try:
            out = attack(name, model, x, y, eps, norm, mode=mode, progress=False, **options)
        except (ValueError, TypeError) as error:
            check_refusal(error)
            out = None
        assert modes == (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"))
    assert torch.equal(torch.as_tensor(x).nan_to_num(-1), before.nan_to_num(-1))
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == np.random.get_state()[1].tolist() and flags == [m.training for m in BASE.modules()]
    assert all(p.grad is None for p in (*BASE.parameters(), *SURROGATE.parameters()))
    if out is not None:
        assert out.shape == x.shape and out.dtype == x.dtype and not out.requires_grad
        assert out.numel() == 0 or (out.isfinite().all() and out.min() >= 0 and out.max() <= 1)
        ball = None if eps is None else float(eps)
        assert not outside_ball(out.double(), x.double(), ball, norm or REGISTRY[name].norms[0]).any()
        assert (mode != "train" and wrapper not in ("tuple", "dict", "numpy", "None", "one class")) or not len(x)
