"""Attacks on few values: the Jacobian saliency map attack (Papernot et al. 2016), JSMA-F on softmax, JSMA-Z on logits.

Both are targeted: pairs of values grow (or shrink) that raise the target's output and lower the others' sum. The two
names are Carlini and Wagner's (2017): on a distilled network softmax gradients vanish and JSMA-F stops at once.
"""

from typing import Annotated

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor

from lib.attacks.common import Images, Labels, Model, goal_met, mean_logits
from lib.utils.validation import Number, PositiveInt, PositiveShare

PAIRS = 2**24  # pairs of values held in memory at a time, 64 MiB in float32


def _saliency_gradients(
    model: Model, x: Images, target: Labels, softmax: bool
) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n d"]]:
    """Return the gradients of the target's output and of the sum of all others.

    Probabilities sum to 1, so that with `softmax` the second is minus the first; summed up in float32, the small
    probabilities of all others cancel, and what is left is rounding.
    """
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        z = model(x)
        outputs = z.softmax(1) if softmax else z
        own = outputs.gather(1, target[:, None]).sum()
        others = outputs.scatter(1, target[:, None], 0.0).sum()
        if not outputs.requires_grad:
            return torch.zeros_like(x).flatten(1), torch.zeros_like(x).flatten(1)
        first = torch.autograd.grad(own, x, retain_graph=not softmax, allow_unused=True, materialize_grads=True)[0]
        if softmax:
            return first.flatten(1), -first.flatten(1)
        rest = torch.autograd.grad(others, x, allow_unused=True, materialize_grads=True)[0]
    return first.flatten(1), rest.flatten(1)


def best_pairs(
    own: Float[Tensor, "n d"], others: Float[Tensor, "n d"], free: Bool[Tensor, "n d"]
) -> tuple[Int[Tensor, "n 2"], Bool[Tensor, " n"]]:
    """Return the pair p != q of free values with the largest -α β where α > 0 > β, and whether there is one.

    α = own_p + own_q, β = others_p + others_q (the paper's algorithm 3).

    Args:
        own: gradients of the target's output (n, d).
        others: gradients of the sum of all other outputs (n, d).
        free: which values may still change (n, d).

    Returns:
        Indices p and q (n, 2), and whether the pair meets the condition (n,).
    """
    d = own.shape[1]
    scale = own.abs().amax(1, keepdim=True).clamp_min(torch.finfo(own.dtype).tiny)  # or products of 1e-30 underflow
    own = (own / scale).masked_fill(~free, -torch.inf)
    others = others / others.abs().amax(1, keepdim=True).clamp_min(torch.finfo(own.dtype).tiny)
    pairs, usable = [], []
    for a, b in zip(own.split(max(PAIRS // d**2, 1)), others.split(max(PAIRS // d**2, 1)), strict=True):
        rise, fall = a[:, :, None] + a[:, None, :], b[:, :, None] + b[:, None, :]
        score = torch.where((rise > 0) & (fall < 0), -rise * fall, 0)
        score.diagonal(dim1=1, dim2=2).zero_()
        highest, index = score.flatten(1).max(1)
        pairs.append(torch.stack([index // d, index % d], 1))
        usable.append(highest > 0)
    return torch.cat(pairs), torch.cat(usable)


def _jsma_towards(
    model: Model,
    x: Images,
    y: Labels,
    goal: Labels,
    target: Labels | None,
    softmax: bool,
    theta: float,
    budget: int,
) -> tuple[Images, Bool[Tensor, " n"]]:
    """Return points pushed towards the classes `goal` by at most `budget` changed values, and which met the aim.

    The aim is the class `target`, or any misclassification when None.
    """
    x_adv, reached = x.clone(), torch.zeros_like(y, dtype=torch.bool)
    rows, point = torch.arange(len(x), device=x.device), x.clone()
    for step in range(budget // 2 + 1):
        met = goal_met(mean_logits(model, point), y[rows], None if target is None else target[rows])
        x_adv[rows], reached[rows] = point, met
        rows, point = rows[~met], point[~met]
        if not len(rows) or step == budget // 2:
            break
        own, others = _saliency_gradients(model, point, goal[rows], softmax)
        free = (point < 1 if theta > 0 else point > 0).flatten(1)
        sign = 1 if theta > 0 else -1
        pairs, usable = best_pairs(sign * own, sign * others, free)
        rows, point, pairs = rows[usable], point[usable], pairs[usable]
        flat = point.flatten(1)
        point = flat.scatter(1, pairs, (flat.gather(1, pairs) + theta).clamp(0, 1)).view_as(point)
    return x_adv, reached


def jsma(
    model: Model,
    x: Images,
    y: Labels,
    eps: float | None = None,
    norm: str = "L0",
    seed: int = 0,
    *,
    softmax: bool = True,
    theta: PositiveShare | Annotated[Number, Field(ge=-1, lt=0)] = 1.0,
    gamma: PositiveShare = 0.145,
    target: Labels | None = None,
    targets: PositiveInt | None = None,
) -> Images:
    """Change few values, two at a time, by the Jacobian saliency map (Papernot et al. 2016, algorithm 2).

    Args:
        model: maps images to logits (n, k).
        x: images (n, c, h, w), in [0, 1].
        y: labels (n,).
        eps: number of values that may change, in place of `gamma`.
        norm: "L0".
        seed: unused: there is no randomness.
        softmax: whether the gradients are those of probabilities (JSMA-F) rather than of logits (JSMA-Z).
        theta: change of a value in a step, in pixel units; values shrink where it is negative.
        gamma: share of the c h w values that may change; 0.145 is the paper's.
        target: classes to reach (n,); any misclassification counts when None.
        targets: how many of the likeliest wrong classes are tried in turn without `target`; all when None.

    Returns:
        Per image the point with the fewest changed values that meets the aim, or the first attempt if there is none,
        of the same shape.

    Raises:
        ValueError: if fewer than two values may change, but for eps = 0.
    """
    budget = int(gamma * x[0].numel()) if eps is None else int(eps)
    if budget < 2 and eps != 0:
        raise ValueError(f"expected jsma to have at least 2 values to change, got {budget}: raise its gamma or eps")
    if target is not None:
        return _jsma_towards(model, x, y, target, target, softmax, theta, budget)[0]
    z = mean_logits(model, x)
    order = z.scatter(1, y[:, None], -torch.inf).argsort(1, descending=True)
    x_adv, fewest = x.clone(), x.new_full((len(x),), torch.inf)
    for rank in range(min(targets or z.shape[1] - 1, z.shape[1] - 1)):
        point, met = _jsma_towards(model, x, y, order[:, rank], None, softmax, theta, budget)
        count = (point != x).flatten(1).sum(1).to(x.dtype)
        better = met & (count < fewest)
        fewest = torch.where(better, count, fewest)
        take = better | (fewest.isinf() if rank == 0 else torch.zeros_like(better))
        x_adv = torch.where(take[:, None, None, None], point, x_adv)
    return x_adv
