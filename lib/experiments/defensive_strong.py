"""Experiment 2's stronger attack on the lowest and the highest temperature: is a difference between them robustness?

A network that many attacks leave standing may hide its gradients from all of them. These attack it at the scale of
logits it was trained with, where no gradient vanishes, with more steps, from more starts, and from two other networks:
the one at the other end of the temperatures, and a proxy that learnt the victim's own soft answers.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from lib.attacks.transfer import train_surrogate
from lib.data import Data, Split
from lib.evaluation.outcomes import unpack_bits
from lib.evaluation.robust_accuracy import robust_accuracy
from lib.experiments.defensive import NetworkRecipe
from lib.experiments.samples import WORST, attack_outcomes, ball_condition
from lib.models import predict_logits
from lib.utils import parallel
from lib.utils.device import to_model_device
from lib.utils.draws import NO_ATTACK, pack_draws
from lib.utils.seeds import derive_seed

STRONG = "strong"  # the condition: worst case over the attacks of `lib.experiments.defensive` and these


class ScaledLogits(nn.Module):
    """A network whose logits are divided by `T`: the same classes, and gradients that do not vanish."""

    def __init__(self, model: nn.Module, T: float):
        super().__init__()
        self.model, self.T = model, T

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k"]:
        """Return the logits over T."""
        return self.model(x) / self.T


@dataclass(frozen=True)
class StrongBudget:
    """What each of these attacks may spend."""

    steps: int
    restarts: int


def train_soft_proxy(data: Data, seed: int, victim: nn.Module, T: float, recipe: NetworkRecipe) -> nn.Module:
    """Train a proxy on the training images and the softened probabilities that `victim` predicts, softmax(z / T)."""
    own = derive_seed(seed, "soft proxy") % 2**31

    def soften(x: Tensor) -> Tensor:
        return (predict_logits(victim, x) / T).softmax(1)

    return train_surrogate(soften, data.train.x, recipe.build(data, own), **recipe.options(own))


def strong_attacks(
    victim: nn.Module, T: float, surrogates: Mapping[str, nn.Module], budget: StrongBudget
) -> dict[str, dict[str, Any]]:
    """Return the attacks for `robust_accuracy`, the cheapest first; `T` divides the victim's logits."""
    scaled, effort = ScaledLogits(victim, T).eval(), {"steps": budget.steps, "restarts": budget.restarts}
    attacks = {
        "pgd-margin": {"name": "pgd", "loss": "margin", "model": scaled} | effort,
        "apgd-ce/T": {"name": "apgd-ce", "model": scaled} | effort,
        "apgd-dlr": {"name": "apgd-dlr", "model": scaled} | effort,
        "apgd-t": {"name": "apgd-t", "model": scaled} | effort,
    }
    transfers = {label: {"name": "transfer", "surrogate": net} | effort for label, net in surrogates.items()}
    return attacks | transfers


def attack_survivors(
    model: nn.Module, test: Split, seed: int, eps: float, attacks: Mapping[str, dict], right: Bool[np.ndarray, " n"]
) -> tuple[Bool[np.ndarray, " n"], dict[str, int]]:
    """Return which images withstand all attacks, and how many each broke of those that the ones before it left.

    `right`: which images are attacked; the others count as broken. An image that one attack broke meets no other.
    """
    left, broke = right.copy(), {}
    for label, entry in attacks.items():
        rows = torch.from_numpy(left.nonzero()[0])
        broke[label] = 0
        if len(rows):
            x, y = to_model_device(model, test.x[rows], test.y[rows])
            record = robust_accuracy(model, {label: entry}, x, y, eps=eps, seed=seed, progress=False)
            broken = unpack_bits(record["examples"]["broken_by"][label])
            left[rows[broken].numpy()], broke[label] = False, int(broken.sum())
    return left, broke


def attack_strongly(
    model: nn.Module,
    other: nn.Module,
    T: float,
    data: Data,
    test: Split,
    seed: int,
    recipe: NetworkRecipe,
    balls: Mapping[str, tuple[float, Mapping[str, Any]]],
    budget: StrongBudget,
) -> dict[str, dict[str, Any]]:
    """Return, by ball, what is left of one network: `accuracy` in [0, 1], `broke` (images, by attack), `outcomes`.

    Args:
        model: the victim, distilled at `T`.
        other: the network at the other end, as a surrogate.
        T: temperature of the victim.
        data: the data set, whose training images the proxy learns from.
        test: the test images.
        seed: decides the proxy and the attacks.
        recipe: of the proxy.
        balls: by name, radius and record of `robust_accuracy` under the other attacks, whose survivors are attacked.
        budget: of each attack.
    """
    proxy = train_soft_proxy(data, seed, model, T, recipe)
    attacks = strong_attacks(model, T, {"transfer, other end": other, "transfer, soft proxy": proxy}, budget)
    out = {}
    for ball, (eps, record) in balls.items():
        examples = record["examples"]
        broken = [unpack_bits(bits) for bits in examples["broken_by"].values()]
        right = unpack_bits(examples["correct_clean"]) & ~np.any(broken, axis=0)
        left, broke = attack_survivors(model, test, derive_seed(seed, STRONG) % 2**31, eps, attacks, right)
        out[ball] = {"accuracy": float(left.mean()), "broke": broke, "outcomes": pack_draws(left[None])}
    return out


def attack_ends(
    ends: Mapping[str, tuple[float, nn.Module]],
    data: Data,
    test: Split,
    seed: int,
    recipe: NetworkRecipe,
    eps: Mapping[str, float],
    records: Mapping[str, Mapping[str, Mapping[str, Any]]],
    budget: StrongBudget,
    jobs: int = 1,
) -> dict[str, dict[str, dict[str, Any]]]:
    """Return the results of `attack_strongly` for the networks of the lowest and the highest temperature, by name.

    `ends`: the two networks by name, each with its temperature and at the scale of logits that it is used with; `eps`:
    radii of the balls by name; `records`: those of `lib.experiments.defensive.evaluate_network`, network → ball. One
    temperature alone has no other end, and its result is of a transfer from itself.
    """
    names = list(ends)
    calls = []
    for name, (T, model) in ends.items():
        other_T, other = ends[names[-1] if name == names[0] else names[0]]
        balls = {ball: (radius, records[name][ball]) for ball, radius in eps.items()}
        surrogate = ScaledLogits(other, other_T).eval()
        calls.append((model, surrogate, T, data, test, seed, recipe, balls, budget))
    return dict(zip(names, parallel.parallel_map(attack_strongly, calls, jobs, "stronger attacks"), strict=True))


def defensive_outcomes(
    records: Mapping[str, Mapping[str, Mapping[str, Any]]],
    strong: Mapping[str, Mapping[str, dict[str, Any]]],
    eps: Mapping[str, float],
) -> dict[str, dict[str, dict[str, Any]]]:
    """Return which images each network classifies correctly: network → condition → packed answers.

    Conditions: `clean`; `<attack>@<eps>` and `worst@<eps>`; for what `attack_ends` attacked `strong@<eps>`; the attacks
    of least distance by name, which have no ball. The outcomes are removed from `strong`, which goes into the metrics.
    """
    out: dict[str, dict[str, dict[str, Any]]] = {}
    for name, balls in records.items():
        out[name] = {}
        for ball, record in balls.items():
            answers = attack_outcomes(record, eps.get(ball))
            out[name] |= {k: bits for k, bits in answers.items() if ball in eps or k not in (NO_ATTACK, WORST)}
        for ball, result in strong.get(name, {}).items():
            out[name][ball_condition(STRONG, eps[ball])] = result.pop("outcomes")
    return out
