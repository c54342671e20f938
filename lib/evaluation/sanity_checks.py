"""Is that robustness real? Signs of masked gradients and of attacks that failed, in one table; flags, not a proof.

Every number in the table is a share of examples unless its check says otherwise, and is worse the higher it is; a check
is red above its threshold. `CHECKS` has all thresholds with their reasons. A table without red flags is no proof: an
adaptive attack may still be needed (Tramer et al. 2020).
"""

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lib.attacks.api import attack
from lib.attacks.checks import check_labels, checked_logits
from lib.attacks.common import (
    cross_entropy,
    loss_and_grad,
    margin,
    project,
    random_start,
    steepest_direction,
    step_size,
)
from lib.data import check_images
from lib.models import predict_classes
from lib.utils import parallel, per_image_rng
from lib.utils.device import to_model_device
from lib.utils.random_state import seeded_noise
from lib.utils.seeds import derive_seed, seeded_generator


class Check(NamedTuple):
    """What a check compares with, where it comes from, why this threshold, and what to do when it is red."""

    threshold: float
    source: str
    reason: str
    advice: str


MASKED = "attack with losses free of the scale (margin, DLR), without gradients (Square), and by transfer"
STRONGER = "more steps, restarts and other losses before any claim"
TWO = "2 of 100 images may differ by chance"
CW_2017, CARLINI_2019, ATHALYE_2018, PINTOR_2022 = (
    "Carlini and Wagner 2017, VIII",
    "Carlini et al. 2019, checklist",
    "Athalye et al. 2018, signs",
    "Pintor et al. 2022, indicator",
)
CHECKS = {
    name: Check(threshold, source, reason, advice)
    for name, threshold, source, reason, advice in (
        ("zero gradients", 0.01, f"{CW_2017}; {PINTOR_2022}, 1", "1 % forgives a few images of extreme margin", MASKED),
        ("logit margin, median", 88.0, CW_2017, "e^-88 is float32's smallest normal number", MASKED),
        ("logit margin, 95 %", 104.0, CW_2017, "from 104 the cross-entropy's float32 gradient is 0", MASKED),
        (
            "float32 vs float64 gradients",
            0.05,
            CW_2017,
            "from margin 17 rounding turns some, rarely by 60°",
            "use float64",
        ),
        ("float32 vs float64 attack", 0.03, CW_2017, TWO, "attack in float64"),
        (
            "one-step vs iterative",
            0.01,
            f"{ATHALYE_2018}; {CARLINI_2019}",
            "PGD from many starts can take its step",
            STRONGER,
        ),
        ("white-box vs Square", 0.03, f"{ATHALYE_2018}; AutoAttack's flag", "its 0.2 points need 1000 images", MASKED),
        ("white-box vs transfer", 0.03, CARLINI_2019, TWO, MASKED),
        ("white-box vs noise", 0.01, ATHALYE_2018, "noise is the weakest attack there is", MASKED),
        (
            "no-attack control",
            0.01,
            CARLINI_2019,
            "asking again without an attack changes nothing",
            "ask with draws > 1",
        ),
        ("larger eps, no better", 0.03, ATHALYE_2018, TWO, STRONGER),
        ("accuracy at grey eps", math.nan, CARLINI_2019, "one grey image is in every ball: chance, 1/k", STRONGER),
        (
            "unbounded attack",
            0.0,
            f"{ATHALYE_2018}; {PINTOR_2022}, 6",
            "every image can be replaced by any other",
            MASKED,
        ),
        ("more restarts", 0.03, CARLINI_2019, TWO, "more restarts"),
        ("more steps", 0.03, CARLINI_2019, TWO, "more steps"),
        ("loss landscape", 0.1, f"{PINTOR_2022}, 2", "10 % mean relative change within eps / 20", "BPDA, EOT"),
        ("silent success", 0.05, f"{PINTOR_2022}, 3", "a last step may fall back by chance", "keep the best point"),
        (
            "incomplete optimisation",
            0.2,
            f"{PINTOR_2022}, 4",
            "measured on digits: 0.05-0.13 when converged",
            "more steps",
        ),
        (
            "transfer failure",
            0.05,
            f"{PINTOR_2022}, 5",
            "what fools the attacked function fools the model",
            "closer stand-in",
        ),
        ("random answers", 0.0, ATHALYE_2018, "any change between two answers is noise", "attack with eot, ask often"),
        ("softmax output", 0.5, CW_2017, "rows that sum to 1 are no logits", "give the logits before the softmax"),
    )
}


class LogProbabilities(nn.Module):
    """Turns probabilities into logits."""

    def forward(self, p: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
        return p.clamp_min(1e-38).log()


class CheckBudget(NamedTuple):
    """Effort: PGD's steps, those of the path that is followed, restarts, Square's queries, random points per image, and
    questions without an attack."""

    steps: int
    path: int
    restarts: int
    queries: int
    points: int
    asks: int


BUDGETS = {"quick": CheckBudget(40, 100, 3, 500, 20, 10), "full": CheckBudget(100, 200, 10, 5000, 100, 100)}


class ModelUnderTest(NamedTuple):
    """One model under test: `model` answers, `target` is what gradients are taken of; x are images it has right.

    `known`: the points of attacks that were made, which several checks ask for.
    """

    model: Callable
    target: Callable
    x: Float[Tensor, "n c h w"]
    y: Int[Tensor, " n"]
    eps: float
    norm: str
    seed: int
    budget: CheckBudget
    known: dict[tuple, Tensor]

    def points(self, name: str, eps: float | None = None, **options) -> Float[Tensor, "n c h w"]:
        """Returns the points of one attack on `target`, made once."""
        eps = self.eps if eps is None else eps
        key = (name, eps, *options.items())
        if key not in self.known:
            rng = seeded_generator(self.seed, f"diagnose/{name}", self.x.device)
            made = attack(name, self.target, self.x, self.y, eps, self.norm, rng, progress=False, **options)
            self.known[key] = made
        return self.known[key]

    def broken(self, name: str, eps: float | None = None, **options) -> Bool[Tensor, " n"]:
        """Says which images one attack on `target` breaks on `model`."""
        return predict_classes(self.model, self.points(name, eps, **options)) != self.y

    def ascend(self, steps: int) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the last points, losses and successes (steps + 1, n) of a PGD path from x, which never stops."""
        point = self.x
        losses, wrong = [], []
        for step in range(steps + 1):
            z, loss, grad = loss_and_grad(self.target, point, self.y, cross_entropy)
            losses, wrong = [*losses, loss], [*wrong, z.argmax(1) != self.y]
            if step < steps:
                alpha = step_size(self.eps, steps)
                point = project(point + alpha * steepest_direction(grad, self.norm), self.x, self.eps, self.norm)
        return point, torch.stack(losses), torch.stack(wrong)


def fraction(flags: Tensor) -> float:
    """Returns the share of true among booleans, in [0, 1]."""
    return flags.double().mean().item()


def gradient_checks(at: ModelUnderTest) -> Iterator[tuple[str, float]]:
    """Measures gradients and logits at the images themselves, in float32 and float64."""
    z, _, grad = loss_and_grad(at.target, at.x, at.y, cross_entropy)
    yield "zero gradients", fraction((grad == 0).flatten(1).all(1))
    for name, q in (("logit margin, median", 0.5), ("logit margin, 95 %", 0.95)):
        yield name, margin(z, at.y).quantile(q).item()
    twin = at.target
    if isinstance(twin, nn.Module):
        state = {k: v.double() if v.is_floating_point() else v for k, v in twin.state_dict().items()}

        def twin(x: Tensor) -> Tensor:
            return torch.func.functional_call(at.target, state, (x,))

    try:
        _, _, exact = loss_and_grad(twin, at.x.double(), at.y, cross_entropy)
        fine = at._replace(target=twin, model=twin, x=at.x.double(), known={})
        rescued = fine.broken("pgd", steps=at.budget.steps) & ~at.broken("pgd", steps=at.budget.steps)
    except RuntimeError:  # a model that insists on float32
        yield from (("float32 vs float64 gradients", math.nan), ("float32 vs float64 attack", math.nan))
        return
    cosine = (steepest_direction(grad.double(), "L2") * steepest_direction(exact, "L2")).flatten(1).sum(1)
    yield "float32 vs float64 gradients", fraction((cosine < 0.5) & (exact != 0).flatten(1).any(1))
    yield "float32 vs float64 attack", fraction(rescued)


def attack_comparisons(at: ModelUnderTest, surrogate: nn.Module | None) -> Iterator[tuple[str, float]]:
    """Holds PGD with the cross-entropy, in all its runs together, against attacks that ought to be weaker."""
    k, r = at.budget.steps, at.budget.restarts
    found = at.points("pgd", steps=k)
    pgd, longer = predict_classes(at.model, found) != at.y, at.broken("pgd", steps=2 * k)
    often = pgd | at.broken("pgd", steps=k, first=1, restarts=r - 1)
    twice = often | at.broken("pgd", steps=k, first=r, restarts=r)
    one = at.broken("fgsm") if at.norm == "Linf" else at.broken("pgd", steps=1)
    white = one | longer | twice
    yield "one-step vs iterative", fraction(one & ~longer & ~twice)
    yield "more restarts", fraction(twice) - fraction(often)
    yield "more steps", fraction(longer) - fraction(pgd)
    yield "white-box vs Square", fraction(at.broken("square", queries=at.budget.queries) & ~white)
    options = {"surrogate": surrogate, "steps": k}
    yield "white-box vs transfer", fraction(at.broken("transfer", **options) & ~white) if surrogate else math.nan
    yield "white-box vs noise", fraction(at.broken("noise") & ~white)
    yield (
        "transfer failure",
        fraction((predict_classes(at.target, found) != at.y) & (predict_classes(at.model, found) == at.y)),
    )


def radius_checks(at: ModelUnderTest) -> Iterator[tuple[str, float]]:
    """Raises eps until the ball holds one grey image around every image, and then all images."""
    side = 1.0 if at.norm == "Linf" else math.sqrt(at.x[0].numel())
    grid = [at.eps * f for f in (0.5, 1, 2, 4) if at.eps * f < side / 2] + [side / 2, side]
    kept = [1 - fraction(at.broken("pgd", eps, steps=at.budget.steps)) for eps in grid]
    yield "larger eps, no better", max(b - a for a, b in pairwise(kept))
    yield "accuracy at grey eps", kept[-2]
    yield "unbounded attack", kept[-1]


def optimisation_checks(at: ModelUnderTest) -> Iterator[tuple[str, float]]:
    """Follows one PGD path: is the loss smooth where it ends, was it still rising, and is a success lost on the way?"""
    point, losses, wrong = at.ascend(at.budget.path)
    failed = predict_classes(at.model, point) == at.y
    yield "silent success", fraction(wrong.any(0) & failed)
    best, low = losses.cummax(0).values, losses.amin(0)
    gain = (best[-1] - best[-11]) / (best[-1] - low).clamp_min(1e-12)
    yield "incomplete optimisation", fraction((gain > 0.05)[failed]) if failed.any() else 0.0
    with torch.no_grad():
        base, change = cross_entropy(at.target(point), at.y), torch.zeros(len(point), device=point.device)
        key = per_image_rng.image_keys(point, derive_seed(at.seed, "landscape"))
        for draw in range(at.budget.points):
            near = random_start(point, at.eps / 20, at.norm, key, draw)
            change += ((cross_entropy(at.target(near), at.y) - base).abs() / base.clamp_min(1e-12)).clamp_max(1)
    yield "loss landscape", (change / at.budget.points).mean().item()


def sanity_checks(
    model: Callable,
    x: Float[Tensor, "n c h w"],
    y: Int[Tensor, " n"],
    *,
    eps: float,
    norm: str = "Linf",
    seed: int = 0,
    surrogate: nn.Module | None = None,
    stand_in: Callable | None = None,
    budget: str = "quick",
) -> pd.DataFrame:
    """Returns the table check, measured, threshold, flag, source, advice for a model of images in [0, 1] and one ball.

    `eps` > 0: radius in pixel units; `surrogate`: an undefended model for transfer (its check is NaN without one);
    `stand_in`: the differentiable function whose gradients are used (BPDA, a purifier's surrogate), the model itself if
    None; `budget`: a key of `BUDGETS`. Only images that the model has right are used; 100 of them
    resolve one point, and some checks take all of them as one batch. A
    model that answers probabilities is flagged, and then examined by their logarithm. NaN: not measured, and no flag.
    Raises ValueError for unusable input or if the model has no image right.
    """
    check_images(x)
    if budget not in BUDGETS or norm not in ("Linf", "L2") or not 0 < eps < math.inf:
        raise ValueError(f"budget {budget!r}, norm {norm!r}, eps {eps}: choose {', '.join(BUDGETS)}; Linf, L2; eps > 0")
    found: dict[str, float] = {}
    calm = [seeded_noise(f, derive_seed(seed, "diagnose"), x.device) for f in (stand_in or nn.Identity(), model)]
    with calm[0], calm[1], torch.no_grad():
        z, again = (torch.cat([model(part) for part in x.split(256)]) for _ in range(2))
        rows = (z >= 0).all(1) & ((z.sum(1) - 1).abs() < 1e-3)
        found["softmax output"] = fraction(rows)
        view = nn.Sequential(model, LogProbabilities()) if rows.all() else model
        check_labels("y", y, x, checked_logits(view, x, 256).shape[1])
        found["random answers"] = fraction((z - again).abs().amax(1) > 1e-4 * z.abs().amax(1))
        right = z.argmax(1) == y
        if not right.any():
            raise ValueError("the model has none of these images right: there is no robustness to examine")
        at = ModelUnderTest(view, stand_in or view, x[right], y[right], eps, norm, seed, BUDGETS[budget], {})
        asked = torch.stack([predict_classes(model, at.x) == at.y for _ in range(at.budget.asks)])
        found["no-attack control"] = fraction(~asked.all(0))
        for measure in (
            gradient_checks(at),
            attack_comparisons(at, surrogate),
            radius_checks(at),
            optimisation_checks(at),
        ):
            found |= measure
    limits = {name: 1 / z.shape[1] if name == "accuracy at grey eps" else c.threshold for name, c in CHECKS.items()}
    rows = [(k, found[k], limits[k], found[k] > limits[k], c.source, c.advice) for k, c in CHECKS.items()]
    return pd.DataFrame(rows, columns=["check", "measured", "threshold", "flag", "source", "advice"])


def sanity_checks_all(
    models: Mapping[str, Callable],
    x: Float[Tensor, "n c h w"],
    y: Int[Tensor, " n"],
    *,
    jobs: int = 1,
    **options: Any,
) -> dict[str, pd.DataFrame]:
    """Returns the columns check, measured, threshold, flag of `sanity_checks`, for every model, `jobs` at a time.

    Without images, which a quick run may ask for, no model is diagnosed.
    """
    if not len(x):
        return {}
    asked = [(model, *to_model_device(model, x, y)) for model in models.values()]
    found = parallel.parallel_map(partial(sanity_checks, **options), asked, jobs, "diagnosis")
    return {name: table[["check", "measured", "threshold", "flag"]] for name, table in zip(models, found, strict=True)}
