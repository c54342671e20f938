"""Random plans, settings and models through `robust_accuracy`: a right record, or a clear refusal."""

import json

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from lib.attacks.api import REGISTRY, attack_options
from lib.evaluation.robust_accuracy import robust_accuracy
from lib.models import build_classifier
from tests.controls import BROKEN
from tests.fuzz.common import check_refusal, examples

NET = build_classifier("cnn", width=4, seed=0).eval()
NUMBERS = st.sampled_from([0, 1, 2, 3, -1, 2.0, 0.5, 0.0, "1", None, True, float("nan"), float("inf"), np.int64(2)])
EPS = st.sampled_from([0.1, 0.3, 0, 1, None, -0.1, "8/255", float("nan"), np.float32(0.1), torch.tensor(0.1)])
NAMES = st.sampled_from([*REGISTRY, "pgdd", "", 3, None])
OPTIONS = st.dictionaries(
    st.sampled_from(["steps", "restarts", "queries", "targets", "eot", "draws", "eps", "norm", "target", "batch_size"]),
    st.one_of(NUMBERS, st.sampled_from(["L2", "Linf", "L0"])),
    max_size=3,
)


def effort(name):
    """Returns options by which an attack of the registry ends soon."""
    small = {
        "steps": 2,
        "queries": 3,
        "targets": 1,
        "eot": 1,
        "searches": 1,
        "draws": 3,
        "surrogate": NET,
        "gamma": 0.03,
    }
    return {k: v for k, v in small.items() if name in REGISTRY and k in attack_options(name)}


@st.composite
def plans(draw):
    """Draws lists and dicts of attacks, most of them valid."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.sampled_from(["pgd", None, 3, ["pgd", "pgd"], [], {}, {"a": "pgd"}, {"clean": {"name": "pgd"}}]))
    plan = {}
    for label in draw(st.lists(st.sampled_from("abcd"), min_size=1, max_size=2, unique=True)):
        name = draw(NAMES)
        entry = {"name": name} | (effort(name) if isinstance(name, str) else {})
        plan[label] = entry | (draw(OPTIONS) if draw(st.booleans()) else {})
    return plan


def nan_sometimes(model):
    return lambda x: model(x).masked_fill((x.mean((1, 2, 3)) > 0.52)[:, None], float("nan"))


WRAPPERS = {
    "plain": lambda m: m,
    "lambda": lambda m: lambda x: m(x),
    "tuple": lambda m: lambda x: (m(x), x),
    "double": lambda m: lambda x: m(x).double(),
    "labels": lambda m: lambda x: m(x).argmax(1),
    "one": lambda m: lambda x: m(x)[:, :1],
    "nan": nan_sometimes,
    "numpy noise": lambda m: lambda x: m(x) + torch.from_numpy(np.random.randn(len(x), 10)).float(),
    **BROKEN,
}


@examples(60)
@given(
    plans(),
    st.sampled_from(sorted(WRAPPERS)),
    EPS,
    st.sampled_from(["Linf", "Linf", "L2", "L0", "L3", None]),
    st.sampled_from([1, 1, 2, 0, "2"]),
    st.sampled_from([3, 8, 0, 2.5]),
)
def test_a_record_is_right_or_refused(plan, wrapper, eps, norm, draws, batch_size):
    x = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    x = (16 * x).round() / 16
    y = NET(x).argmax(1)
    y[0] = (y[0] + 1) % 10
    settings = {"eps": eps, "norm": norm, "draws": draws, "batch_size": batch_size, "progress": False}
    model = WRAPPERS[wrapper](NET)
    try:
        record = robust_accuracy(model, plan, x, y, **settings)
    except (ValueError, TypeError) as error:
        check_refusal(error)
        return
    again = robust_accuracy(model, plan, x, y, **settings)
    assert {k: v for k, v in record.items() if k != "timing"} == {k: v for k, v in again.items() if k != "timing"}
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert isinstance(plan, list | tuple | dict) and norm in ("Linf", "L2", "L0") and draws in (1, 2)
    assert record["robust"]["accuracy"] <= record["clean"]["accuracy"] <= 1
    text = " ".join(record["warnings"])
    for label, row in record["attacks"].items():
        lost = record["not_finite"][label] if not row["own_ball"] and draws == 1 else 0
        assert row["accuracy"] <= 1 - lost / 5 + 1e-9
        if record["not_finite"][label]:
            assert "not finite" in text
        if row["no_gradient"] and row["accuracy"] > 0:
            assert f"{label} got no gradient" in text
    assert wrapper not in ("tuple", "labels", "one")
