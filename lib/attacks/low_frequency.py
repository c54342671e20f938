"""A perceptual attack outside the ball: a large but smooth perturbation, which purifiers take for part of the image.

Noise and denoising wash out fine patterns and leave coarse ones. Perturbations of low spatial frequencies (Guo et al.
2019) are therefore what breaks purification where an eye sees least of them (Kassis et al. 2025, DiffBreak, who
optimise them under LPIPS). Here they are bounded by a radius that the caller sets larger than the ball of the threat
model: what they leave says nothing about robustness within that ball, and must be reported apart from it.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from lib.attacks.common import Images, Labels, LossName, Model, get_loss, per_image
from lib.attacks.eot_pgd import annealed_sizes, expected_loss
from lib.attacks.gate import ModelGate
from lib.utils import per_image_rng
from lib.utils.validation import PositiveInt

PROJECTIONS = 5  # onto the bound and onto low frequencies, in turn, after every step


def dct_basis(size: int, count: int) -> Float[Tensor, "count size"]:
    """Return the `count` lowest frequencies of the orthonormal DCT-II of so many pixels, one a row, in float64."""
    k, i = torch.arange(count, dtype=torch.float64)[:, None], torch.arange(size, dtype=torch.float64)
    basis = math.sqrt(2 / size) * torch.cos(math.pi * (2 * i + 1) * k / (2 * size))
    basis[0] /= math.sqrt(2)
    return basis


def low_pass(images: Images) -> Images:
    """Return what of images lies in the lower half of the frequencies along each axis, an orthogonal projection."""
    bases = (dct_basis(size, -(-size // 2)).to(images) for size in images.shape[2:])
    rows, columns = (basis.T @ basis for basis in bases)
    return rows @ images @ columns


def scaled_to(delta: Images, radius: float) -> Images:
    """Return perturbations (n, c, h, w) with the largest change of a pixel scaled to `radius`; 0 stays 0."""
    largest = per_image(delta.flatten(1).abs().amax(1))
    return radius * delta / largest.clamp_min(torch.finfo(delta.dtype).tiny)


def smooth_and_bounded(delta: Images, eps: float) -> Images:
    """Return perturbations (n, c, h, w) of low frequencies and at most `eps`, near the given ones.

    Projections onto either set in turn, and what is still too large is scaled: scaling alone would let one pixel hold
    back all others.
    """
    for _ in range(PROJECTIONS):
        delta = low_pass(delta.clamp(-eps, eps))
    return delta.where(per_image(delta.flatten(1).abs().amax(1)) <= eps, scaled_to(delta, eps))


def low_frequency_attack(
    model: Model,
    x: Images,
    y: Labels,
    eps: float,
    seed: int = 0,
    *,
    steps: PositiveInt = 16,
    draws: PositiveInt = 4,
    at_once: PositiveInt = 1,
    loss: LossName = "ce",
) -> Images:
    """Climb the expected loss of a random model by perturbations of low frequencies, whose steps shrink linearly.

    A step is the low-pass part of the sign of the gradient's low-pass part, which never lowers the loss to first
    order. After it the perturbation is made small enough again without leaving low frequencies (`smooth_and_bounded`).

    Args:
        model: maps images to logits (n, k), at random.
        x: images (n, c, h, w), in [0, 1].
        y: labels (n,).
        eps: largest change of a pixel; meant to be larger than the radius of the threat model's ball.
        seed: decides the random start, together with each image's pixels; the model's noise is the caller's.
        steps: gradient steps.
        draws: forward passes averaged for each gradient.
        at_once: how many of them run as one batch, see `lib.attacks.eot_pgd.eot_pgd`.
        loss: name of the loss, see `lib.attacks.common.get_loss`.

    Returns:
        Images of the same shape, clamped to [0, 1]: the clamp adds some high frequencies where a pixel would leave it.
    """
    gate, criterion = ModelGate(model, x), get_loss(loss)
    start = 2 * per_image_rng.uniform(per_image_rng.image_keys(x, seed), 0, *x.shape[1:]).to(x.dtype) - 1
    delta = scaled_to(low_pass(start), eps)
    for alpha in annealed_sizes(eps, steps):
        _, grad = expected_loss(gate, (x + delta).clamp(0, 1), y, draws, at_once, criterion=criterion)
        delta = smooth_and_bounded(delta + scaled_to(low_pass(low_pass(grad).sign()), alpha), eps)
    gate.warn("low_frequency_attack")
    return (x + delta).clamp(0, 1)
