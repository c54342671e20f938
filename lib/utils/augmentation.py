"""Random changes of training images."""

import torch
from torch import Tensor
from torch.nn import functional as F


def shift_flip(x: Tensor, *, pad: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Shift each image by up to `pad` pixels, zeros moving in, and mirror half of them.

    Args:
        x: images (n, c, h, w).
        pad: the largest shift in each direction, in pixels.
        flip: whether images are mirrored, each with probability 1/2.
        generator: decides shifts and mirrors; on the images' device.

    Returns:
        Images of the same shape.
    """
    n, _, h, w = x.shape
    rows, columns = torch.randint(0, 2 * pad + 1, (2, n, 1), generator=generator, device=x.device)
    rows = rows + torch.arange(h, device=x.device)
    columns = columns + torch.arange(w, device=x.device)
    if flip:
        mirrored = torch.rand(n, 1, generator=generator, device=x.device) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    each = torch.arange(n, device=x.device)[:, None, None]
    return F.pad(x, (pad,) * 4).permute(0, 2, 3, 1)[each, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
