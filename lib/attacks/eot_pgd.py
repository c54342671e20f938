"""PGD on the expected loss of a random defence (expectation over transformation, Athalye et al. 2018).

Against a random defence an attack must not rest at its first success, which may be luck: it climbs on and returns the
point of the highest estimated loss. The draws of one estimate are made as few batches, in which every image stands as
often as there are draws: that is only right for a defence whose noise is each image's own, as a purifier's is.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lib.attacks.common import Images, cross_entropy, project, random_start, steepest_direction
from lib.utils import per_image_rng


def batch_sizes(total: int, size: int) -> list[int]:
    """Returns the sizes of the groups of at most `size` that `total` draws make; ValueError for a size below 1."""
    if size < 1:
        raise ValueError(f"draws at once are {size}: at least 1 is due")
    return [min(size, total - first) for first in range(0, total, size)]


def expected_loss(
    model: Callable[[Images], Tensor], x: Images, y: Int[Tensor, " n"], draws: int, at_once: int, gradient: bool = True
) -> tuple[Float[Tensor, " n"], Images]:
    """Returns each image's mean cross-entropy over `draws` passes, `at_once` of them as one batch, and its gradient.

    Losses are summed over the batch, not averaged, so that an image's gradient does not depend on the others; it is 0
    where no `gradient` is asked for.
    """
    x = x.detach().requires_grad_(gradient)
    value, grad = x.new_zeros(len(x)), torch.zeros_like(x)
    for k in batch_sizes(draws, at_once):
        with torch.set_grad_enabled(gradient):
            loss = cross_entropy(model(x.repeat(k, 1, 1, 1)), y.repeat(k))
            if gradient:
                grad += torch.autograd.grad(loss.sum(), x)[0]
        value += loss.detach().unflatten(0, (k, len(x))).sum(0)
    return value / draws, grad / draws


def eot_pgd(
    model: Callable[[Images], Tensor],
    x: Images,
    y: Int[Tensor, " n"],
    eps: float,
    norm: str = "Linf",
    seed: int = 0,
    *,
    steps: int,
    alpha: float,
    restarts: int = 1,
    draws: int = 1,
    at_once: int = 1,
) -> Images:
    """Returns, per image, the point of the highest estimated loss on `restarts` paths of `steps` steps in the ball.

    `alpha`: step size in pixel units; every gradient is the mean over `draws` passes. `lib.attacks.pgd.pgd` with a margin that
    no image reaches is the same attack, one pass after the other.
    """
    found, highest, key = x.clone(), x.new_full((len(x),), -torch.inf), per_image_rng.image_keys(x, seed)
    for restart in range(restarts):
        point = random_start(x, eps, norm, key, restart)
        for step in range(steps + 1):
            value, grad = expected_loss(model, point, y, draws, at_once, gradient=step < steps)
            better = value >= highest
            found[better], highest[better] = point[better], value[better]
            if step < steps:
                point = project(point + alpha * steepest_direction(grad, norm), x, eps, norm)
    return found
