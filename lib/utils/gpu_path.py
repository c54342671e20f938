"""What makes networks fast on a GPU: compiled kernels, and images stored channels-last. On a CPU nothing changes."""

import torch
from torch import nn

from lib.utils.device import use_gpu


def speed_up(net: nn.Module, backend: str | None = None) -> nn.Module:
    """Compile a network in place and store its weights channels-last, on a GPU; elsewhere leave it as it is.

    A copy of the network (`copy.deepcopy`, as for averaged weights) is not compiled. Every other batch size compiles
    anew, for half a minute: let the batch size divide the number of images.

    Args:
        net: any network of images; its weights keep their names and values.
        backend: of `torch.compile`, on any device; None for its default on a GPU alone.

    Returns:
        The network.
    """
    if backend is None and not use_gpu():
        return net
    net.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    net.compile(backend=backend or "inductor")
    return net
