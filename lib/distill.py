"""Distillation losses: what a student is asked to learn from its teacher's answers."""

from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from lib.models import beside


def soft_targets(
    z_s: Float[Tensor, "n k"], z_t: Float[Tensor, "n k"], T: float, *, reduction: str = "batchmean"
) -> Tensor:
    """Returns T² KL(softmax(z_t/T) ‖ softmax(z_s/T)), summed over classes and averaged over the batch.

    `z_s`, `z_t`: logits; T²: keeps the gradient's size when T changes (Hinton et al. 2015, section 2). For T → ∞ this
    becomes logit matching, ‖(z_s − z̄_s) − (z_t − z̄_t)‖² / 2k per example (their equation 4). `reduction="none"`
    gives one value per example. Raises ValueError unless T > 0.
    """
    if not T > 0:
        raise ValueError(f"the temperature T is {T}: it must be above 0")
    terms = F.kl_div((z_s / T).log_softmax(1), (z_t / T).log_softmax(1), reduction="none", log_target=True).sum(1)
    return T**2 * (terms.mean() if reduction == "batchmean" else terms)


def kd_loss(
    z_s: Float[Tensor, "n k"], z_t: Float[Tensor, "n k"], y: Int[Tensor, " n"], *, T: float, alpha: float
) -> Tensor:
    """Returns α T² KL(softmax(z_t/T) ‖ softmax(z_s/T)) + (1 − α) CE(z_s, y) (Hinton et al. 2015, section 2).

    `alpha` in [0, 1]: 1 is the teacher's answers alone, 0 the labels alone. Raises ValueError outside.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}: a weight in [0, 1] is due")
    return alpha * soft_targets(z_s, z_t, T) + (1 - alpha) * F.cross_entropy(z_s, y)


def classic(T: float, alpha: float) -> Callable:
    """Returns the loss of `kd_loss` for `lib.train.train` on the tensors (images, labels, teacher's logits)."""

    def loss(student: nn.Module, x: Tensor, y: Tensor, z_t: Tensor, *, generator: torch.Generator, epoch: int):
        return kd_loss(student(x), z_t, y, T=T, alpha=alpha), {}

    return loss


def _smoothed(student, x, y, *, generator, epoch, smoothing: float):
    return F.cross_entropy(student(x), y, label_smoothing=smoothing), {}


def hard_labels(smoothing: float = 0.0) -> Callable:
    """Returns the cross-entropy on labels for `train`; `smoothing` in [0, 1) mixes in the uniform distribution."""
    return partial(_smoothed, smoothing=smoothing)


def check_logits(z: Float[Tensor, "n k"], whose: str = "the model") -> None:
    """Raises ValueError when `z` is not finite or looks like probabilities (rows in [0, 1] that sum to 1)."""
    if not torch.isfinite(z).all():
        raise ValueError(f"{whose} answers with NaN or infinity: its weights or its inputs are broken")
    if z.shape[1] > 1 and (z >= 0).all() and torch.allclose(z.sum(1), torch.ones(len(z), device=z.device), atol=1e-4):
        raise ValueError(f"{whose} answers with probabilities where logits are due: remove its softmax")


@torch.no_grad()
def answers(
    model: nn.Module, x: Float[Tensor, "n c h w"], batch_size: int = 1024, whose: str = "the teacher"
) -> Float[Tensor, "n k"]:
    """Returns the model's logits on images in [0, 1], in eval mode, on the CPU; its mode is restored afterwards.

    Raises ValueError when they are probabilities or not finite.
    """
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    z = torch.cat([model(*beside(model, part)).float().cpu() for part in x.split(batch_size)])
    for module, training in modes:
        module.training = training
    check_logits(z, whose)
    return z
