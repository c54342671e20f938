"""PGD on the expected loss of a random defence (expectation over transformation, Athalye et al. 2018b).

Against a random defence an attack must not rest at its first success, which may be luck: it climbs on. `eot_pgd` takes
steps of one size and returns the point of the highest estimated loss, so it needs many draws for every estimate.
`annealed_pgd` lets the steps shrink and returns the last point: the path itself averages the noise, as stochastic
approximation does (Robbins and Monro 1951). What each leaves for how many gradients: data/digits/bench/schedules.json,
written by `python -m tests.bench.bench_schedules`.

A defence that must be right in every one of several draws fails by its worst draw, not by their mean: with the option
`over` the loss is a soft maximum over draws, whose gradient is that of the draws nearest to failing.
"""

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from lib.attacks.common import (
    Images,
    Labels,
    Loss,
    LossName,
    Model,
    cross_entropy,
    get_loss,
    per_image,
    project,
    random_start,
    steepest_direction,
    step_size,
)
from lib.attacks.gate import ModelGate
from lib.utils import per_image_rng
from lib.utils.validation import Positive, PositiveInt, check_value

Over = Literal["mean", "worst"]  # what becomes of the losses of an image's draws
EOT_STEP_SHARE = 0.25  # of eps: the step size, 2/255 in a ball of 8/255


def batch_sizes(total: int, size: int) -> list[int]:
    """Split draws into batches.

    Args:
        total: number of draws.
        size: draws in a batch at most.

    Returns:
        The number of draws in each batch.

    Raises:
        ValueError: for a size below 1.
    """
    if size < 1:
        raise ValueError(f"expected at_once >= 1 draws in a batch, got {size}")
    return [min(size, total - first) for first in range(0, total, size)]


def expected_loss(
    model: Model,
    x: Images,
    y: Labels,
    draws: int,
    at_once: int,
    gradient: bool = True,
    criterion: Loss = cross_entropy,
    over: Over = "mean",
) -> tuple[Float[Tensor, " n"], Images]:
    """Estimate the expected loss of a random model, or the soft maximum of its losses, and the gradient.

    Losses are summed over the batch, not averaged, so that an image's gradient does not depend on the others.

    Args:
        model: maps images to logits (n, k), at random.
        x: images (n, c, h, w).
        y: labels (n,).
        draws: forward passes averaged.
        at_once: passes in one batch, see `eot_pgd`.
        gradient: whether to compute the gradient.
        criterion: loss of logits and labels, one number per image.
        over: "mean" of an image's losses; "worst" for log(mean(exp(losses))), which weights the gradients of draws by
            the softmax of their losses and does not depend on `at_once` either.

    Returns:
        Losses (n,), infinite where an answer was not finite, and gradients (n, c, h, w), 0 without `gradient`, and
        with "worst" where an answer was not finite: that draw has failed.

    Raises:
        ValueError: for another `over`, and for `at_once` below 1.
    """
    worst = check_value("over", over, Over) == "worst"
    x = x.detach().requires_grad_(gradient)
    value, grad = x.new_full((len(x),), -torch.inf if worst else 0.0), torch.zeros_like(x)
    for k in batch_sizes(draws, at_once):
        with torch.set_grad_enabled(gradient):
            z = model(x.repeat(k, 1, 1, 1))
            losses = criterion(z, y.repeat(k)).masked_fill(~z.isfinite().all(1), torch.inf).unflatten(0, (k, len(x)))
            loss = losses.logsumexp(0) if worst else losses.sum(0)
            own = torch.zeros_like(x)
            if loss.requires_grad:
                own = torch.autograd.grad(loss.sum(), x, allow_unused=True, materialize_grads=True)[0]
        loss = loss.detach()
        if worst:
            share = torch.sigmoid((loss - value).nan_to_num(0.0))  # of this batch in the sum of exponentials so far
            value, grad = torch.logaddexp(value, loss), grad.lerp(own, per_image(share))
        else:
            value, grad = value + loss, grad + own
    return (value - math.log(draws), grad) if worst else (value / draws, grad / draws)


def eot_pgd(
    model: Model,
    x: Images,
    y: Labels,
    eps: float,
    norm: str = "Linf",
    seed: int = 0,
    *,
    steps: PositiveInt,
    alpha: Positive | None = None,
    restarts: PositiveInt = 1,
    draws: PositiveInt = 1,
    at_once: PositiveInt = 1,
) -> Images:
    """Climb the expected loss of a random model by projected gradient steps (Athalye et al. 2018b).

    `lib.attacks.pgd.pgd` with the option `eot` and a margin `kappa` that no image reaches is the same attack, one
    forward pass after the other.

    Args:
        model: maps images to logits (n, k), at random.
        x: images (n, c, h, w), in [0, 1].
        y: labels (n,).
        eps: radius of the ball, in pixel units.
        norm: "Linf" or "L2".
        seed: decides the random starts, together with each image's pixels; the model's noise is the caller's.
        steps: gradient steps of a restart.
        alpha: step size, in pixel units; eps / 4 when None (`EOT_STEP_SHARE`).
        restarts: number of random starts.
        draws: forward passes averaged for each loss and gradient.
        at_once: how many of them run as one batch, in which each image is repeated so often. More than 1 is right
            only for a model whose attribute `independent_noise` is True: it draws noise for each image of a batch, so
            that repeated images are independent draws. Where noise is shared within a batch all would be one draw:
            leave it at 1.

    Returns:
        Per image the point of the highest estimated loss on all paths, of the same shape.

    Raises:
        ValueError: if `at_once` is below 1.
    """
    alpha, gate = step_size(eps, steps, EOT_STEP_SHARE) if alpha is None else alpha, ModelGate(model, x)
    x_adv, best, key = x.clone(), x.new_full((len(x),), -torch.inf), per_image_rng.image_keys(x, seed)
    for restart in range(restarts):
        point = random_start(x, eps, norm, key, restart)
        for step in range(steps + 1):
            value, grad = expected_loss(gate, point, y, draws, at_once, gradient=step < steps)
            better = value >= best
            x_adv[better], best[better] = point[better], value[better]
            if step < steps:
                point = project(point + alpha * steepest_direction(grad, norm), x, eps, norm)
    gate.warn("eot_pgd")
    return x_adv


FIRST_SHARE, LAST_SHARE = 0.5, 0.02  # of eps: the step sizes at the beginning and at the end of an annealed path


def annealed_sizes(eps: float, steps: int, first: float = FIRST_SHARE) -> list[float]:
    """Return step sizes that shrink linearly.

    Args:
        eps: radius of the ball, in pixel units.
        steps: how many.
        first: the first one as a share of eps; the last one is `LAST_SHARE`.

    Returns:
        The sizes, in pixel units.
    """
    done = (step / max(steps - 1, 1) for step in range(steps))
    return [eps * (first * (1 - share) + LAST_SHARE * share) for share in done]


def annealed_pgd(
    model: Model,
    x: Images,
    y: Labels,
    eps: float,
    norm: str = "Linf",
    seed: int = 0,
    *,
    steps: PositiveInt = 16,
    draws: PositiveInt = 4,
    at_once: PositiveInt = 1,
    loss: LossName = "ce",
    start: Tensor | None = None,
    first: Positive = FIRST_SHARE,
    over: Over = "mean",
) -> Images:
    """Climb the expected loss of a random model by projected steps that shrink linearly, and return the last point.

    Args:
        model: maps images to logits (n, k), at random.
        x: images (n, c, h, w), in [0, 1].
        y: labels (n,).
        eps: radius of the ball, in pixel units.
        norm: "Linf" or "L2".
        seed: decides the random start, together with each image's pixels; the model's noise is the caller's.
        steps: gradient steps.
        draws: forward passes averaged for each gradient.
        at_once: how many of them run as one batch, see `eot_pgd`.
        loss: name of the loss, see `lib.attacks.common.get_loss`.
        start: images (n, c, h, w) in the ball to begin with, such as those of a cheaper surrogate; a random point of
            the ball when None.
        first: the first step as a share of eps; the last one is `LAST_SHARE`.
        over: "worst" against a defence that must be right in every draw, see `expected_loss`.

    Returns:
        Images of the same shape, in the ball.
    """
    gate, criterion = ModelGate(model, x), get_loss(loss)
    point = random_start(x, eps, norm, per_image_rng.image_keys(x, seed), 0) if start is None else start
    point = project(point, x, eps, norm)
    for alpha in annealed_sizes(eps, steps, first):
        _, grad = expected_loss(gate, point, y, draws, at_once, criterion=criterion, over=over)
        point = project(point + alpha * steepest_direction(grad, norm), x, eps, norm)
    gate.warn("annealed_pgd")
    return point
