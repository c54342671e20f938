"""One set of attacks for every defence of a comparison, with one effort, and the worst image of all of them.

Two defences can be compared only under the same attacks. The set holds the exact gradient of the whole defence with
expectation over its noise, by two losses, AutoAttack's APGD for random models, and the simpler attacks of publications
(backward pass approximated, classifier alone, one fixed noise, no gradient). Every defence also meets the images that
were made for the others. Per image the worst of all is chosen on some draws and measured on fresh ones: choosing and
measuring on the same draws would flatter the attack, the more the more images there are to choose from.

A purifier of many steps is climbed first in few, which costs as many times less, and then exactly
(`python -m lib.pipeline.audit attack` compares that with exact gradients all the way).
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lib.attacks.bpda import bpda
from lib.attacks.common import LossName, Model
from lib.attacks.eot_pgd import annealed_pgd
from lib.evaluation.outcomes import passes_per_batch, repeated_logits
from lib.purify import PurifiedClassifier
from lib.utils.random_state import seeded_noise
from lib.utils.seeds import derive_seed
from lib.utils.validation import PositiveInt

FINE_SHARE, FINE_FIRST = 8, 0.2  # after a coarse climb: an eighth of the steps, the first of them a fifth of eps
EXACT = ("exact-ce", "exact-margin")  # by both losses; their images are tried on all other defences


class AttackEffort(NamedTuple):
    """Effort of each attack, the same for every defence: `steps` x `eot` gradients per image, `queries` of Square.

    A deterministic defence, which needs no average, has as many gradients in `steps` x `eot` steps.
    """

    steps: int = 16
    eot: int = 4
    queries: int = 200


class MeasuringDraws(NamedTuple):
    """Draws per image: `first` of every candidate, `second` more of the `finalists` worst; `fresh` for the result."""

    first: int = 4
    finalists: int = 4
    second: int = 12
    fresh: int = 60


def annealed_attack(
    model: Model,
    x: Float[Tensor, "n c h w"],
    y: Int[Tensor, " n"],
    eps: float,
    norm: str,
    generator: torch.Generator,
    *,
    steps: PositiveInt,
    eot: PositiveInt,
    loss: LossName = "ce",
    coarse: Any = None,
) -> Float[Tensor, "n c h w"]:
    """Attack by `lib.attacks.eot_pgd.annealed_pgd`; it is what `lib.evaluation.robust_accuracy` takes as a `name`.

    Args:
        model: answers logits for images in [0, 1], at random.
        x: images (n, c, h, w), in [0, 1].
        y: labels (n,).
        eps: radius of the ball, in pixel units.
        norm: "Linf" or "L2".
        generator: one number drawn from it is the seed.
        steps: gradient steps.
        eot: passes averaged for each gradient.
        loss: name of the loss, see `lib.attacks.common.get_loss`.
        coarse: the same defence with a purifier of few steps, climbed first; the exact gradient then goes on from
            there for an eighth of the steps. None for the exact gradient alone.

    Returns:
        Adversarial images of the same shape.
    """
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    options: dict[str, Any] = {"steps": steps, "loss": loss, "draws": eot}
    if coarse is not None:
        at_once = passes_per_batch(coarse, x, eot, graph=True)
        start = annealed_pgd(coarse, x, y, eps, norm, seed, at_once=at_once, **options)
        options |= {"start": start, "steps": max(1, steps // FINE_SHARE), "first": FINE_FIRST}
    at_once = passes_per_batch(model, x, eot, graph=True)
    return annealed_pgd(model, x, y, eps, norm, seed, at_once=at_once, **options)


def matched_attacks(
    defence: PurifiedClassifier, effort: AttackEffort, seed: int, coarse: PurifiedClassifier | None = None
) -> dict[str, dict[str, Any]]:
    """Return the attacks of the set on one defence, as `lib.evaluation.robust_accuracy` takes them.

    Args:
        defence: a purified classifier; `lib.purify.IdentityPurifier` for a classifier alone.
        effort: of each attack.
        seed: of the noise that the attack "fixed" takes for the defence's own.
        coarse: the same defence with a purifier of few steps, for one of many: the exact attacks begin on it and the
            others, but for the grey box, are made on it.

    Returns:
        Label → attack. "exact-ce", "exact-margin": the gradient through every step, averaged over noise; "apgd":
        AutoAttack's version for random models (Croce and Hein 2020a); "bpda": the purifier's gradient taken for the
        identity (Athalye et al. 2018a); "grey": on the classifier alone; "fixed": exact for one noise, which is not
        averaged over; "square": without gradients (Andriushchenko et al. 2020).
    """
    model = coarse or defence
    deterministic = not model.random
    climb = {"steps": effort.steps, "eot": effort.eot}
    alone = {"steps": effort.steps * effort.eot, "eot": 1}
    own = alone if deterministic else climb
    attacks: dict[str, dict[str, Any]] = {
        f"exact-{loss}": {"name": annealed_attack, "loss": loss, "coarse": coarse} | own for loss in ("ce", "margin")
    }
    attacks["apgd"] = {"name": "apgd-ce", "model": model} | own
    straight = PurifiedClassifier(bpda(model.purifier), model.classifier)
    attacks["bpda"] = {"name": annealed_attack, "model": straight} | own
    attacks["grey"] = {"name": annealed_attack, "model": model.classifier} | alone
    fixed = PurifiedClassifier(model.purifier, model.classifier, fixed=seed) if model.random else model
    attacks["fixed"] = {"name": annealed_attack, "model": fixed} | alone
    attacks["square"] = {"name": "square", "model": model, "queries": effort.queries}
    return attacks


def correct_draws(
    model: PurifiedClassifier, x: Float[Tensor, "n c h w"], y: Int[Tensor, " n"], draws: int, seed: int, purpose: str
) -> tuple[Bool[np.ndarray, "draws n"], Float[np.ndarray, " n"]]:
    """Classify images several times.

    Args:
        model: a defence; a deterministic one is asked once.
        x: images (n, c, h, w), in [0, 1].
        y: labels (n,).
        draws: passes per image.
        seed: decides the noise.
        purpose: of these draws; other purposes have independent noise.

    Returns:
        Whether each answer is right (draws, n), one row for a deterministic defence, and the mean probability of the
        label (n,); an answer that is not finite is wrong.
    """
    draws = draws if model.random else 1
    with seeded_noise(model, derive_seed(seed, f"draws/{purpose}"), x.device):
        z = repeated_logits(model, x, draws, passes_per_batch(model, x, draws, graph=False))
    finite = z.isfinite().all(-1)
    right = finite & (z.argmax(-1) == y)
    label = z.softmax(-1).gather(-1, y.expand(draws, -1)[..., None]).squeeze(-1).masked_fill(~finite, 0)
    return right.cpu().numpy(), label.mean(0).double().cpu().numpy()


class WorstImages(NamedTuple):
    """The worst image of each example (n, c, h, w), the label of its candidate, and every candidate's first draws."""

    images: Float[Tensor, "n c h w"]
    labels: list[str]
    draws: dict[str, Bool[np.ndarray, "draws n"]]


def worst_images(
    model: PurifiedClassifier,
    candidates: Mapping[str, Float[Tensor, "n c h w"]],
    y: Int[Tensor, " n"],
    draws: MeasuringDraws,
    seed: int,
) -> WorstImages:
    """Choose for each example the candidate that the defence gets right least often.

    All candidates have `draws.first` draws and the `draws.finalists` worst of each example `draws.second` more. Worst
    is the least mean of right answers and of the label's probability, which tells apart what few draws do not.

    Args:
        model: a defence.
        candidates: images (n, c, h, w) of the same examples by label.
        y: labels (n,).
        draws: how many.
        seed: decides the noise.

    Returns:
        The chosen images, their candidates' labels, and the first draws of all candidates, in which none was chosen.
    """
    labels = list(candidates)
    images = torch.stack([candidates[label] for label in labels])
    first: dict[str, np.ndarray] = {}
    totals = np.zeros((len(labels), len(y)))
    for k, label in enumerate(labels):
        first[label], sureness = correct_draws(model, images[k], y, draws.first, seed, f"first/{label}")
        totals[k] = (first[label].mean(0) + sureness) / 2
    if not model.random:
        chosen = totals.argmin(0)
    else:
        finalists = totals.argsort(0, kind="stable")[: draws.finalists]  # (finalists, n)
        more = np.zeros(finalists.shape)
        for k, rows in enumerate(finalists):
            x = images[torch.from_numpy(rows).to(y.device), torch.arange(len(y), device=y.device)]
            right, sureness = correct_draws(model, x, y, draws.second, seed, f"second/{k}")
            more[k] = (right.mean(0) + sureness) / 2
        both = np.take_along_axis(totals, finalists, 0) * draws.first + more * draws.second
        chosen = np.take_along_axis(finalists, both.argmin(0)[None], 0)[0]
    worst = images[torch.from_numpy(chosen).to(y.device), torch.arange(len(y), device=y.device)]
    return WorstImages(worst, [labels[k] for k in chosen], first)


def count_labels(labels: Sequence[str]) -> dict[str, int]:
    """Return how often each label was chosen, most often first."""
    values, counts = np.unique(np.array(labels, dtype=object).astype(str), return_counts=True)
    return {str(values[k]): int(counts[k]) for k in np.argsort(-counts, kind="stable")}
