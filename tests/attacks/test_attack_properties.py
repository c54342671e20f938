"""What every registered attack promises, for any input: ball, box, dtype, determinism, no traces, no batch effects."""

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import nn

from lib.attacks.api import REGISTRY, attack
from lib.attacks.checks import perturbation_norm
from lib.models import build_classifier

CHEAP = {  # options that keep an attack short here
    "pgd": {"steps": 4, "restarts": 2},
    "eotpgd": {"steps": 3, "eot": 2},
    "apgd-ce": {"steps": 6},
    "apgd-dlr": {"steps": 6},
    "apgd-t": {"steps": 4, "targets": 3},
    "fab-t": {"steps": 3, "targets": 3},
    "square": {"queries": 15},
    "autoattack": {"steps": 3, "targets": 2, "queries": 10},
    "autoattack-rand": {"steps": 4, "eot": 2},
    "noise": {"draws": 5},
    "transfer": {"steps": 4, "confidence": 1.0},
    "cw": {"steps": 15, "searches": 3},
    "deepfool": {"steps": 8},
    "jsma-f": {"targets": 2},
    "jsma-z": {"targets": 2},
}
CASES = [(name, norm) for name, entry in REGISTRY.items() for norm in entry.norms]
EPS = {"Linf": 0.08, "L2": 0.5, "L0": 6}
few = settings(max_examples=3, deadline=None, phases=[Phase.generate], database=None)  # shrinking takes minutes


@pytest.fixture(scope="module")
def models(shared_cnn):
    """The CNN, one with dropout and a frozen layer to keep a watch on, and a surrogate."""
    watched = build_classifier("cnn", width=8, dropout=0.2, seed=0)
    watched.load_state_dict(shared_cnn.state_dict())
    return shared_cnn, watched, build_classifier("cnn", width=4, seed=3)


def run(name, norm, model, x, y, surrogate, seed=0, **options):
    options = CHEAP.get(name, {}) | ({"surrogate": surrogate} if name == "transfer" else {}) | options
    eps = options.pop("eps", EPS[norm])
    return attack(name, model, x, y, eps, norm, torch.Generator().manual_seed(seed), progress=False, **options)


def batch(data, digits, most=12):
    """A few digits, in float32 or float64, some of them random images at the ends of the range."""
    x, y = digits
    rows = data.draw(st.lists(st.integers(1297, 1796), min_size=1, max_size=most, unique=True))
    x = x[rows].to(data.draw(st.sampled_from([torch.float32, torch.float64])))
    if data.draw(st.booleans()):
        x[0] = x[0].round()
    return x, y[rows]


@pytest.mark.parametrize("name, norm", CASES)
@few
@given(data=st.data())
def test_ball_box_dtype_and_no_traces(name, norm, digits, models, data):
    _, model, surrogate = models
    x, y = batch(data, digits)
    top = {"Linf": 1.0, "L2": 4.0, "L0": 12.0}[norm]
    eps = data.draw(st.sampled_from([0.0, top]) | st.floats(2 if norm == "L0" else 0, top))
    double = x.dtype == torch.float64
    for module in (model, surrogate):
        module.double() if double else module.float()
        module.train(data.draw(st.booleans()))
    model[1].training = data.draw(st.booleans())
    weight = next(model.parameters())
    weight.grad = torch.ones_like(weight) if data.draw(st.booleans()) else None
    flags = [m.training for m in (*model.modules(), *surrogate.modules())]
    before = [x.clone(), y.clone(), *(p.detach().clone() for p in model.parameters())]
    grad, state = weight.grad, torch.get_rng_state()
    x_adv = run(name, norm, model, x, y, surrogate, eps=eps)
    assert x_adv.shape == x.shape and x_adv.dtype == x.dtype and not x_adv.requires_grad
    assert x_adv is not x and x_adv.isfinite().all() and x_adv.min() >= 0 and x_adv.max() <= 1
    assert (perturbation_norm(x_adv, x, norm) <= eps * (1 + 1e-5) + 1e-6).all()
    assert flags == [m.training for m in (*model.modules(), *surrogate.modules())]
    assert weight.grad is grad and (grad is None or (grad == 1).all())
    assert all(p.grad is None for p in [*model.parameters()][1:]) and all(p.requires_grad for p in model.parameters())
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(before, [x, y, *model.parameters()]))
    with torch.no_grad():
        wrong = model.eval()(x).argmax(1) != y
    assert torch.equal(x_adv[wrong], x[wrong])


@pytest.mark.parametrize("name, norm", CASES)
@few
@given(data=st.data())
def test_deterministic_with_a_generator(name, norm, digits, models, data):
    """The seed decides the result, also for a model with dropout, whatever the global random state is."""
    _, model, surrogate = (m.float() for m in models)
    x, y = batch(data, digits)
    model.train()
    seed = data.draw(st.integers(0, 2**40))
    with torch.random.fork_rng():
        results = []
        for _ in range(2):
            torch.rand(data.draw(st.integers(1, 9)))
            results.append(run(name, norm, model, x.float(), y, surrogate, seed, mode="keep"))
    assert torch.equal(*results)


@pytest.mark.parametrize("name, norm", CASES)
@few
@given(data=st.data())
def test_an_image_s_result_does_not_depend_on_its_batch(name, norm, digits, models, data):
    """In float64, where rounding in the forward pass decides nothing: other batch size, order and company."""
    model, surrogate = models[0].double().eval(), models[2].double().eval()
    x, y = batch(data, digits)
    x = x.double()
    whole = run(name, norm, model, x, y, surrogate)
    order = torch.tensor(data.draw(st.permutations(range(len(x)))))[: data.draw(st.integers(1, len(x)))]
    part = run(name, norm, model, x[order], y[order], surrogate, batch_size=data.draw(st.integers(1, 5)))
    models[0].float()
    assert torch.equal(model(part.float()).argmax(1), model(whole[order].float()).argmax(1))
    torch.testing.assert_close(part, whole[order], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["pgd", "apgd-ce", "square", "noise"])
def test_other_seeds_give_other_points(name, digits, models):
    model, surrogate = models[0].float().eval(), models[2].float()
    x, y = (t[-30:] for t in digits)
    a, b = (run(name, "Linf", model, x, y, surrogate, seed, eps=0.01) for seed in (0, 1))
    assert not torch.equal(a, b)


class Random(nn.Module):
    """A random defence: logits with noise of the global generator."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x) + torch.randn(len(x), 10)


@pytest.mark.parametrize("name, norm", CASES)
def test_stochastic_models_are_attacked_and_their_noise_is_the_seeds(name, norm, digits, models):
    model, surrogate = Random(models[0].float().eval()), models[2].float()
    x, y = (t[-20:] for t in digits)
    state = torch.get_rng_state()
    a, b = (run(name, norm, model, x, y, surrogate, 5, batch_size=7) for _ in range(2))
    assert torch.equal(a, b) and torch.equal(state, torch.get_rng_state())
