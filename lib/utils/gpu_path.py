"""What makes networks fast on a GPU: compiled kernels, and images stored channels-last. On a CPU nothing changes.

A compiler's gradients can be silently wrong: torch 2.13's, on a CPU, are off by half for a small U-Net, and right with
its fusions off. A wrong gradient is a masked gradient, so a network is compiled only if its gradients, of images and of
weights, are those of the plain network.
"""

import copy
import math
import sys
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lib.utils.device import default_device, use_gpu
from lib.utils.precision import autocast_forward
from lib.utils.random_state import seeded_noise

Use = Literal["training", "attack"]
COMPILED_TOLERANCE = {
    "no": 1e-2,
    "bf16": 0.1,
    "fp16": 0.1,
}  # of gradients, by precision: rounding is far below, faults above


def gradient_vectors(net: nn.Module, example: Sequence[Tensor], precision: str, use: Use) -> list[Tensor]:
    """Return the output of a network for one use, and the gradient of its squares, each as one vector.

    Args:
        net: its mode, buffers and gradients are as they were afterwards.
        example: its inputs, images first.
        precision: of the forward pass, see `lib.utils.precision.autocast_forward`.
        use: "training": the gradient of the weights, in train mode; "attack": of the images, in eval mode.

    Returns:
        Output and gradient, float32.
    """
    x, before = example[0].detach().clone().requires_grad_(use == "attack"), net.training
    wanted = [x] if use == "attack" else [w for w in net.parameters() if w.requires_grad]
    with autocast_forward(net, x.device, precision), seeded_noise(net, 0, x.device, "keep"):
        answer: Any = net.train(use == "training")(x, *example[1:])
        z = getattr(answer, "sample", answer)
        gradients = torch.autograd.grad(z.float().square().sum(), wanted)
    net.train(before)
    return [z.detach().float().flatten(), torch.cat([g.flatten() for g in gradients])]


def compiled_difference(
    net: nn.Module, plain: nn.Module, example: Sequence[Tensor], precision: str = "no", use: Use = "training"
) -> float:
    """Return by how much output and gradient of a network differ from those of its plain copy.

    Args:
        net: the compiled network.
        plain: a copy that is not compiled.
        example: inputs, images first, of the batch size that will be used.
        precision: of the forward pass.
        use: see `gradient_vectors`.

    Returns:
        The larger of ‖a - b‖ / ‖b‖ of output and gradient, infinite where it is no number.
    """
    pairs = zip(*(gradient_vectors(m, example, precision, use) for m in (net, plain)), strict=True)
    differences = [((a - b).norm() / b.norm().clamp(min=1e-12)).item() for a, b in pairs]
    return max(d if math.isfinite(d) else math.inf for d in differences)


def speed_up(
    net: nn.Module,
    example: Sequence[Tensor],
    precision: str = "no",
    *,
    uses: Sequence[Use] = ("training",),
    backend: str | None = None,
    mode: str | None = None,
) -> nn.Module:
    """Compile a network in place and store its weights channels-last, on a GPU; elsewhere leave it as it is.

    Where gradients of the compiled network are not the plain one's, it is left uncompiled, with a line on stderr. A
    copy of the network (`copy.deepcopy`, as for averaged weights) is not compiled. Every other batch size compiles
    anew, for half a minute: let the batch size divide the number of images.

    Args:
        net: any network of images; its weights keep their names and values.
        example: inputs, images first, as it will get them.
        precision: of the forward passes that it will make, see `lib.training.train`.
        uses: for which it is checked, "training", "attack" or both: each has kernels of its own.
        backend: of `torch.compile`, on any device; None for its default on a GPU alone.
        mode: of that default: "reduce-overhead" records CUDA graphs, for small batches, where launches take the time.

    Returns:
        The network, on the device of experiments.
    """
    if backend is None and not use_gpu():
        return net
    from torch._inductor import config as inductor  # takes a second

    net.to(default_device(), memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    plain, inputs = copy.deepcopy(net), [t.to(default_device()) for t in example]
    if hasattr(inductor.triton, "mix_order_reduction"):
        inductor.triton.mix_order_reduction = False  # wrong gradients since torch 2.10: pytorch's issue 193061
    options: dict[str, Any] = {"backend": backend} if backend else {"mode": mode}
    net.compile(**options)
    difference = max(compiled_difference(net, plain, inputs, precision, use) for use in uses)
    if difference > COMPILED_TOLERANCE[precision]:
        net._compiled_call_impl = None
        expected = (
            f"expected gradients of the compiled network within {COMPILED_TOLERANCE[precision]:g} of the plain one's"
        )
        print(f"{expected}, got {difference:.3g}: it is not compiled, which is slower", file=sys.stderr)
    return net


def is_compiled(net: nn.Module) -> bool:
    """Say whether a network runs compiled.

    Args:
        net: any network.

    Returns:
        True after a `speed_up` that kept its compiled form.
    """
    return getattr(net, "_compiled_call_impl", None) is not None
