"""The gate between attacks and models: no effort, no gradient, no number and no odd precision passes in silence."""

import warnings
from functools import partial

import pytest
import torch

from lib.attacks.api import REGISTRY
from lib.attacks.checks import outside_ball
from lib.attacks.common import goal_met, margin
from lib.attacks.eot_pgd import eot_pgd
from lib.attacks.gate import AttackWarning, NoGradientWarning, cast_towards
from lib.attacks.pgd import pgd
from lib.models import build_classifier
from tests.attacks.calls import DISTINCT, GRADIENT, SURROGATE, cheap, right, run
from tests.attacks.test_attack_properties import CHEAP, EPS
from tests.controls import Autocast


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("name", DISTINCT)
def test_fault_01_attacks_work_the_same_inside_inference_mode_and_no_grad(mode, name, cnn, points):
    outside = cheap(name, cnn, *points)
    with mode():
        x, y = (t.clone() for t in points)  # inference tensors in inference mode
        options = {"target": (y + 1) % 10} if name == "cw" else {}
        inside = cheap(name, cnn, x, y)
        targeted = cheap(name, cnn, x, y, **options) if options else inside
        assert torch.is_inference_mode_enabled() == (mode is torch.inference_mode) and not torch.is_grad_enabled()
    assert torch.equal(inside, outside) and not inside.is_inference() and targeted.isfinite().all()


def test_fault_01_weights_of_inference_mode_are_refused_with_the_remedy(points):
    with torch.inference_mode():
        model = build_classifier("cnn", width=4, seed=0)
    with pytest.raises(ValueError, match=r"got inference tensors: make or load it outside torch.inference_mode\(\)"):
        run("pgd", model, *points, 0.1, kappa=99.0)


CUT = {
    "no_grad": lambda model: torch.no_grad()(model.__call__),
    "detached images": lambda model: lambda x: model(x.detach()),
    "detached logits": lambda model: lambda x: model(x).detach(),
    "rounded": lambda model: lambda x: model((x * 8).round() / 8),
    "numpy": lambda model: lambda x: model(torch.from_numpy(x.detach().numpy())),
}


@pytest.mark.parametrize("cut", CUT)
@pytest.mark.parametrize("name", GRADIENT)
def test_fault_02_an_attack_without_a_gradient_says_so(name, cut, cnn, points):
    with pytest.warns(NoGradientWarning, match=f"{name} got no gradient: .*BPDA.*square and transfer"):
        assert cheap(name, CUT[cut](cnn), *points).isfinite().all()


def test_fault_02_eot_pgd_and_transfer_say_so_too(cnn, points):
    with pytest.warns(NoGradientWarning, match="eot_pgd got no gradient"):
        eot_pgd(CUT["no_grad"](cnn), *points, 0.1, steps=2)
    with pytest.warns(NoGradientWarning, match="transfer's surrogate got no gradient"):
        cheap("transfer", cnn, *points, surrogate=CUT["no_grad"](cnn))


@pytest.mark.parametrize("name", ["square", "noise", "transfer"])
def test_fault_02_attacks_without_gradients_need_none(name, cnn, points):
    cheap(name, CUT["no_grad"](cnn), *points)  # warnings are errors


def test_fault_02_gradients_that_are_no_numbers_are_said(cnn, points):
    broken = lambda x: cnn(x + 0 * (x - x).sqrt())  # noqa: E731  # 0 * infinity, backwards
    with pytest.warns(NoGradientWarning, match="pgd got no gradient"):
        assert run("pgd", broken, *points, 0.1).isfinite().all()
    half = lambda x: cnn(x + 0 * (x - x.where(x[:, :, :1, 3:4] > 0.5, x - 1)).sqrt())  # noqa: E731
    with pytest.warns(NoGradientWarning, match="pgd got NaN or infinity in .* gradients"):
        run("pgd", half, *points, 0.1)


def test_fault_33_an_answer_that_is_not_finite_is_wrong():
    z, y = (
        torch.tensor([[float("nan"), 1.0], [float("inf"), 0.0], [3.0, -torch.inf], [1.0, 0.0]]),
        torch.zeros(4).long(),
    )
    assert goal_met(z, y).tolist() == goal_met(z, y, kappa=9.0).tolist() == [True, True, True, False]
    assert goal_met(z, y, y).tolist() == [False, False, False, True]
    assert margin(z[3:], y[3:]).item() == 1


def nan_where_attacked(cnn, x):
    """The CNN with NaN for every image that is none of the clean ones."""

    def model(images):
        clean = torch.stack([(image == x).flatten(1).all(1).any() for image in images])
        return cnn(images).where(clean[:, None], torch.nan)

    return model


@pytest.mark.filterwarnings("ignore::lib.attacks.gate.NoGradientWarning")
@pytest.mark.parametrize("name", [name for name in DISTINCT if name not in ("transfer", "fgsm")])
def test_fault_33_no_attack_passes_over_answers_that_are_not_finite(name, cnn, points):
    x, y = points[0][points[1] == 0], points[1][points[1] == 0]  # NaN's argmax is class 0
    model = nan_where_attacked(cnn, x)
    with pytest.warns(AttackWarning, match="were not finite .* count as misclassified"):
        x_adv = cheap(name, model, x, y, **({"steps": 40} if name == "fab-t" else {}))
    assert goal_met(model(x_adv), y).all()


@pytest.mark.filterwarnings("ignore::lib.attacks.gate.NoGradientWarning")
def test_fault_33_eot_pgd_takes_answers_that_are_not_finite_for_the_highest_loss(cnn, points):
    with pytest.warns(AttackWarning, match="were not finite"):
        x_adv = eot_pgd(nan_where_attacked(cnn, points[0]), *points, 0.1, steps=2)
    assert (x_adv != points[0]).flatten(1).any(1).all()


def test_fault_33_clean_answers_that_are_not_finite_are_refused(cnn, points):
    with pytest.raises(ValueError, match="got infinity for 12 of 12 images"):
        run("pgd", lambda x: cnn(x).abs() * torch.inf, *points, 0.1)


def in_place(model):
    """A network that normalises its images in place."""

    def call(x):
        x -= 0.5
        x /= 0.5
        return model(x)

    return call


def in_place_by_data(model):
    def call(x):
        x.data.mul_(0.5)
        return model(x)

    return call


@pytest.mark.parametrize("change", [in_place, in_place_by_data])
@pytest.mark.parametrize("name", ["pgd", "fgsm", "square"])
def test_fault_16_a_model_that_works_in_place_is_refused_and_overwrites_nothing(name, change, cnn, points):
    x, y = (t.clone() for t in points)
    with pytest.raises(ValueError, match=r"expected a model that leaves its images as they are.*x = x - mean"):
        cheap(name, change(cnn), x, y)
    assert torch.equal(x, points[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name, norm", [(name, norm) for name in DISTINCT for norm in REGISTRY[name].norms])
def test_fault_19_half_precision_images(name, norm, dtype, cnn, points):
    x, y = points[0].to(dtype), points[1]
    more = {"surrogate": SURROGATE} if name == "transfer" else {}
    eps, options = EPS[norm], CHEAP.get(name, {}) | more
    x_adv = run(name, cnn, x, y, eps, norm, **options)
    assert x_adv.dtype == dtype and x_adv.min() >= 0 and x_adv.max() <= 1
    assert not outside_ball(x_adv.double(), x.double(), eps, norm).any()
    exact = run(name, cnn, x.float(), y, eps, norm, **options)
    assert right(cnn, x_adv.float(), y) <= right(cnn, exact, y) + 0.13


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fault_19_rounding_towards_the_image_never_leaves_the_ball(dtype):
    rng = torch.Generator().manual_seed(0)
    x = torch.rand(50, 1, 8, 8, generator=rng).to(dtype)
    x[0], x[1] = 0, 1
    for eps in (0.0, 1e-4, 8 / 255, 1.0):
        x_adv = (x.float() + eps * (2 * torch.rand(x.shape, generator=rng) - 1).sign()).clamp(0, 1)
        out = cast_towards(x_adv, x)
        assert ((out.double() - x.double()).abs() <= (x_adv.double() - x.double()).abs()).all()
        assert (
            (out.double() - x_adv.double()).abs().max() <= torch.finfo(dtype).eps and out.min() >= 0 and out.max() <= 1
        )


def as_double(cnn):
    twin = build_classifier("cnn", width=8, seed=0)
    twin.load_state_dict(cnn.state_dict())
    return twin.double().eval()


@pytest.mark.parametrize("name", DISTINCT)
def test_fault_20_autocast_and_other_precisions_of_the_model(name, cnn, points):
    exact, (x, y) = right(cnn, cheap(name, cnn, *points), points[1]), points
    for make in (Autocast, as_double, lambda m: as_double(m).bfloat16(), lambda m: lambda x: as_double(m)(x.double())):
        x_adv = cheap(name, make(cnn), x, y)
        assert x_adv.dtype == torch.float32 and abs(right(cnn, x_adv, y) - exact) <= 0.17
    with torch.autocast("cpu", torch.bfloat16):
        mixed = cheap(name, cnn, x, y)
        assert torch.is_autocast_enabled("cpu")
    assert mixed.dtype == torch.float32 and abs(right(cnn, mixed, y) - exact) <= 0.17
    assert cheap(name, cnn, x.double(), y).dtype == torch.float64


@pytest.mark.parametrize("name, norm", [(name, norm) for name in DISTINCT for norm in REGISTRY[name].norms])
def test_fault_21_images_in_nhwc_order(name, norm, cnn, points):
    """A picture library's n h w c, seen as n c h w without a copy; and a model whose gradient is in that order."""
    x, y = points[0] * torch.tensor([1.0, 0.9, 0.8])[:, None, None], points[1]
    nhwc = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    assert not nhwc.is_contiguous()
    model = lambda x: cnn(x.mean(1, keepdim=True))  # noqa: E731
    turned = lambda x: model(x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2))  # noqa: E731
    more = {"surrogate": model} if name == "transfer" else {}
    options = CHEAP.get(name, {}) | more
    exact = run(name, model, x, y, EPS[norm], norm, **options)
    assert torch.equal(run(name, model, nhwc, y, EPS[norm], norm, **options), exact)
    assert (run(name, turned, nhwc, y, EPS[norm], norm, **options) - exact).abs().max() <= 1


def test_the_gate_leaves_no_warning_and_no_pass_of_its_own(cnn, points):
    seen = []

    def model(x):
        seen.append(len(x))
        return cnn(x)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run("pgd", model, *points, 0.1, steps=2, loss="margin", kappa=99.0)
    assert seen == [12] * 4  # which are wrong anyway, two gradients, the last point
    direct = partial(pgd, cnn, *points, 0.1, steps=2)
    assert torch.equal(direct(), direct())
