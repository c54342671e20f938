"""FAB (Croce and Hein 2020b) by torchattacks: the adapter, and the only module that imports it."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lib.attacks.common import Images, Labels, Logits, Model
from lib.utils.validation import PositiveInt


class TorchattacksModel(nn.Module):
    """The model as torchattacks needs it: a float32 module with one idle parameter and nothing else to change.

    Its logits depend on the images, if only by 0, for it differentiates without a check; an answer that is not finite
    becomes a class of its own, which no label is.
    """

    def __init__(self, model: Model, like: Tensor) -> None:
        super().__init__()
        self.idle = nn.Parameter(torch.zeros_like(like[0, 0, 0, 0]), requires_grad=False)
        self.call = (model,)  # in a tuple: torchattacks must not find its train/eval flags

    def forward(self, x: Images) -> Logits:
        z = self.call[0](x.to(self.idle.dtype)).float()
        if x.requires_grad:
            z = z + 0 * x.flatten(1).sum(1, keepdim=True)
        if not (finite := z.isfinite().all(1)).all():
            z = F.pad(z.where(finite[:, None], 0), (0, 1), value=-1e9)
            z[~finite, -1] = 1
        return z


def fab_t(
    model: Model,
    x: Images,
    y: Labels,
    eps: float,
    norm: str = "Linf",
    seed: int = 0,
    *,
    steps: PositiveInt = 100,
    targets: PositiveInt = 9,
) -> Images:
    """Search the smallest perturbation by targeted FAB of torchattacks (Croce and Hein 2020b).

    One restart, without a random start.

    Args:
        model: maps images to logits (n, k).
        x: images (n, c, h, w), in [0, 1].
        y: labels (n,).
        eps: radius of the ball, in pixel units.
        norm: "Linf" or "L2".
        seed: seeds torchattacks, which draws nothing at one restart.
        steps: steps towards a class; 100 is AutoAttack's number.
        targets: number of classes, the likeliest wrong ones.

    Returns:
        Per image a misclassified point in the ball where one was found, else the image, of the same shape.

    Raises:
        ImportError: if torchattacks is missing.
    """
    try:
        import torchattacks
    except ImportError as error:
        remedy = "install it by `python -m lib.pipeline.environment`"
        raise ImportError(f"fab-t, which is a part of autoattack, needs torchattacks: {remedy}") from error
    with torch.no_grad():
        classes = min(model(x[:1]).shape[1], targets + 1)
    run = torchattacks.FAB(
        TorchattacksModel(model, x), norm, eps, steps, seed=seed % 2**32, multi_targeted=True, n_classes=classes
    )
    return run(x.float(), y).to(x.dtype)
