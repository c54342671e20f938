"""Ways around a defence: BPDA, expectation over transformation, and surrogates, given or trained on answers only."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lib.carlini_wagner import carlini_wagner
from lib.models import Ensemble, beside
from lib.pgd import Images, Labels, pgd
from lib.train import train

Map = Callable[[Tensor], Tensor]


@contextmanager
def undisturbed(model: Any, seed: int, device: torch.device, mode: str = "eval") -> Iterator[None]:
    """Seeds a forked global random state and sets eval mode; restores state, every module's flag and `param.grad`."""
    module = model if isinstance(model, nn.Module) else nn.Module()
    flags = [(m, m.training) for m in module.modules()]
    grads = [(p, p.grad) for p in module.parameters()]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        try:
            if mode == "eval":
                module.eval()
            for p, _ in grads:
                p.grad = None
            yield
        finally:
            for m, flag in flags:
                m.training = flag
            for p, grad in grads:
                p.grad = grad


class Detour(torch.autograd.Function):
    """Computes `there(x)`; differentiates `back` at the same point instead."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, there: Map, back: Map) -> Tensor:
        ctx.save_for_backward(x)
        ctx.back = back
        return there(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            return torch.autograd.grad(ctx.back(x), x, grad)[0], None, None


class BPDA(nn.Module):
    """The module that `bpda` returns."""

    def __init__(self, forward_fn: Map, backward_fn: Map) -> None:
        super().__init__()
        self.there, self.back = forward_fn, backward_fn

    def forward(self, x: Tensor) -> Tensor:
        return Detour.apply(x, self.there, self.back)


def bpda(forward_fn: Map, backward_fn: Map = lambda x: x) -> BPDA:
    """Returns a module that answers `forward_fn(x)` exactly but has the gradient of `backward_fn`, by default x itself.

    Backward pass differentiable approximation (Athalye et al. 2018), for quantisers, JPEG, purifiers: put it before the
    classifier in `nn.Sequential`. Both functions map to tensors of one shape.
    """
    return BPDA(forward_fn, backward_fn)


def eot(model: nn.Module, samples: int, mean: str = "logits") -> Ensemble:
    """Returns the model that averages the "logits" or "probabilities" of `samples` random passes (Athalye et al. 2018).

    To average the loss and its gradient instead, give the `eot` option of pgd, eotpgd and the APGD attacks.
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
    with undisturbed(surrogate, seed, x.device):
        if by == "cw":
            return carlini_wagner(surrogate, x, y, kappa=confidence, steps=steps)
        options = {"loss": "margin", "kappa": confidence, "steps": steps, "restarts": restarts}
        return pgd(surrogate, x, y, eps, norm, seed, **options)


def fit_answers(model: nn.Module, x: Images, answer: Tensor, *, generator: torch.Generator, epoch: int):
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
    Papernot et al. 2017 do. `options` go to `lib.train.train`.
    """
    for k in range(rounds + 1):
        with torch.no_grad():
            answer = victim_answers(x)
        train(surrogate, fit_answers, (x, answer), epochs=epochs, seed=seed, **{"name": "surrogate"} | options)
        surrogate.eval()
        if k < rounds:
            said = answer if answer.ndim == 1 else answer.argmax(1)
            query, said = beside(surrogate, x.detach(), said)
            output = surrogate(query.requires_grad_()).gather(1, said[:, None]).sum()
            way = torch.autograd.grad(output, query)[0].sign().to(x.device)
            x = torch.cat([x, (x + step * way).clamp(0, 1)])
    return surrogate
