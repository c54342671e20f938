"""Threat models against a purified classifier, and what each leaves of it: the evaluation protocol of experiment 5.

The images of a threat model are classified by the defence `draws` times: average over draws, worst of N, majority. Many
draws find errors without any attack, so each result has its control, as many draws on clean images. The same images can
be scored on other defences too: then the attacked one was their surrogate.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lib.attacks.bpda import bpda
from lib.attacks.common import Model, margin
from lib.attacks.eot_pgd import eot_pgd
from lib.evaluation.attack_plan import EvaluationSettings
from lib.evaluation.outcomes import outcomes, passes_per_batch, repeated_predictions
from lib.evaluation.robust_accuracy import evaluate_attacks
from lib.purify import PurifiedClassifier, PurifierProtocol
from lib.utils.intervals import wilson
from lib.utils.random_state import randn_like, seeded_noise
from lib.utils.seeds import derive_seed, seeded_generator
from lib.utils.validation import PositiveInt, check_value, from_settings

MEASURES = ("clean", "average", "worst", "majority", "control")
THREAT_MODELS = ("none", "grey", "bpda", "exact", "apgd", "fixed", "square")


class AttackBudget(NamedTuple):
    """Effort of the attacks that follow gradients, and how often the final images are classified.

    `steps` of eps / 4; `eot`: passes averaged for each gradient; `queries`: of Square.
    """

    steps: int = 100
    eot: int = 16
    restarts: int = 1
    draws: int = 10
    queries: int = 1000


def eot_attack(
    model: Model,
    x: Float[Tensor, "n c h w"],
    y: Int[Tensor, " n"],
    eps: float,
    norm: str,
    generator: torch.Generator,
    *,
    steps: PositiveInt,
    eot: PositiveInt,
    restarts: PositiveInt = 1,
) -> Float[Tensor, "n c h w"]:
    """Attack by PGD on the expected loss over `eot` draws (`lib.attacks.eot_pgd`), steps of eps / 4.

    It is what `lib.evaluation.robust_accuracy` takes as the `name` of an attack.

    Args:
        model: answers logits for images in [0, 1], at random.
        x: images (n, c, h, w), in [0, 1].
        y: labels (n,).
        eps: radius of the ball, in pixel units.
        norm: "Linf" or "L2".
        generator: one number drawn from it is the seed.
        steps: gradient steps of a restart.
        eot: passes averaged for each gradient, in one batch as far as `passes_per_batch` allows.
        restarts: number of random starts.

    Returns:
        Adversarial images of the same shape.
    """
    at_once = passes_per_batch(model, x, eot, graph=True)
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    effort = {"steps": steps, "restarts": restarts, "draws": eot, "at_once": at_once}
    return eot_pgd(model, x, y, eps, norm, seed, **effort)


def threat_attacks(threat: Any, defence: PurifiedClassifier, budget: AttackBudget) -> dict[str, dict[str, Any]]:
    """Return the attacks of a threat model, as `lib.evaluation.robust_accuracy` takes them.

    Args:
        threat: "grey": on the classifier alone; "bpda": the purifier's gradient taken for the identity; "exact":
            through every step; "apgd": AutoAttack's version for random models; "fixed": exact, one pass, for a defence
            whose noise is fixed; "square": without gradients; "none".
        defence: the model under attack. "grey" and "bpda" attack a surrogate made of its parts.
        budget: steps, passes per gradient and queries.

    Returns:
        The attacks by label: name, options and, where it is not the defence, the attacked model.

    Raises:
        ValueError: if there is no such threat model.
    """
    exact = {"name": eot_attack, "steps": budget.steps, "eot": budget.eot, "restarts": budget.restarts}
    apgd = {"steps": budget.steps, "eot": budget.eot}
    attacks = {
        "none": {},
        "grey": {"grey": exact | {"eot": 1, "model": defence.classifier}},
        "bpda": {"bpda": exact | {"model": PurifiedClassifier(bpda(defence.purifier), defence.classifier)}},
        "exact": {"exact": exact},
        "apgd": {name: {"name": name} | apgd for name in ("apgd-ce", "apgd-dlr")},
        "fixed": {"fixed": exact | {"eot": 1}},
        "square": {"square": {"name": "square", "queries": budget.queries}},
    }
    if not isinstance(threat, str) or threat not in attacks:
        raise ValueError(f"unknown threat model {threat!r}: choose one of {', '.join(attacks)}")
    return attacks[threat]


def evaluate_under_attack(
    threat: Any,
    defence: Any,
    x: Any,
    y: Any,
    *,
    eps: Any,
    norm: Any = "Linf",
    budget: AttackBudget,
    seed: Any = 0,
    others: Mapping[str, nn.Module] | None = None,
) -> dict[str, Any]:
    """Evaluate a defence under one threat model.

    Args:
        threat: one of `THREAT_MODELS`. "fixed" evaluates the defence with fixed noise, in one draw.
        defence: a purified classifier.
        x: images (n, c, h, w), in [0, 1].
        y: labels (n,).
        eps: radius of the ball, in pixel units.
        norm: "Linf" or "L2".
        budget: effort of the attack, and draws per image.
        seed: decides all noise.
        others: more defences, by name, that classify the images made for this one.

    Returns:
        Shares in [0, 1]: `average`, `worst` of the draws and `majority`; `control`, the worst of as many draws on clean
        images, and `clean`, their average. `intervals`: Wilson's of these at 95 %, over images; `attacks`: the average
        that each one leaves; `others`: average, worst and majority of the other defences; `marks`: the sentences of
        `lib.evaluation.robust_accuracy.robust_accuracy`, none where nothing is wrong.

    Raises:
        ValueError: if there is no such threat model, or images, labels or settings are unusable.
    """
    remedy = "PurifiedClassifier(purifier, model), or robust_accuracy for another model"
    check_value("defence", defence, PurifiedClassifier, remedy)
    if isinstance(threat, str) and threat == "fixed":
        defence = PurifiedClassifier(defence.purifier, defence.classifier, fixed=seed)
    draws = 1 if threat == "fixed" else budget.draws
    ball = {"eps": eps, "norm": norm, "seed": seed, "draws": draws}
    settings = from_settings(EvaluationSettings, ball, "evaluate_under_attack")
    attacks = threat_attacks(threat, defence, budget)
    record, images = evaluate_attacks(defence, attacks, x, y, settings, progress=False)
    robust, clean = record["robust"], record["clean"]["accuracy"]
    out = {"average": robust["accuracy"], "clean": clean, "n": len(y)}
    out["worst"] = robust.get("worst_of_n", out["average"])
    out["majority"] = robust.get("majority", out["average"])
    out["control"] = robust.get("control_worst_of_n", clean)
    out["intervals"] = {k: list(wilson(round(out[k] * len(y)), len(y))) for k in MEASURES}
    out["attacks"] = {label: row["accuracy"] for label, row in record["attacks"].items()}
    out["marks"] = record["warnings"]
    sets = list(images.values()) or [x]
    return out | {"others": {name: score_images(model, sets, y, draws, seed) for name, model in (others or {}).items()}}


@torch.no_grad()
def score_images(
    model: nn.Module, images: Sequence[Float[Tensor, "n c h w"]], y: Int[Tensor, " n"], draws: int, seed: int
) -> dict[str, float]:
    """Score a model on sets of images of the same examples, in the worst case over the sets for each example.

    Args:
        model: classifier of images in [0, 1].
        images: one set (n, c, h, w) per attack.
        y: labels (n,).
        draws: predictions per image.
        seed: decides the model's noise.

    Returns:
        `average`, `worst` of the draws and `majority`, shares in [0, 1].
    """
    results = []
    for k, x in enumerate(images):
        with seeded_noise(model, derive_seed(seed, f"asked/{k}"), x.device):
            votes = repeated_predictions(model, x, draws, passes_per_batch(model, x, draws, graph=False))
        results.append(outcomes(votes.cpu().numpy(), y.cpu().numpy()))
    names = {"average": "accuracy", "worst": "worst_of_n", "majority": "majority"}
    return {name: float(np.min([result[key] for result in results], axis=0).mean()) for name, key in names.items()}


@torch.no_grad()
def residual_perturbation(
    purifier: PurifierProtocol,
    classifier: nn.Module,
    x: Float[Tensor, "n c h w"],
    x_adv: Float[Tensor, "n c h w"],
    y: Int[Tensor, " n"],
    seed: int = 0,
) -> dict[str, float]:
    """Measure how much of the perturbation δ = x_adv − x a purifier leaves.

    The residual perturbation is r = purify(x_adv) − purify(x), with the same noise for both.

    Args:
        purifier: maps images in [0, 1] to images.
        classifier: answers logits for images in [0, 1].
        x: clean images (n, c, h, w).
        x_adv: attacked images of the same shape.
        y: labels (n,).
        seed: decides the noise.

    Returns:
        Means over images. `projection`: ⟨r, δ⟩ / ‖δ‖², 1 when nothing is removed and 0 when r has nothing to do with δ;
        `ratio`: ‖r‖ / ‖δ‖; `damage`: the classifier's loss of logit margin per unit of ‖r‖, and `damage_before` per
        unit of ‖δ‖ without a purifier: r may be smaller than δ, and still point where it hurts.
    """
    delta = (x_adv - x).flatten(1)
    clean, purified = (
        purifier(images, randn_like(seeded_generator(seed, "inheritance", x.device))) for images in (x, x_adv)
    )
    r = (purified - clean).flatten(1)
    delta_norm, r_norm = delta.norm(dim=1).clamp_min(1e-12), r.norm(dim=1).clamp_min(1e-12)
    margin_loss = [margin(classifier(a), y) - margin(classifier(b), y) for a, b in ((clean, purified), (x, x_adv))]
    return {
        "projection": ((r * delta).sum(1) / delta_norm**2).mean().item(),
        "ratio": (r_norm / delta_norm).mean().item(),
        "damage": (margin_loss[0].mean() / r_norm.mean()).item(),
        "damage_before": (margin_loss[1].mean() / delta_norm.mean()).item(),
    }
