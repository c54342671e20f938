"""One set of attacks for every defence of a comparison, with one effort, and the worst image of all of them.

Two defences can be compared only under the same attacks. The set holds the exact gradient of the whole defence with
expectation over its noise, by two losses, AutoAttack's APGD for random models, and the simpler attacks of publications
(backward pass approximated, classifier alone, one fixed noise, no gradient). Every defence also meets the images that
were made for the others. Per image the worst of all is chosen on draws with the same noise for each, the exact gradient
climbs on from there with more draws, and what is left is measured on fresh draws: choosing and measuring on the same
draws would flatter the attack, the more the more images there are to choose from. How much less an independent loop of
160,000 gradients per image leaves: tests/evaluation/test_matched_strength.py.

A purifier of many steps is attacked in few steps, which costs as many times less, and only the last climb has its exact
gradient (`python -m lib.pipeline.audit attack` compares that with exact gradients all the way).
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lib.attacks.bpda import bpda
from lib.attacks.common import Model
from lib.attacks.eot_pgd import annealed_pgd
from lib.attacks.low_frequency import low_frequency_attack
from lib.evaluation.outcomes import passes_per_batch, repeated_logits
from lib.purify import PurifiedClassifier
from lib.utils.random_state import seeded_noise
from lib.utils.seeds import derive_seed
from lib.utils.validation import PositiveInt

EXACT = ("exact-ce", "exact-margin", "exact-ten")  # the first one's images are tried on all other defences
LAST, LAST_FIRST = "last climb", 0.2  # its first step as a share of eps
LONG_STEPS, LONG_EOT = 4, 2  # a purifier of many steps has in it a fourth of the steps, of half as many draws
WIDER = 2  # times eps: the radius of the attack outside the ball


class AttackEffort(NamedTuple):
    """Effort of each attack, the same for every defence: `steps` x `eot` gradients per image, `queries` of Square.

    The last climb, from the worst image of all, has `last_steps` x `last_eot` gradients. A deterministic defence, which
    needs no average, has as many gradients in as many steps.
    """

    steps: int = 16
    eot: int = 4
    queries: int = 200
    last_steps: int = 8
    last_eot: int = 16


class MeasuringDraws(NamedTuple):
    """Draws per image: `first` of every candidate, `second` more of the `finalists` worst; `fresh` for the result."""

    first: int = 8
    finalists: int = 4
    second: int = 32
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
    **options: Any,
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
        options: others of `annealed_pgd`: loss, over, start, first.

    Returns:
        Adversarial images of the same shape.
    """
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    at_once = passes_per_batch(model, x, eot, graph=True)
    return annealed_pgd(model, x, y, eps, norm, seed, steps=steps, draws=eot, at_once=at_once, **options)


def wider_attack(
    model: Model,
    x: Float[Tensor, "n c h w"],
    y: Int[Tensor, " n"],
    eps: float,
    norm: str,
    generator: torch.Generator,
    *,
    steps: PositiveInt,
    eot: PositiveInt,
) -> Float[Tensor, "n c h w"]:
    """Attack by `lib.attacks.low_frequency.low_frequency_attack`, as `annealed_attack` does by PGD.

    Args:
        model: answers logits for images in [0, 1], at random.
        x: images (n, c, h, w), in [0, 1].
        y: labels (n,).
        eps: largest change of a pixel, in pixel units.
        norm: not used: the change of a pixel is what is bounded.
        generator: one number drawn from it is the seed.
        steps: gradient steps.
        eot: passes averaged for each gradient.

    Returns:
        Adversarial images of the same shape.
    """
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    at_once = passes_per_batch(model, x, eot, graph=True)
    return low_frequency_attack(model, x, y, eps, seed, steps=steps, draws=eot, at_once=at_once)


def outside_attack(
    defence: PurifiedClassifier, effort: AttackEffort, eps: float, coarse: PurifiedClassifier | None = None
) -> dict[str, Any]:
    """Return the attack outside the ball of `eps`: smooth, of `WIDER` times its radius, in no worst case.

    Args:
        defence: a purified classifier.
        effort: of each attack.
        eps: radius of the ball of the matched set, in pixel units.
        coarse: see `matched_attacks`.

    Returns:
        The attack, as `lib.evaluation.robust_accuracy` takes it.
    """
    model = coarse or defence
    own = (effort.steps, effort.eot) if model.random else (effort.steps * effort.eot, 1)
    return {"name": wider_attack, "model": model, "eps": WIDER * eps, "steps": own[0], "eot": own[1]}


def last_climb(
    defence: PurifiedClassifier,
    start: Float[Tensor, "n c h w"],
    effort: AttackEffort,
    long: bool = False,
) -> dict[str, Any]:
    """Return the attack that climbs on from the worst images, by small steps of the exact gradient with more draws.

    Args:
        defence: a purified classifier.
        start: the worst images (n, c, h, w).
        effort: of each attack.
        long: whether the purifier has many steps, so that it affords an eighth of the gradients.

    Returns:
        The attack, as `lib.evaluation.robust_accuracy` takes it.
    """
    steps, eot = effort.last_steps, effort.last_eot
    if long:
        steps, eot = max(1, steps // LONG_STEPS), max(1, eot // LONG_EOT)
    own = {"steps": steps, "eot": eot} if defence.random else {"steps": steps * eot, "eot": 1}
    return {"name": annealed_attack, "start": start, "first": LAST_FIRST} | own


def matched_attacks(
    defence: PurifiedClassifier, effort: AttackEffort, seed: int, coarse: PurifiedClassifier | None = None
) -> dict[str, dict[str, Any]]:
    """Return the attacks of the set on one defence, as `lib.evaluation.robust_accuracy` takes them.

    Args:
        defence: a purified classifier; `lib.purify.IdentityPurifier` for a classifier alone.
        effort: of each attack.
        seed: of the noise that the attack "fixed" takes for the defence's own.
        coarse: the same defence with a purifier of few steps, for one of many: the attacks are made on it.

    Returns:
        Label → attack. "exact-ce", "exact-margin": the gradient through every step, averaged over noise; "exact-ten":
        that of the draws nearest to failing, against a random defence that must be right ten times of ten; "apgd":
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
        f"exact-{loss}": {"name": annealed_attack, "model": model, "loss": loss} | own for loss in ("ce", "margin")
    }
    if model.random:
        attacks["exact-ten"] = attacks["exact-ce"] | {"over": "worst"}
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

    All candidates have `draws.first` draws and the `draws.finalists` worst of each example `draws.second` more, with
    the same noise for each, so that they are compared and not their noise. Worst is the least mean of right answers
    and of the label's probability, which tells apart what few draws do not.

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
    columns = torch.arange(len(y), device=y.device)
    first = [correct_draws(model, some, y, draws.first, seed, "first") for some in images]
    scores = np.stack([(right.mean(0) + sureness) / 2 for right, sureness in first])  # (candidates, n)
    chosen = scores.argmin(0)
    if model.random:
        finalists = scores.argsort(0, kind="stable")[: draws.finalists]  # (finalists, n)
        some = [images[torch.from_numpy(rows).to(y.device), columns] for rows in finalists]
        second = [correct_draws(model, x, y, draws.second, seed, "second") for x in some]
        more = np.stack([(right.mean(0) + sureness) / 2 for right, sureness in second])
        both = np.take_along_axis(scores, finalists, 0) * draws.first + more * draws.second
        chosen = np.take_along_axis(finalists, both.argmin(0)[None], 0)[0]
    worst = images[torch.from_numpy(chosen).to(y.device), columns]
    draws_of = {label: right for label, (right, _) in zip(labels, first, strict=True)}
    return WorstImages(worst, [labels[k] for k in chosen], draws_of)


def count_labels(labels: Sequence[str]) -> dict[str, int]:
    """Return how often each label was chosen, most often first."""
    values, counts = np.unique(np.array(labels, dtype=object).astype(str), return_counts=True)
    return {str(values[k]): int(counts[k]) for k in np.argsort(-counts, kind="stable")}
