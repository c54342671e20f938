"""The classic losses against hand computations, limits and reductions."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

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
