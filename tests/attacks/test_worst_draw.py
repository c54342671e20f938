"""The option over="worst": the soft maximum over an image's draws, exact in batches, and what it breaks that a mean
does not."""

import math

import pytest
import torch

from lib.attacks.common import cross_entropy, get_loss
from lib.attacks.eot_pgd import annealed_pgd, expected_loss
from lib.attacks.gate import ModelGate

DRAWS = 7


def replayed(model, noise):
    """A model whose passes take the rows of `noise` one after the other, so that batches of any size see the same."""
    row = 0

    def call(x):
        nonlocal row
        row += len(x)
        return model(x + noise[row - len(x) : row])

    return call


@pytest.fixture
def noise(points):
    return 0.3 * torch.randn(DRAWS * 12, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("at_once", [1, 2, 3, DRAWS])
@pytest.mark.parametrize("loss", ["ce", "margin"])
def test_batches_of_any_size_give_the_gradient_of_the_whole_soft_maximum(cnn, points, noise, loss, at_once):
    x, y = points
    leaf = x.clone().requires_grad_()
    losses = get_loss(loss)(cnn(leaf.repeat(DRAWS, 1, 1, 1) + noise), y.repeat(DRAWS)).view(DRAWS, -1)
    expected = losses.logsumexp(0) - math.log(DRAWS)
    (slope,) = torch.autograd.grad(expected.sum(), leaf)
    value, grad = expected_loss(replayed(cnn, noise), x, y, DRAWS, at_once, criterion=get_loss(loss), over="worst")
    torch.testing.assert_close(value, expected.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad, slope, rtol=1e-4, atol=1e-5 * slope.abs().max().item())
    assert (value > losses.mean(0) - 1e-6).all() and (value < losses.amax(0) + 1e-6).all()
    mean = expected_loss(replayed(cnn, noise), x, y, DRAWS, at_once, criterion=get_loss(loss))[1]
    assert (grad - mean).norm() > 0.1 * mean.norm()


def test_it_is_the_slope_of_its_value():
    rng = torch.Generator().manual_seed(1)
    weights, noise = (torch.randn(*shape, generator=rng).double() for shape in ((4, 3), (DRAWS * 2, 1, 2, 2)))
    x, y = torch.rand(2, 1, 2, 2, generator=rng).double(), torch.tensor([0, 2])

    def at(point):
        model = replayed(lambda a: 6 * a.sin().flatten(1) @ weights, noise)
        return expected_loss(model, point, y, DRAWS, 3, over="worst")

    grad, step = at(x)[1].flatten(), 1e-6 * torch.eye(x.numel()).double()
    slope = [(at(x + d.view_as(x))[0] - at(x - d.view_as(x))[0]).sum() / 2e-6 for d in step]
    torch.testing.assert_close(grad, torch.stack(slope), rtol=1e-6, atol=1e-8)


def test_of_one_draw_worst_and_mean_are_the_same_bits(cnn, points, noise):
    losses = [expected_loss(replayed(cnn, noise), *points, 1, 1, over=over) for over in ("mean", "worst")]
    assert all(torch.equal(a, b) for a, b in zip(*losses, strict=True))
    options = {"steps": DRAWS, "draws": 1}
    assert torch.equal(
        *(annealed_pgd(replayed(cnn, noise), *points, 0.2, **options, over=over) for over in ("mean", "worst"))
    )


@pytest.mark.parametrize("at_once", [1, 2, DRAWS])
def test_a_draw_without_a_finite_answer_is_an_infinite_loss_and_no_nan(cnn, points, noise, at_once):
    x, y = points
    broken = noise.clone()
    broken.view(DRAWS, 12, -1)[[1, 2, 5], :4] = torch.nan  # of the first four images
    gate = ModelGate(replayed(cnn, broken), x)  # takes NaN among gradients for 0
    value, grad = expected_loss(gate, x, y, DRAWS, at_once, criterion=cross_entropy, over="worst")
    assert value[:4].isposinf().all() and not grad[:4].any()
    _, whole = expected_loss(replayed(cnn, noise), x, y, DRAWS, at_once, over="worst")
    torch.testing.assert_close(grad[4:], whole[4:])


class RareMode(torch.nn.Module):
    """One pixel, class 0: nine draws in ten are right wherever it is but say "brighter"; one fails where it is dark."""

    independent_noise, evaluations = True, 1

    def forward(self, x):
        shift = x.flatten(1)[:, 0] - 0.5
        rare = torch.rand(len(x)) < 0.1
        margin = torch.where(rare, 1 + 8 * shift, 6 - 8 * shift)
        return torch.stack([margin, torch.zeros_like(margin)], 1)


def test_it_breaks_ten_draws_by_a_rare_mode_from_which_the_mean_runs_away():
    torch.manual_seed(0)
    model, x, y = RareMode(), torch.full((200, 1, 1, 1), 0.5), torch.zeros(200, dtype=torch.int64)
    all_ten = {}
    for over in ("mean", "worst"):
        x_adv = annealed_pgd(model, x, y, 0.2, draws=32, at_once=8, loss="margin", over=over)
        answers = model(x_adv.repeat(10, 1, 1, 1)).argmax(1).view(10, -1)
        all_ten[over] = (answers == 0).all(0).float().mean().item()
    assert all_ten["mean"] == 1 and all_ten["worst"] == pytest.approx(0.9**10, abs=0.1)
