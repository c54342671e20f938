"""Transfer attacks (Papernot et al. 2017): adversarial images made on a surrogate, given or trained on the victim's predictions."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lib.attacks.carlini_wagner import carlini_wagner
from lib.attacks.common import Images, Labels
from lib.attacks.pgd import pgd
from lib.models import Ensemble
from lib.training import train
from lib.utils.device import to_model_device
from lib.utils.random_state import isolated_rng


def eot_ensemble(model: nn.Module, samples: int, mean: str = "logits") -> Ensemble:
    """Returns the model that averages the "logits" or "probabilities" of `samples` random passes (Athalye et al. 2018).

    To average the loss and its gradient instead, give the `eot_ensemble` option of pgd, eotpgd and the APGD attacks.
    """
    return Ensemble([model] * samples, mean)


def transfer(
    model: Callable[[Images], Tensor],
    x: Images,
    y: Labels,
    eps: float,
    norm: str = "Linf",
    seed: int = 0,
    *,
    surrogate: nn.Module | None = None,
    confidence: float = 20.0,
    by: str = "pgd",
    steps: int = 100,
    restarts: int = 1,
) -> Images:
    """Returns points made on `surrogate` alone, misclassified there by a logit margin of `confidence` where possible.

    `by`: "pgd" (margin loss, `restarts` starts) or "cw" (L2 norm only, then projected by `attack`). High confidence is
    what carries over to a distilled victim (Carlini and Wagner 2017, section VIII). ValueError without surrogate.
    """
    if surrogate is None:
        raise ValueError("transfer needs surrogate=..., the model on which the images are made (see train_surrogate)")
    if by not in ("pgd", "cw") or (by == "cw" and norm != "L2"):
        raise ValueError(f"transfer by {by!r} in {norm} is not there: choose 'pgd', or 'cw' with norm L2")
    with isolated_rng(surrogate, seed, x.device):
        if by == "cw":
            return carlini_wagner(surrogate, x, y, kappa=confidence, steps=steps)
        options = {"loss": "margin", "kappa": confidence, "steps": steps, "restarts": restarts}
        return pgd(surrogate, x, y, eps, norm, seed, **options)


def victim_answers_loss(model: nn.Module, x: Images, answer: Tensor, *, generator: torch.Generator, epoch: int):
    """Returns the cross-entropy with the victim's answers, class numbers or probabilities (n k)."""
    return F.cross_entropy(model(x), answer), {}


def train_surrogate(
    victim_answers: Callable[[Images], Tensor],
    x: Float[Tensor, "n c h w"],
    surrogate: nn.Module,
    *,
    rounds: int = 0,
    step: float = 0.1,
    epochs: int = 30,
    seed: int = 0,
    **options: Any,
) -> nn.Module:
    """Trains `surrogate` in place on nothing but the victim's answers to `x`, and returns it in eval mode.

    `victim_answers(x)`: class numbers (n,) (label-only black box) or probabilities (n k). `rounds` > 0: after each
    training the queries are doubled by x + step * sign(gradient of the surrogate's output for the answered class), as
    Papernot et al. 2017 do. `options` go to `lib.training.train`.
    """
    for k in range(rounds + 1):
        with torch.no_grad():
            answer = victim_answers(x)
        train(surrogate, victim_answers_loss, (x, answer), epochs=epochs, seed=seed, **{"name": "surrogate"} | options)
        surrogate.eval()
        if k < rounds:
            said = answer if answer.ndim == 1 else answer.argmax(1)
            query, said = to_model_device(surrogate, x.detach(), said)
            output = surrogate(query.requires_grad_()).gather(1, said[:, None]).sum()
            way = torch.autograd.grad(output, query)[0].sign().to(x.device)
            x = torch.cat([x, (x + step * way).clamp(0, 1)])
    return surrogate
