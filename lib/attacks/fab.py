"""FAB (Croce and Hein 2020b) by torchattacks: the adapter, and the only module that imports it."""

import torch
from torch import Tensor, nn

from lib.attacks.common import Images, Labels, Logits, Model


class TorchattacksModel(nn.Module):
    """Shows `model` to torchattacks as a float32 module with one idle parameter and nothing else to change."""

    def __init__(self, model: Model, like: Tensor) -> None:
        super().__init__()
        self.idle = nn.Parameter(torch.zeros_like(like[0, 0, 0, 0]), requires_grad=False)
        self.call = (model,)  # in a tuple: torchattacks must not find its train/eval flags

    def forward(self, x: Images) -> Logits:
        return self.call[0](x.to(self.idle.dtype)).float()


def fab_t(
    model: Model,
    x: Images,
    y: Labels,
    eps: float,
    norm: str = "Linf",
    seed: int = 0,
    *,
    steps: int = 100,
    targets: int = 9,
) -> Images:
    """Returns the points of torchattacks' targeted FAB (Croce and Hein 2020b), one restart without a random start."""
    try:
        import torchattacks
    except ImportError as error:
        raise ImportError("fab-t needs torchattacks: run `python -m lib.pipeline.environment`") from error
    with torch.no_grad():
        classes = min(model(x[:1]).shape[1], targets + 1)
    run = torchattacks.FAB(
        TorchattacksModel(model, x), norm, eps, steps, seed=seed % 2**32, multi_targeted=True, n_classes=classes
    )
    return run(x.float(), y).to(x.dtype)
