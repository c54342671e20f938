"""Is that robustness real? Signs of masked gradients and of failed attacks, in one table: flags, not a proof.

Every number in the table is a share of examples unless its check says otherwise, and is worse the higher it is; a check
is red above its threshold. `lib.evaluation.thresholds.CHECKS` has all thresholds with their reasons. A table without
red flags is no proof: an adaptive attack may still be needed (Tramer et al. 2020).
"""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import astuple, dataclass
from functools import partial
from itertools import pairwise
from typing import Any, Literal, NamedTuple

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
from lib.attacks.gate import AttackWarning
from lib.data import check_images
from lib.evaluation.thresholds import CHECKS
from lib.models import batched_logits, check_answer, most_likely, predict_classes
from lib.utils import parallel, per_image_rng
from lib.utils.device import to_model_device
from lib.utils.random_state import seeded_noise
from lib.utils.seeds import derive_seed, seeded_generator
from lib.utils.validation import Integer, Positive, check_fields, check_value, from_settings


class LogProbabilities(nn.Module):
    """A model's probabilities turned into logits."""

    def __init__(self, model: Callable) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k"]:
        return self.model(x).clamp_min(1e-38).log()


class CheckBudget(NamedTuple):
    """Effort of the checks.

    `steps`: of PGD; `path`: of the PGD path that is followed; `restarts`; `queries`: of Square; `points`: random ones
    per image; `draws`: predictions without an attack.
    """

    steps: int
    path: int
    restarts: int
    queries: int
    points: int
    draws: int


BUDGETS = {"quick": CheckBudget(40, 100, 3, 500, 20, 10), "full": CheckBudget(100, 200, 10, 5000, 100, 100)}


class ModelUnderTest(NamedTuple):
    """One model under test: `model` is scored, `target` is attacked; `x` are images classified correctly.

    `cache`: adversarial images that several checks need.
    """

    model: Callable
    target: Callable
    x: Float[Tensor, "n c h w"]
    y: Int[Tensor, " n"]
    eps: float
    norm: str
    seed: int
    budget: CheckBudget
    cache: dict[tuple, Tensor]

    def points(self, name: str, eps: float | None = None, **options) -> Float[Tensor, "n c h w"]:
        """Return the adversarial images of one attack on `target`, made once."""
        eps = self.eps if eps is None else eps
        key = (name, eps, *options.items())
        if key not in self.cache:
            rng = seeded_generator(self.seed, f"diagnose/{name}", self.x.device)
            call = (name, self.target, self.x, self.y, eps, self.norm, rng)
            self.cache[key] = attack(*call, progress=False, **options)
        return self.cache[key]

    def broken(self, name: str, eps: float | None = None, **options) -> Bool[Tensor, " n"]:
        """Say which images `model` misclassifies after one attack on `target`."""
        return predict_classes(self.model, self.points(name, eps, **options)) != self.y

    def follow_pgd(self, steps: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the last points, losses and successes (steps + 1, n) of a PGD path from x that never stops early."""
        point = self.x
        losses, wrong = [], []
        for step in range(steps + 1):
            z, loss, grad = loss_and_grad(self.target, point, self.y, cross_entropy)
            losses, wrong = [*losses, loss], [*wrong, most_likely(z) != self.y]
            if step < steps:
                alpha = step_size(self.eps, steps)
                point = project(point + alpha * steepest_direction(grad, self.norm), self.x, self.eps, self.norm)
        return point, torch.stack(losses), torch.stack(wrong)


def fraction(flags: Tensor) -> float:
    """Return the share of true among booleans, in [0, 1]."""
    return flags.double().mean().item()


def in_float64(model: Callable) -> Callable:
    """Return the function of a module with float64 weights; another function as it is."""
    if not isinstance(model, nn.Module):
        return model
    state = {k: v.double() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    return lambda x: torch.func.functional_call(model, state, (x,))


def gradient_checks(case: ModelUnderTest) -> Iterator[tuple[str, float]]:
    """Measure gradients and logits at the images themselves, in float32 and float64."""
    z, _, grad = loss_and_grad(case.target, case.x, case.y, cross_entropy)
    yield "zero gradients", fraction((grad == 0).flatten(1).all(1))
    for name, q in (("logit margin, median", 0.5), ("logit margin, 95 %", 0.95)):
        yield name, margin(z, case.y).quantile(q).item()
    twin = in_float64(case.target)
    try:
        _, _, exact = loss_and_grad(twin, case.x.double(), case.y, cross_entropy)
        fine = case._replace(target=twin, model=twin, x=case.x.double(), cache={})
        rescued = fine.broken("pgd", steps=case.budget.steps) & ~case.broken("pgd", steps=case.budget.steps)
    except RuntimeError:  # a model that insists on float32
        yield from (("float32 vs float64 gradients", math.nan), ("float32 vs float64 attack", math.nan))
        return
    cosine = (steepest_direction(grad.double(), "L2") * steepest_direction(exact, "L2")).flatten(1).sum(1)
    yield "float32 vs float64 gradients", fraction((cosine < 0.5) & (exact != 0).flatten(1).any(1))
    yield "float32 vs float64 attack", fraction(rescued)


def attack_comparisons(case: ModelUnderTest, surrogate: Callable | None) -> Iterator[tuple[str, float]]:
    """Compare PGD with the cross-entropy, in all its runs together, with attacks that ought to be weaker."""
    k, r = case.budget.steps, case.budget.restarts
    x_adv = case.points("pgd", steps=k)
    pgd, longer = predict_classes(case.model, x_adv) != case.y, case.broken("pgd", steps=2 * k)
    often = pgd | case.broken("pgd", steps=k, first=1, restarts=r - 1)
    twice = often | case.broken("pgd", steps=k, first=r, restarts=r)
    one = case.broken("fgsm") if case.norm == "Linf" else case.broken("pgd", steps=1)
    white = one | longer | twice
    yield "one-step vs iterative", fraction(one & ~longer & ~twice)
    yield "more restarts", fraction(twice) - fraction(often)
    yield "more steps", fraction(longer) - fraction(pgd)
    yield "white-box vs Square", fraction(case.broken("square", queries=case.budget.queries) & ~white)
    options = {"surrogate": surrogate, "steps": k}
    by_transfer = fraction(case.broken("transfer", **options) & ~white) if surrogate is not None else math.nan
    yield "white-box vs transfer", by_transfer
    yield "white-box vs noise", fraction(case.broken("noise") & ~white)
    yield (
        "transfer failure",
        fraction((predict_classes(case.target, x_adv) != case.y) & (predict_classes(case.model, x_adv) == case.y)),
    )


def radius_checks(case: ModelUnderTest) -> Iterator[tuple[str, float]]:
    """Raise eps until the ball holds one grey image around every image, and then all images."""
    side = 1.0 if case.norm == "Linf" else math.sqrt(case.x[0].numel())
    grid = [case.eps * f for f in (0.5, 1, 2, 4) if case.eps * f < side / 2] + [side / 2, side]
    robust = [1 - fraction(case.broken("pgd", eps, steps=case.budget.steps)) for eps in grid]
    yield "larger eps, no better", max(b - a for a, b in pairwise(robust))
    yield "accuracy at grey eps", robust[-2]
    yield "unbounded attack", robust[-1]


def optimisation_checks(case: ModelUnderTest) -> Iterator[tuple[str, float]]:
    """Follow one PGD path: is the loss smooth at its end, was it still rising, and is a success lost on the way?"""
    point, losses, wrong = case.follow_pgd(case.budget.path)
    failed = predict_classes(case.model, point) == case.y
    yield "silent success", fraction(wrong.any(0) & failed)
    best, low = losses.cummax(0).values, losses.amin(0)
    gain = (best[-1] - best[-11]) / (best[-1] - low).clamp_min(1e-12)
    yield "incomplete optimisation", fraction((gain > 0.05)[failed]) if failed.any() else 0.0
    with torch.no_grad():
        base, change = cross_entropy(case.target(point), case.y), torch.zeros(len(point), device=point.device)
        key = per_image_rng.image_keys(point, derive_seed(case.seed, "landscape"))
        for draw in range(case.budget.points):
            near = random_start(point, case.eps / 20, case.norm, key, draw)
            change += ((cross_entropy(case.target(near), case.y) - base).abs() / base.clamp_min(1e-12)).clamp_max(1)
    yield "loss landscape", (change / case.budget.points).mean().item()


@dataclass(frozen=True)
class CheckSettings:
    """What holds for all checks.

    Args:
        eps: radius of the ball, in pixel units, above 0.
        norm: "Linf" or "L2".
        seed: decides all noise.
        budget: "quick" or "full".

    Raises:
        ValueError: if a setting is unusable.
    """

    eps: Positive
    norm: Literal["Linf", "L2"] = "Linf"
    seed: Integer = 0
    budget: Literal["quick", "full"] = "quick"

    def __post_init__(self) -> None:
        check_fields(self)


def sanity_checks(
    model: Any,
    x: Any,
    y: Any,
    *,
    surrogate: Any = None,
    target: Any = None,
    **settings: Any,
) -> pd.DataFrame:
    """Check a model for masked gradients and failed attacks, in one ball.

    Only images that the model classifies correctly are used; 100 of them resolve one point, and some checks take all of
    them as one batch. A model that answers probabilities is flagged, and then examined by their logarithm.

    Args:
        model: answers logits for images in [0, 1].
        x: images (n, c, h, w), in [0, 1].
        y: labels (n,).
        surrogate: an undefended model for transfer; its check is NaN without one.
        target: the differentiable function that is attacked (BPDA, a purifier's surrogate); `model` when None.
        **settings: the fields of `CheckSettings`: `eps` (required), `norm`, `seed`, `budget`.

    Returns:
        A table with the columns check, measured, threshold, flag, source and advice. NaN: not measured, and no flag.

    Raises:
        ValueError: if the input is unusable or the model classifies no image correctly.
        TypeError: if there is no such setting.

    Example:
        >>> from lib.models import build_classifier
        >>> model = nn.Sequential(build_classifier("cnn", width=4, seed=0), nn.Softmax(1)).eval()
        >>> x = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> table = sanity_checks(model, x, model(x).argmax(1), eps=0.5)
        >>> "softmax output" in set(table.check[table.flag])
        True
    """
    at = from_settings(CheckSettings, settings, "sanity_checks")
    for name, function in (("model", model), ("surrogate", surrogate), ("target", target)):
        if function is not None or name == "model":
            check_value(name, function, Callable, "give a function of images that returns logits")
    check_images(x)
    check_labels("y", y, x)
    if not len(x):
        raise ValueError("expected at least 1 image, got 0")
    with torch.inference_mode(False), warnings.catch_warnings():
        warnings.simplefilter("ignore", AttackWarning)  # the table flags them
        x, y = (t.clone() if t.is_inference() else t for t in (x, y))
        return _checks_table(model, x, y, at, surrogate, target)


def _checks_table(
    model: Callable, x: Tensor, y: Tensor, at: CheckSettings, surrogate: Callable | None, target: Callable | None
) -> pd.DataFrame:
    """Return the table of `sanity_checks`, whose input is checked."""
    (eps, norm, seed, budget), measured = astuple(at), {}
    noises = [seeded_noise(f, derive_seed(seed, "diagnose"), x.device) for f in (target or nn.Identity(), model)]
    with noises[0], noises[1], torch.no_grad():
        z, again = (batched_logits(model, x) for _ in range(2))
        for other in (surrogate, target):
            if other is not None:
                check_answer(other(x[:1]), 1, z.shape[1])
        probabilities = (z >= 0).all(1) & ((z.sum(1) - 1).abs() < 1e-3)
        measured["softmax output"] = fraction(probabilities)
        logits = LogProbabilities(model) if probabilities.all() else model
        check_labels("y", y, x, checked_logits(logits, x, 256).shape[1])
        measured["random answers"] = fraction((z - again).abs().amax(1) > 1e-4 * z.abs().amax(1))
        correct = most_likely(z) == y
        if not correct.any():
            raise ValueError("expected images that the model classifies correctly, got none: nothing to check")
        case = ModelUnderTest(logits, target or logits, x[correct], y[correct], eps, norm, seed, BUDGETS[budget], {})
        stable = torch.stack([predict_classes(model, case.x) == case.y for _ in range(case.budget.draws)]).all(0)
        measured["no-attack control"] = fraction(~stable)
        for checks in (
            gradient_checks(case),
            attack_comparisons(case, surrogate),
            radius_checks(case),
            optimisation_checks(case),
        ):
            measured |= checks
    limits = {name: 1 / z.shape[1] if name == "accuracy at grey eps" else c.threshold for name, c in CHECKS.items()}
    rows = [(k, measured[k], limits[k], measured[k] > limits[k], c.source, c.advice) for k, c in CHECKS.items()]
    return pd.DataFrame(rows, columns=["check", "measured", "threshold", "flag", "source", "advice"])


def sanity_checks_all(
    models: Mapping[str, Callable],
    x: Float[Tensor, "n c h w"],
    y: Int[Tensor, " n"],
    *,
    jobs: int = 1,
    **options: Any,
) -> dict[str, pd.DataFrame]:
    """Check several models, `jobs` at a time.

    Args:
        models: by name.
        x: images (n, c, h, w), in [0, 1]; without any, which a quick run may ask for, no model is checked.
        y: labels (n,).
        jobs: processes.
        **options: those of `sanity_checks`.

    Returns:
        The columns check, measured, threshold and flag of each model's table.
    """
    if not len(x):
        return {}
    tasks = [(model, *to_model_device(model, x, y)) for model in models.values()]
    tables = parallel.parallel_map(partial(sanity_checks, **options), tasks, jobs, "sanity checks")
    return {name: table[["check", "measured", "threshold", "flag"]] for name, table in zip(models, tables, strict=True)}
