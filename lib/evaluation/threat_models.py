"""Threat models against a purified classifier, and what is left of it: the evaluation protocol of experiment 5.

A row is one threat model. Its images are put to the defence `draws` times: average over draws, worst of them, majority.
Asking often finds errors without any attack, so each row has the control of as many questions about clean images. The
same images can be put to other defences too: then the attacked one was their surrogate.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lib.attacks.api import attack
from lib.attacks.bpda import bpda
from lib.attacks.common import margin
from lib.attacks.eot_pgd import eot_pgd
from lib.evaluation.outcomes import outcomes, repeated_predictions
from lib.evaluation.robust_accuracy import robust_accuracy
from lib.purify import PurifiedClassifier, PurifierProtocol
from lib.utils.content_hash import content_hash
from lib.utils.intervals import wilson
from lib.utils.random_state import seeded_noise
from lib.utils.seeds import derive_seed, seeded_generator

GRAPH_LIMIT = 10**6  # pixels times network evaluations in one graph: some GB
BATCH_LIMIT = 1024  # images at once without a graph
MEASURES = ("clean", "average", "worst", "majority", "control")
THREAT_MODELS = ("none", "grey", "bpda", "exact", "apgd", "fixed", "square")


class AttackBudget(NamedTuple):
    """Effort of the attacks that follow gradients, and how often the final images are asked about.

    `steps` of eps / 4; `eot`: passes averaged for each gradient; `queries`: of Square.
    """

    steps: int = 100
    eot: int = 16
    restarts: int = 1
    draws: int = 10
    queries: int = 1000


def passes_per_batch(model: nn.Module, images: Float[Tensor, "n c h w"], passes: int, graph: bool) -> int:
    """Returns how many of some `passes` through a model are asked for as one batch, `graph`: with what gradients need.

    A purifier's noise is each image's own, so that they stay independent; of another model that is not known.
    """
    if not isinstance(model, PurifiedClassifier) or model.fixed is not None:
        return 1
    evaluations = model.votes * max(1, getattr(model.purifier, "evaluations", 1))
    room = GRAPH_LIMIT // (images.numel() * evaluations) if graph else BATCH_LIMIT // len(images)
    return max(1, min(passes, room))


def surrogate_attack(stand_in: nn.Module, name: str, **options: Any) -> Callable:
    """Returns an attack for `lib.evaluation.robust_accuracy` that is made on `stand_in`, whatever it is then put to."""

    def made(model: Callable, x: Tensor, y: Tensor, eps: float, norm: str, rng: torch.Generator, **more: Any) -> Tensor:
        return attack(name, stand_in, x, y, eps, norm, rng, progress=False, **options, **more)

    return made


def eot_attack(stand_in: nn.Module, eps: float, budget: AttackBudget, eot: int) -> Callable:
    """Returns PGD on the expected loss of `stand_in`, over `eot` draws, as an attack for `lib.evaluation.robust_accuracy`."""
    options = {"steps": budget.steps, "restarts": budget.restarts, "draws": eot}

    def made(model: Callable, x: Tensor, y: Tensor, eps: float, norm: str, rng: torch.Generator) -> Tensor:
        at_once = passes_per_batch(stand_in, x, eot, graph=True)
        seed = int(torch.randint(2**62, (), generator=rng, device=rng.device))
        return eot_pgd(stand_in, x, y, eps, norm, seed, at_once=at_once, **options)

    return made


class RecordingAttack:
    """An attack that keeps what it makes of each image, so that others can be asked about the same ones."""

    def __init__(self, made: Callable) -> None:
        self.made = made
        self.known: dict[bytes, Tensor] = {}

    def __call__(self, model: Callable, x: Tensor, *where: Any, **more: Any) -> Tensor:
        made = self.made(model, x, *where, **more)
        self.known.update(zip(map(content_hash, x), made, strict=True))
        return made

    def images(self, x: Tensor) -> Tensor:
        """Returns what was made of these images; those that were never attacked as they are."""
        return torch.stack([self.known.get(content_hash(image), image) for image in x])


def threat_attacks(row: str, defence: PurifiedClassifier, eps: float, budget: AttackBudget) -> dict[str, Callable]:
    """Returns the attacks of a threat model, one of `THREAT_MODELS`, as `lib.evaluation.robust_accuracy` takes them; ValueError otherwise.

    "grey": on the classifier alone; "bpda": the purifier's gradient taken for the identity; "exact": through every
    step; "apgd": AutoAttack's version for random models; "fixed": exact, one pass, for a defence whose noise is fixed.
    """
    blind = PurifiedClassifier(bpda(defence.purifier), defence.classifier)
    known = {
        "none": {},
        "grey": {"grey": eot_attack(defence.classifier, eps, budget, 1)},
        "bpda": {"bpda": eot_attack(blind, eps, budget, budget.eot)},
        "exact": {"exact": eot_attack(defence, eps, budget, budget.eot)},
        "apgd": {
            f"apgd-{loss}": surrogate_attack(defence, f"apgd-{loss}", steps=budget.steps, eot=budget.eot)
            for loss in ("ce", "dlr")
        },
        "fixed": {"fixed": eot_attack(defence, eps, budget, 1)},
        "square": {"square": surrogate_attack(defence, "square", queries=budget.queries)},
    }
    if row not in known:
        raise ValueError(f"unknown threat model {row!r}: choose one of {', '.join(known)}")
    return known[row]


def evaluate_under_attack(
    row: str,
    defence: PurifiedClassifier,
    x: Float[Tensor, "n c h w"],
    y: Int[Tensor, " n"],
    *,
    eps: float,
    norm: str = "Linf",
    budget: AttackBudget,
    seed: int = 0,
    others: Mapping[str, nn.Module] | None = None,
) -> dict[str, Any]:
    """Returns what a threat model leaves of a defence on images in [0, 1], shares in [0, 1].

    `average`, `worst` of the draws and `majority`, `control`: the worst of as many questions about clean images, and
    `clean`: the average there; `intervals`: Wilson's of these at 95 %, over images; `attacks`: the average that each
    one leaves. A row "fixed" is asked about a defence with fixed noise, once. Under `others` what other defences,
    by name, answer to the images made for this one: average, worst and majority.
    """
    if row == "fixed":
        defence = PurifiedClassifier(defence.purifier, defence.classifier, fixed=seed)
    made = {name: RecordingAttack(attack) for name, attack in threat_attacks(row, defence, eps, budget).items()}
    draws = 1 if row == "fixed" else budget.draws
    attacks = {name: {"name": attack} for name, attack in made.items()}
    options = {"seed": seed, "draws": draws, "at_once": passes_per_batch(defence, x, draws, graph=False)}
    found = robust_accuracy(defence, attacks, x, y, eps=eps, norm=norm, progress=False, **options)
    robust, clean = found["robust"], found["clean"]["accuracy"]
    out = {"average": robust["accuracy"], "clean": clean, "n": len(y)}
    out["worst"] = robust.get("worst_of_n", out["average"])
    out["majority"] = robust.get("majority", out["average"])
    out["control"] = robust.get("control_worst_of_n", clean)
    out["intervals"] = {k: list(wilson(round(out[k] * len(y)), len(y))) for k in MEASURES}
    out["attacks"] = {name: found["attacks"][name]["accuracy"] for name in made}
    images = [attack.images(x) for attack in made.values()] or [x]
    return out | {
        "others": {name: evaluate_transferred(other, images, y, draws, seed) for name, other in (others or {}).items()}
    }


@torch.no_grad()
def evaluate_transferred(
    model: nn.Module, images: Sequence[Float[Tensor, "n c h w"]], y: Int[Tensor, " n"], draws: int, seed: int
) -> dict[str, float]:
    """Returns `average`, `worst` and `majority` of a model's `draws` answers, the least over sets of images."""
    found = []
    for k, x in enumerate(images):
        with seeded_noise(model, derive_seed(seed, f"asked/{k}"), x.device):
            votes = repeated_predictions(model, x, draws, passes_per_batch(model, x, draws, graph=False))
        found.append(outcomes(votes.cpu().numpy(), y.cpu().numpy()))
    names = {"average": "accuracy", "worst": "worst_of_n", "majority": "majority"}
    return {name: float(np.min([f[key] for f in found], axis=0).mean()) for name, key in names.items()}


@torch.no_grad()
def residual_perturbation(
    purifier: PurifierProtocol,
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
    clean, left = (purifier(images, seeded_generator(seed, "inheritance", x.device)) for images in (x, x_adv))
    r = (left - clean).flatten(1)
    far, near = delta.norm(dim=1).clamp_min(1e-12), r.norm(dim=1).clamp_min(1e-12)
    lost = [margin(classifier(a), y) - margin(classifier(b), y) for a, b in ((clean, left), (x, x_adv))]
    return {
        "projection": ((r * delta).sum(1) / far**2).mean().item(),
        "ratio": (near / far).mean().item(),
        "damage": (lost[0].mean() / near.mean()).item(),
        "damage_before": (lost[1].mean() / far.mean()).item(),
    }
