"""The classic losses against hand computations, limits and reductions."""

import decimal
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lib.distillation.adversarial import kl_divergence, robust_loss
from lib.distillation.consistency import image_distance
from lib.distillation.defensive import temperature_loss
from lib.distillation.soft_targets import classic_loss, hard_label_smoothing_loss, kd_loss, soft_targets
from lib.models import predict_logits


def test_soft_targets_by_hand():
    z_s, z_t = torch.tensor([[0.0, 0.0], [2.0, 0.0]]), torch.tensor([[math.log(9), 0.0], [0.0, 0.0]])
    first = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)  # at T = 2, log 9 becomes odds of 3
    q = 1 / (1 + math.exp(-1.0))
    second = 0.5 * math.log(0.5 / q) + 0.5 * math.log(0.5 / (1 - q))
    assert soft_targets(z_s, z_t, 2.0).item() == pytest.approx(4 * (first + second) / 2, rel=1e-5)
    each = soft_targets(z_s, z_t, 2.0, reduction="none")
    torch.testing.assert_close(each, torch.tensor([4 * first, 4 * second], dtype=torch.float32))


def test_kd_loss_weighs_its_two_terms_and_reduces_to_each():
    z_s, z_t = torch.randn(2, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = torch.tensor([0, 3, 6, 1, 1])
    soft, hard = soft_targets(z_s, z_t, 4.0), F.cross_entropy(z_s, y)
    torch.testing.assert_close(kd_loss(z_s, z_t, y, T=4.0, alpha=0.9), 0.9 * soft + 0.1 * hard)
    torch.testing.assert_close(kd_loss(z_s, z_t, y, T=4.0, alpha=0.0), hard)
    assert kd_loss(z_t, z_t, y, T=4.0, alpha=1.0).item() == pytest.approx(0, abs=1e-12)


def test_high_temperature_is_logit_matching():
    z_s, z_t = torch.randn(2, 6, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    centred = (z_s - z_s.mean(1, keepdim=True)) - (z_t - z_t.mean(1, keepdim=True))
    limit = centred.square().sum(1).mean() / (2 * 10)
    torch.testing.assert_close(soft_targets(z_s, z_t, 1e4), limit, rtol=1e-3, atol=0)


def test_the_gradient_keeps_its_size_when_the_temperature_changes():
    z_s, z_t = torch.randn(2, 64, 10, generator=torch.Generator().manual_seed(2))
    norms = [
        torch.autograd.grad(soft_targets(z.requires_grad_(), z_t, T), z)[0].norm().item()
        for T in (4.0, 20.0)
        for z in [z_s.clone()]
    ]
    assert 0.5 < norms[0] / norms[1] < 2


@pytest.mark.parametrize(
    ("T", "alpha", "message"), [(0.0, 0.5, "number > 0, got 0.0"), (2.0, 1.5, "alpha to be .* <= 1, got 1.5")]
)
def test_bad_settings_are_named(T, alpha, message):
    z = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=message):
        kd_loss(z, z, torch.tensor([0, 1]), T=T, alpha=alpha)


def test_losses_for_the_loop_are_the_functions_above():
    model, x, y = nn.Flatten(), torch.randn(4, 3, 1, 1), torch.tensor([0, 1, 2, 0])
    z_t = torch.randn(4, 3)
    state = {"generator": torch.Generator(), "epoch": 0}
    assert classic_loss(2.0, 0.3)(model, x, y, z_t, **state)[0] == kd_loss(x.flatten(1), z_t, y, T=2.0, alpha=0.3)
    assert hard_label_smoothing_loss(0.1)(model, x, y, **state)[0] == F.cross_entropy(
        x.flatten(1), y, label_smoothing=0.1
    )


def test_predicted_logits_are_no_probabilities_nor_nan_and_the_mode_is_restored():
    x = torch.rand(5, 1, 2, 2)
    net = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(4, 3))
    net[1].eval()
    z = predict_logits(net, x, batch_size=2)
    assert (net.training, net[1].training) == (True, False)
    torch.testing.assert_close(z, net[2](x.flatten(1)).detach())
    with pytest.raises(ValueError, match="expected logits, got probabilities"):
        predict_logits(nn.Sequential(net, nn.Softmax(1)), x)
    net[2].weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="the teacher answers with NaN"):
        predict_logits(net, x)


@pytest.fixture
def logits():
    """Logits (64, 10) of a student and a teacher whose divergence's limit is about 8."""
    return 9 * torch.randn(2, 64, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("shape", [(8, 1), (1, 10), (8, 12), (8,), (8, 10, 1)])
def test_fault_12_logits_of_other_shapes_are_refused(shape):
    z, y, other = torch.zeros(8, 10), torch.arange(8), torch.zeros(shape)
    for call in (
        lambda: kd_loss(z, other, y, T=2.0, alpha=0.5),
        lambda: soft_targets(z, other, 2.0),
        lambda: kl_divergence(other, z),
        lambda: temperature_loss(2.0)(nn.Identity(), z, other, generator=torch.Generator(), epoch=0),
    ):
        with pytest.raises(ValueError, match=r"^expected the teacher's logits to (have|be) .*got [^\n]*$|labels"):
            call()


def test_fault_12_labels_of_no_class_are_refused():
    z = torch.zeros(3, 10)
    for y in ([0, 1], [0, 1, 10], [0, 1, -100], [[0], [1], [2]]):  # -100 is left out by torch without a word
        with pytest.raises(ValueError, match="expected labels"):
            kd_loss(z, z, torch.tensor(y), T=2.0, alpha=0.5)
    with pytest.raises(ValueError, match="expected labels"):
        hard_label_smoothing_loss()(nn.Identity(), z, torch.tensor([0, 1, -100]), generator=torch.Generator(), epoch=0)


def test_fault_12_networks_of_other_classes_are_not_mixed_under_attack():
    """Their logits side by side would be cut in two equal halves."""
    x, y = torch.rand(2, 1, 2, 2), torch.tensor([0, 1])
    student, teacher = (nn.Sequential(nn.Flatten(), nn.Linear(4, k)) for k in (12, 8))
    loss = robust_loss("adaad", teacher, eps=0.1, epochs=1, steps=1)
    with pytest.raises(ValueError, match=r"shape \(2, 12\), got \(2, 8\)"):
        loss(student, x, y, generator=torch.Generator(), epoch=0)


def test_fault_12_images_of_other_channels_are_not_broadcast_in_a_loss():
    a, b = torch.zeros(2, 3, 4, 4), torch.zeros(2, 1, 4, 4)
    for kind in ("l2", "huber"):
        with pytest.raises(ValueError, match="expected two tensors of one shape"):
            image_distance(kind)(a, b)


@pytest.mark.parametrize(
    ("T", "dtype"), [(100.0, torch.bfloat16), (100.0, torch.float16), (1e4, torch.float32), (1e8, torch.float32)]
)
def test_fault_14_no_digits_cancel_in_low_precision_or_at_high_temperature(logits, T, dtype):
    z_s, z_t = (z.to(dtype) for z in logits)
    exact = []
    for s, t in zip(z_s.tolist(), z_t.tolist(), strict=True):
        with decimal.localcontext(prec=60):
            p, q = ([(decimal.Decimal(v) / decimal.Decimal(T)).exp() for v in row] for row in (t, s))
            p, q = ([v / sum(row) for v in row] for row in (p, q))
            exact.append(float(sum(a * (a.ln() - b.ln()) for a, b in zip(p, q, strict=True))) * T**2)
    each = soft_targets(z_s, z_t, T, reduction="none")
    torch.testing.assert_close(each, torch.tensor(exact), rtol=1e-5, atol=0)
    assert each.dtype == torch.float32 and soft_targets(z_s, z_t, T).item() == pytest.approx(each.mean().item())
    z = z_s.clone().requires_grad_()
    (grad,) = torch.autograd.grad(soft_targets(z, z_t, T), z)
    p, q = ((z.double() / T).softmax(1) for z in (z_t, z_s))
    torch.testing.assert_close(grad.double(), T * (q - p) / 64, rtol=0.02, atol=1e-3)


def test_fault_14_an_infinite_temperature_is_refused_with_a_remedy(logits):
    for T in (math.inf, math.nan, -1.0, 0.0):
        with pytest.raises(ValueError, match="expected T, the temperature, to be a finite number > 0"):
            soft_targets(*logits, T)
    with pytest.raises(ValueError, match="1e6 differs from the limit"):
        soft_targets(*logits, math.inf)
    for build in (lambda: classic_loss(math.inf, 0.5), lambda: classic_loss(2.0, 2.0), lambda: temperature_loss(0.0)):
        with pytest.raises(ValueError, match="expected"):
            build()


def test_at_the_temperatures_of_the_experiments_the_plain_formula_holds_to_the_bit(logits):
    z_s, z_t = logits.float()
    for T in (1.0, 4.0, 20.0, 100.0):
        kl = F.kl_div((z_s / T).log_softmax(1), (z_t / T).log_softmax(1), reduction="none", log_target=True).sum(1)
        assert torch.equal(soft_targets(z_s, z_t, T), T**2 * kl.mean())
        assert torch.equal(soft_targets(z_s, z_t, T, reduction="none"), T**2 * kl)
