"""Threat models against a purified classifier, and what is left of it: the evaluation protocol of experiment 5.

A row is one threat model. Its images are put to the defence `draws` times: average over draws, worst of them, majority.
Asking often finds errors without any attack, so each row has the control of as many questions about clean images. The
same images can be put to other defences too: then the attacked one was their surrogate.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lib.attacks import attack
from lib.evaluate import robust_accuracy
from lib.pgd import margin
from lib.purify import PurifiedClassifier, Purifies
from lib.seeds import generator
from lib.stats import wilson
from lib.wrappers import bpda

ON = 1e6  # a margin that no image reaches: against a random defence an attack must not rest at its first success
ROWS = ("none", "grey", "bpda", "exact", "apgd", "fixed", "square")


class Budget(NamedTuple):
    """Effort of the attacks that follow gradients, and how often the final images are asked about.

    `steps` of eps / 4; `eot`: passes averaged for each gradient; `queries`: of Square.
    """

    steps: int = 100
    eot: int = 16
    restarts: int = 1
    draws: int = 10
    queries: int = 1000


def through(stand_in: nn.Module, name: str, **options: Any) -> Callable:
    """Returns an attack for `lib.evaluate` that is made on `stand_in`, whatever it is then put to."""

    def made(model: Callable, x: Tensor, y: Tensor, eps: float, norm: str, rng: torch.Generator, **more: Any) -> Tensor:
        return attack(name, stand_in, x, y, eps, norm, rng, progress=False, **options, **more)

    return made


def gradient(stand_in: nn.Module, eps: float, budget: Budget, eot: int) -> Callable:
    """Returns PGD through `stand_in` as an attack for `lib.evaluate`: it climbs on after a success."""
    options = {"steps": budget.steps, "alpha": eps / 4, "restarts": budget.restarts, "kappa": ON}
    return through(stand_in, "pgd", eot=eot, **options)


def remembered(made: Callable) -> Callable:
    """Returns an attack that makes its image of an image and label once: whom it is put to later gets the same one."""
    known: dict[bytes, Tensor] = {}

    def again(model: Callable, x: Tensor, y: Tensor, *where: Any, **more: Any) -> Tensor:
        keys = [image.cpu().numpy().tobytes() + bytes([int(label)]) for image, label in zip(x, y, strict=True)]
        new = [i for i, key in enumerate(keys) if key not in known]
        if new:
            known.update(zip([keys[i] for i in new], made(model, x[new], y[new], *where, **more), strict=True))
        return torch.stack([known[key] for key in keys])

    return again


def attacks_of(row: str, defence: PurifiedClassifier, eps: float, budget: Budget) -> dict[str, Callable]:
    """Returns the attacks of a threat model, one of `ROWS`, as `lib.evaluate` takes them; ValueError otherwise.

    "grey": on the classifier alone; "bpda": the purifier's gradient taken for the identity; "exact": through every
    step; "apgd": AutoAttack's version for random models; "fixed": exact, one pass, for a defence whose noise is fixed.
    """
    blind = PurifiedClassifier(bpda(defence.purifier), defence.classifier)
    known = {
        "none": {},
        "grey": {"grey": gradient(defence.classifier, eps, budget, 1)},
        "bpda": {"bpda": gradient(blind, eps, budget, budget.eot)},
        "exact": {"exact": gradient(defence, eps, budget, budget.eot)},
        "apgd": {
            f"apgd-{loss}": through(defence, f"apgd-{loss}", steps=budget.steps, eot=budget.eot)
            for loss in ("ce", "dlr")
        },
        "fixed": {"fixed": gradient(defence, eps, budget, 1)},
        "square": {"square": through(defence, "square", queries=budget.queries)},
    }
    if row not in known:
        raise ValueError(f"unknown threat model {row!r}: choose one of {', '.join(known)}")
    return known[row]


def face(
    row: str,
    defence: PurifiedClassifier,
    x: Float[Tensor, "n c h w"],
    y: Int[Tensor, " n"],
    *,
    eps: float,
    norm: str = "Linf",
    budget: Budget,
    seed: int = 0,
    others: Mapping[str, nn.Module] | None = None,
) -> dict[str, Any]:
    """Returns what a threat model leaves of a defence on images in [0, 1], shares in [0, 1].

    `average`, `worst` of the draws and `majority`, `control`: the worst of as many questions about clean images, and
    `clean`: the average there; `intervals`: Wilson's of these at 95 %, over images; `attacks`: the average that each
    one leaves. A row "fixed" is asked about a defence with fixed noise, once. Under `others` the same of other
    defences, by name, which get the images made for this one.
    """
    if row == "fixed":
        defence = PurifiedClassifier(defence.purifier, defence.classifier, fixed=seed)
    attacks = {name: {"name": remembered(made)} for name, made in attacks_of(row, defence, eps, budget).items()}

    def judged(model: nn.Module, draws: int) -> dict[str, Any]:
        found = robust_accuracy(model, attacks, x, y, eps=eps, norm=norm, seed=seed, draws=draws, progress=False)
        robust = found["robust"]
        out = {"average": robust["accuracy"], "clean": found["clean"]["accuracy"], "n": len(y)}
        out["worst"] = robust.get("worst_of_n", out["average"])
        out["majority"] = robust.get("majority", out["average"])
        out["control"] = robust.get("control_worst_of_n", out["clean"])
        shares = ("clean", "average", "worst", "majority", "control")
        out["intervals"] = {name: list(wilson(round(out[name] * len(y)), len(y))) for name in shares}
        return out | {"attacks": {name: found["attacks"][name]["accuracy"] for name in attacks}}

    own = judged(defence, 1 if row == "fixed" else budget.draws)
    return own | {"others": {name: judged(other, budget.draws) for name, other in (others or {}).items()}}


@torch.no_grad()
def inheritance(
    purifier: Purifies,
    classifier: nn.Module,
    x: Float[Tensor, "n c h w"],
    x_adv: Float[Tensor, "n c h w"],
    y: Int[Tensor, " n"],
    seed: int = 0,
) -> dict[str, float]:
    """Returns how much of δ = x_adv − x survives: r = purify(x_adv) − purify(x), with the same noise for both.

    `projection`: ⟨r, δ⟩ / ⟨δ, δ⟩, mean over images, 1 when nothing is removed and 0 when what is left has nothing to do
    with δ; `ratio`: ‖r‖ / ‖δ‖; `damage`: the classifier's loss of logit margin per unit of ‖r‖, and `damage_before` per
    unit of ‖δ‖ without a purifier: what is left may be less, and still point where it hurts.
    """
    delta = (x_adv - x).flatten(1)
    clean, left = (purifier(images, generator(seed, "inheritance", x.device)) for images in (x, x_adv))
    r = (left - clean).flatten(1)
    far, near = delta.norm(dim=1).clamp_min(1e-12), r.norm(dim=1).clamp_min(1e-12)
    lost = [margin(classifier(a), y) - margin(classifier(b), y) for a, b in ((clean, left), (x, x_adv))]
    return {
        "projection": ((r * delta).sum(1) / far**2).mean().item(),
        "ratio": (near / far).mean().item(),
        "damage": (lost[0].mean() / near.mean()).item(),
        "damage_before": (lost[1].mean() / far.mean()).item(),
    }
