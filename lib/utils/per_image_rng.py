"""Random numbers that belong to one image: a function of the seed, the image's pixels and the draw, of nothing else.

An attack that draws its noise for the whole batch gives an image another result in another batch. Here every image has
a key, and the numbers are hashes of it (the finaliser of SplitMix64, Steele et al. 2014), so results depend neither on
the batch size and the order nor on which images are already broken; CPU and GPU agree to the bit.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

GOLDEN = -0x61C8864680B583EB  # 2^64 / golden ratio, as a signed 64-bit number
STRIDE = 0x5851F42D4C957F2D


def mix_bits(z: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    """Return 64 well-mixed bits for each 64-bit number (SplitMix64's finaliser: overflow wraps, shifts fill in 0)."""
    z = (z ^ ((z >> 30) & ((1 << 34) - 1))) * -0x40A7B892E31B1A47
    z = (z ^ ((z >> 27) & ((1 << 37) - 1))) * -0x6B2FB644ECCEEE15
    return z ^ ((z >> 31) & ((1 << 33) - 1))


def image_keys(x: Float[Tensor, "n ..."], seed: int) -> Int[Tensor, " n"]:
    """Return one 64-bit key per image, from its float32 pixels and `seed` (any integer below 2^63)."""
    bits = (x.detach().flatten(1).float() + 0.0).contiguous().view(torch.int32).long()  # + 0.0: -0 and 0 are one pixel
    weights = mix_bits(torch.arange(1, bits.shape[1] + 1, device=x.device) * GOLDEN)
    return mix_bits((bits * weights).sum(1) + mix_bits(torch.tensor(seed, device=x.device)))


def uniform(key: Int[Tensor, " n"], draw: int, *shape: int) -> Float[Tensor, "n ..."]:
    """Return float32 numbers uniform in [0, 1), of `shape` for each key; another `draw` gives independent ones."""
    count = torch.arange(1, math.prod(shape) + 1, device=key.device) * GOLDEN
    start = mix_bits(key + ((draw + 1) * STRIDE + 2**63) % 2**64 - 2**63)
    bits = (mix_bits(start[:, None] + count) >> 40) & ((1 << 24) - 1)
    return (bits.float() / 2**24).reshape(len(key), *shape)


def normal(key: Int[Tensor, " n"], draw: int, *shape: int) -> Float[Tensor, "n ..."]:
    """Return standard normal float32 numbers of `shape` for each key (Box and Muller 1958)."""
    u, v = uniform(key, draw, 2, *shape).unbind(1)
    return (-2 * torch.log1p(-u)).sqrt() * torch.cos(2 * math.pi * v)
