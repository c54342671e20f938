"""Square Attack (Andriushchenko et al. 2020): random search over squares without gradients; and plain random noise.

Each image has its own random squares. Unlike in the published code a square may touch the last row and column, which on
8x8 images are an eighth of the pixels each.
"""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lib.attacks.common import Images, Labels, Model, goal_met, l2_norm, margin, project, random_start
from lib.utils import per_image_rng
from lib.utils.validation import PositiveInt, PositiveShare

P_SCHEDULE = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # queries of 10 000 after which p is halved


def _square_share(query: int, queries: int, p: float) -> float:
    """Return the share of the pixels that a square covers at `query`: `p`, halved along the paper's schedule."""
    return p / 2 ** sum(int(query / queries * 10_000) > after for after in P_SCHEDULE)


def window_corners(u: Float[Tensor, "n 2"], h: int, w: int, s: int) -> Int[Tensor, "n 2"]:
    """Place windows at random.

    Args:
        u: uniform numbers in [0, 1) (n, 2).
        h: height of the images.
        w: width of the images.
        s: side of the windows.

    Returns:
        Row and column of each window's upper left corner (n, 2), uniform over all places.
    """
    return (u * torch.tensor([h - s + 1, w - s + 1], device=u.device)).long()


def _window_mask(corner: Int[Tensor, "n 2"], h: int, w: int, s: int) -> Bool[Tensor, "n 1 h w"]:
    """Return the mask of each image's s x s window."""
    row = torch.arange(h, device=corner.device) - corner[:, :1]
    col = torch.arange(w, device=corner.device) - corner[:, 1:]
    return (((row >= 0) & (row < s))[:, :, None] & ((col >= 0) & (col < s))[:, None, :])[:, None]


def l2_pattern(s: int) -> Float[Tensor, "s s"]:
    """Return the paper's L2 pattern on s x s pixels: a pyramid, its negative below, of unit length (its eq. 3)."""
    half = s // 2
    out = torch.zeros(s, s)
    for top, height, sign in ((0, half, 1.0), (half, s - half, -1.0)):
        row, col = height // 2, s // 2
        for k in range(max(row, col) + 1):
            up, left = max(row - k, 0), max(col - k, 0)
            out[top + up : top + min(row + k + 1, height), left : col + k + 1] += sign / (k + 1) ** 2
    return out / out.norm()


def _random_signs(u: Tensor, like: Tensor) -> Tensor:
    """Return +1 or -1 for numbers in [0, 1), in the dtype of `like`."""
    return (2 * (u >= 0.5) - 1).to(like.dtype)


def _l2_patterns(u: Float[Tensor, " n"], s: int, like: Tensor) -> Float[Tensor, "n 1 s s"]:
    """Return each image's pattern: upright or turned, by a number in [0, 1)."""
    upright = l2_pattern(s).to(like)
    return torch.where((u < 0.5)[:, None, None, None], upright, upright.T)


def _stripes_start(x: Images, eps: float, key: Tensor) -> Images:
    """Return the Linf start: vertical stripes of +-eps, their signs random per image, channel and column."""
    return x + eps * _random_signs(per_image_rng.uniform(key, 0, x.shape[1], 1, x.shape[3]), x)


def _tiles_start(x: Images, eps: float, key: Tensor) -> Images:
    """Return the L2 start: a grid of about 5 x 5 patterns of random sign and turn, scaled to the sphere."""
    h, w = x.shape[2:]
    s = max(h // 5, 2)
    delta, draw = torch.zeros_like(x), 0
    for top in range((h % s) // 2, h - s + 1, s):
        for left in range((w % s) // 2, w - s + 1, s):
            u = per_image_rng.uniform(key, draw, 1 + x.shape[1])
            sign = _random_signs(u[:, 1:, None, None], x)
            delta[:, :, top : top + s, left : left + s] = _l2_patterns(u[:, 0], s, x) * sign
            draw += 1
    return x + eps * delta / l2_norm(delta).clamp_min(1e-12)


def _gather_windows(
    delta: Images, corner: Int[Tensor, "n 2"], s: int
) -> tuple[Float[Tensor, "n c s s"], tuple[Tensor, ...]]:
    """Return each image's s x s window and the index that writes it back."""
    offsets = torch.arange(s, device=delta.device)
    n, c = delta.shape[:2]
    rows = (corner[:, :1] + offsets)[:, None, :, None]
    cols = (corner[:, 1:] + offsets)[:, None, None, :]
    images = torch.arange(n, device=delta.device)[:, None, None, None]
    index = (images, torch.arange(c, device=delta.device)[None, :, None, None], rows, cols)
    return delta[index], index


def _propose_linf(x: Images, best: Images, eps: float, s: int, u: Tensor) -> Images:
    """Return `best` with one square set to x +- eps, the sign random per channel."""
    c, h, w = x.shape[1:]
    mask = _window_mask(window_corners(u[:, :2], h, w, s), h, w, s)
    return torch.where(mask, x + eps * _random_signs(u[:, 2 : 2 + c, None, None], x), best)


def _propose_l2(x: Images, best: Images, eps: float, s: int, u: Tensor) -> Images:
    """Return `best` with the perturbation of one window moved into another, which is reshaped by a pattern.

    `budget` is the squared length that one channel of the new window may have, so that δ ends on the sphere.
    """
    c, h, w = x.shape[1:]
    delta = best - x
    to_corner, from_corner = window_corners(u[:, -3:-1], h, w, s), window_corners(u[:, :2], h, w, s)
    from_mask = _window_mask(from_corner, h, w, s)
    both = _window_mask(to_corner, h, w, s) | from_mask
    budget = (eps**2 - l2_norm(delta) ** 2).clamp_min(0) / c + (delta * both).square().sum((2, 3), keepdim=True)
    old, index = _gather_windows(delta, to_corner, s)
    new = _l2_patterns(u[:, -1], s, x) * _random_signs(u[:, 2 : 2 + c, None, None], x)
    new = new + old / old.flatten(2).norm(dim=2)[:, :, None, None].clamp_min(1e-12)
    new = new / new.flatten(2).norm(dim=2)[:, :, None, None].clamp_min(1e-12) * budget.sqrt()
    delta = delta.masked_fill(from_mask, 0)
    delta[index] = new
    return x + eps * delta / l2_norm(delta).clamp_min(1e-12)


@torch.no_grad()
def square(
    model: Model,
    x: Images,
    y: Labels,
    eps: float,
    norm: str = "Linf",
    seed: int = 0,
    *,
    queries: PositiveInt = 5000,
    p: PositiveShare = 0.8,
    restarts: PositiveInt = 1,
) -> Images:
    """Search a misclassified point by random squares, without gradients (Andriushchenko et al. 2020).

    An image leaves the batch once it is misclassified, so that queries are spent on the robust ones only.

    Args:
        model: maps images to logits (n, k).
        x: images (n, c, h, w), in [0, 1].
        y: labels (n,).
        eps: radius of the ball, in pixel units.
        norm: "Linf" or "L2".
        seed: decides the squares, together with each image's pixels.
        queries: forward passes of an image in a restart, besides that of the start.
        p: share of the pixels in the first squares; it is halved along the paper's schedule.
        restarts: number of random starts.

    Returns:
        Per image the first misclassified point, else that of the smallest margin, of the same shape.
    """
    c, h, w = x.shape[1:]
    start, propose, min_side, odd_side = (
        (_stripes_start, _propose_linf, 1, False) if norm == "Linf" else (_tiles_start, _propose_l2, 3, True)
    )
    x_adv, todo = x.clone(), torch.arange(len(x), device=x.device)
    for restart in range(restarts):
        rows, key = todo, per_image_rng.image_keys(x[todo], (seed + restart) % 2**63)
        origin, label = x[rows], y[rows]
        best = project(start(origin, eps, key), origin, eps, norm)
        z = model(best)
        low, met = margin(z, label), goal_met(z, label)
        for query in range(queries):
            if met.any():
                x_adv[rows[met]] = best[met]
                on = ~met
                rows, key, origin, label, best, low = (s[on] for s in (rows, key, origin, label, best, low))
            if not len(rows):
                break
            s = max(round(math.sqrt(_square_share(query, queries, p) * h * w)), min_side)
            s = min(s + (odd_side and s % 2 == 0), h, w)
            u = per_image_rng.uniform(key, 64 + query, c + 5)
            point = project(propose(origin, best, eps, s, u), origin, eps, norm)
            z = model(point)
            value, met = margin(z, label), goal_met(z, label)
            better = met | (value < low)
            best, low = torch.where(better[:, None, None, None], point, best), torch.where(better, value, low)
        x_adv[rows] = best
        todo = rows[~met] if len(rows) else rows
    return x_adv


@torch.no_grad()
def random_noise(
    model: Model,
    x: Images,
    y: Labels,
    eps: float,
    norm: str = "Linf",
    seed: int = 0,
    *,
    draws: PositiveInt = 100,
) -> Images:
    """Draw uniform points of the ball until an image is misclassified: the control without gradients.

    Args:
        model: maps images to logits (n, k).
        x: images (n, c, h, w), in [0, 1].
        y: labels (n,).
        eps: radius of the ball, in pixel units.
        norm: "Linf" or "L2".
        seed: decides the points, together with each image's pixels.
        draws: points of an image at most.

    Returns:
        Per image the first misclassified point, else the last one, of the same shape.
    """
    x_adv, rows, key = x.clone(), torch.arange(len(x), device=x.device), per_image_rng.image_keys(x, seed)
    for draw in range(draws):
        if not len(rows):
            break
        point = project(random_start(x[rows], eps, norm, key, draw, 1 / x[0].numel()), x[rows], eps, norm)
        met = goal_met(model(point), y[rows])
        x_adv[rows] = point
        rows, key = rows[~met], key[~met]
    return x_adv
