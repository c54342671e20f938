"""Estimates with intervals from several seeds: of differences per image, paired, or of one number per seed.

Images are drawn anew for each seed, so the seeds' means vary with both, seeds and images, and their mean square holds
both components of variance. The interval is Student's over the S means, with S - 1 degrees of freedom: right however
much seeds differ. By chance such means agree better than their images allow; so the interval is never narrower than
half the one over all images alone, which takes all seeds for one. (With the full one, 3 seeds would cover 98.7 %.)

Coverage of intervals of 95 %, simulated (tests/report/simulated_coverage.py): differences of Bernoulli outcomes, 3 and
5 seeds of 100 images, standard deviations between seeds of 0, 2 and 5 points: 95 to 96.5 %; percentiles of the
hierarchical bootstrap, reported beside it as `bootstrap95`: 86 to 99 %. Two-sided tests at 0.6 %, Holm's first of
eight, hold their level. Variance components truncated at 0 with Satterthwaite's degrees of freedom were tried: for
normal values and any standard deviation between seeds they cover 92.6 to 97 %, with more power, but those tests err in
up to 3.7 %.

Not reached: power with few seeds. For p = 0.006 Student's t needs 12.6 standard errors with 3 seeds, 5.2 with 5; and
images that are the same for all seeds are in no interval over seeds, unless their numbers are given.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import scipy  # its parts are imported on first use

RESAMPLES = 10_000
FLOOR = 0.5  # of the interval over images alone
BOTH, SEEDS, ONE_SEED = "seeds and images", "seeds", "images of one seed"


@dataclass(frozen=True)
class Estimate:
    """A mean with what its intervals and tests are made of.

    `per_seed`: the mean of each seed. `n_images`: of all seeds together, 0 where they are not known. `over`: what the
    interval is about. `standard_error` and `degrees` of freedom are NaN where there is no interval, that is, for one
    seed without images. `image_error`, `image_degrees`: those over all images alone, 0 and 1 where they set no floor.
    `bootstrap95`: the plain percentile interval, for comparison; None without images or resamples.
    """

    value: float
    standard_error: float
    degrees: float
    per_seed: tuple[float, ...]
    n_images: int
    over: str
    image_error: float = 0.0
    image_degrees: float = 1.0
    bootstrap95: tuple[float, float] | None = None

    @property
    def n_seeds(self) -> int:
        return len(self.per_seed)


def interval(estimate: Estimate, level: float = 0.95) -> tuple[float, float]:
    """Return the low and high end of an estimate's interval; NaN where there is none."""
    q = (1 + level) / 2
    half = float(scipy.stats.t.ppf(q, estimate.degrees)) * estimate.standard_error
    half = max(half, FLOOR * float(scipy.stats.t.ppf(q, estimate.image_degrees)) * estimate.image_error)
    return estimate.value - half, estimate.value + half


def one_sided_p(estimate: Estimate, c: float) -> float:
    """Return the p-value of "the true value is at most c"; 1 - p is that of "at least c". NaN without interval."""
    distance = estimate.value - c
    if np.isnan(estimate.standard_error):
        return float("nan")
    tail = 0.0 if distance else 0.5
    for error, degrees in (
        (estimate.standard_error, estimate.degrees),
        (FLOOR * estimate.image_error, estimate.image_degrees),
    ):
        if error > 0:
            tail = max(tail, float(scipy.stats.t.sf(abs(distance) / error, degrees)))
    return tail if distance >= 0 else 1 - tail


def difference_p(estimate: Estimate, c: float = 0.0) -> float:
    """Return the two-sided p-value of "the true value is c"; NaN where there is no interval."""
    p = one_sided_p(estimate, c)
    return 2 * min(p, 1 - p)


def equivalence_p(estimate: Estimate, margin: float) -> float:
    """Return the p-value of "the true value is not within ±margin": the larger of two one-sided ones (Schuirmann 1987).

    Args:
        estimate: the difference.
        margin: the largest difference that counts as none, above 0.

    Returns:
        A p-value; it is below 5 % where the 90 % interval lies within ±margin. NaN where there is no interval.

    Raises:
        ValueError: unless the margin is above 0.
    """
    if not margin > 0:
        raise ValueError(f"expected a margin above 0, got {margin}: say what difference counts as none")
    return max(one_sided_p(estimate, -margin), 1 - one_sided_p(estimate, margin))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for their number by Holm's (1979) step-down method, in the order given."""
    if any(not 0 <= p <= 1 for p in p_values):
        raise ValueError(f"expected p-values within [0, 1], got {list(p_values)}")
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def bootstrap_means(values: Sequence[np.ndarray], resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """Resample seeds, then images within each of them, with replacement.

    Args:
        values: one number per image, an array for each seed.
        resamples: number of resamples.
        seed: of the choices; equal ones give equal bits.

    Returns:
        The mean over seeds of each resample.
    """
    rng = np.random.default_rng(seed)
    chosen = rng.integers(len(values), size=(resamples, len(values)))
    means = np.empty(chosen.shape)
    for i, per_image in enumerate(values):
        here = chosen == i
        picks = rng.integers(len(per_image), size=(int(here.sum()), len(per_image)), dtype=np.uint32)
        means[here] = per_image[picks].mean(1)
    return means.mean(1)


def shared_variance(residuals: Sequence[np.ndarray], images: Sequence[np.ndarray]) -> float:
    """Return what images that several seeds share add to the variance of the mean over seeds.

    The covariance of the same image's residuals in different seeds, as in two-way clustering (Cameron, Gelbach and
    Miller 2011); 0 where seeds share no image or the covariance is negative.
    """
    parts = np.concatenate([r / len(r) for r in residuals]) / len(residuals)
    _, which = np.unique(np.concatenate(images), return_inverse=True)
    return max(0.0, float((np.bincount(which, parts) ** 2).sum() - (parts**2).sum()))


def estimate_images(
    values: Sequence[Any], images: Sequence[Any] | None = None, *, resamples: int = RESAMPLES, seed: int = 0
) -> Estimate:
    """Estimate a mean from values per image of one seed or several.

    For a paired difference pass the difference of each image. The images' variance is that of the values with one
    image of +1 and one of -1 added (after Agresti and Min 2005): differences that are all 0 prove no exact 0.

    Args:
        values: shares or differences of shares per image, one array for each seed, each of two images or more.
        images: the images' numbers, likewise, where seeds may share images.
        resamples: of the bootstrap that is reported beside it, 0 for none.
        seed: of the bootstrap.

    Returns:
        The mean over seeds of their means. With one seed the interval is over its images alone, and `over` says so.

    Raises:
        ValueError: for no seeds, fewer than two images, values that are not finite, or images that do not fit.
    """
    arrays = [np.asarray(v, dtype=float) for v in values]
    if not arrays or any(a.ndim != 1 or len(a) < 2 or not np.isfinite(a).all() for a in arrays):
        shapes = [a.shape for a in arrays]
        raise ValueError(f"expected finite values of at least two images for each seed, got shapes {shapes}")
    numbers = None if images is None else [np.asarray(i) for i in images]
    if numbers is not None and [len(i) for i in numbers] != [len(a) for a in arrays]:
        raise ValueError(f"expected numbers of {[len(a) for a in arrays]} images, got {[len(i) for i in numbers]}")
    n_seeds, n_images = len(arrays), sum(map(len, arrays))
    means = np.array([a.mean() for a in arrays])
    residuals = [a - m for a, m in zip(arrays, means)]
    image_degrees = n_images - n_seeds
    squares = sum(float((r**2).sum()) for r in residuals) + 1
    image_variance = squares / image_degrees * float(np.mean([1 / len(a) for a in arrays])) / n_seeds
    if n_seeds == 1:
        variance, degrees = image_variance, image_degrees
    else:
        variance, degrees = float(means.var(ddof=1)) / n_seeds, n_seeds - 1
        variance += 0.0 if numbers is None else shared_variance(residuals, numbers)
    ends = np.quantile(bootstrap_means(arrays, resamples, seed), [0.025, 0.975]) if resamples else None
    return Estimate(
        value=float(means.mean()),
        standard_error=float(np.sqrt(variance)),
        degrees=float(degrees),
        per_seed=tuple(means.tolist()),
        n_images=n_images,
        over=BOTH if n_seeds > 1 else ONE_SEED,
        image_error=float(np.sqrt(image_variance)) if n_seeds > 1 else 0.0,
        image_degrees=float(image_degrees),
        bootstrap95=None if ends is None else (float(ends[0]), float(ends[1])),
    )


def scale_estimate(estimate: Estimate, scale: float) -> Estimate:
    """Return an estimate in another unit, `scale` > 0 of which are one of the present one."""
    low_high = estimate.bootstrap95
    return replace(
        estimate,
        value=scale * estimate.value,
        standard_error=scale * estimate.standard_error,
        image_error=scale * estimate.image_error,
        per_seed=tuple(scale * value for value in estimate.per_seed),
        bootstrap95=None if low_high is None else (scale * low_high[0], scale * low_high[1]),
    )


def estimate_scalars(values: Sequence[float], n_images: int = 0) -> Estimate:
    """Estimate a mean from one number per seed, such as a rank correlation, by Student's t over seeds.

    Args:
        values: one number per seed.
        n_images: images of all seeds together, for the record.

    Returns:
        The mean; with one seed there is no interval.

    Raises:
        ValueError: for no values, or values that are not finite.
    """
    numbers = np.asarray(values, dtype=float)
    if numbers.ndim != 1 or not len(numbers) or not np.isfinite(numbers).all():
        raise ValueError(f"expected a list of finite numbers, one per seed, got {numbers.tolist()}")
    several = len(numbers) > 1
    return Estimate(
        value=float(numbers.mean()),
        standard_error=float(numbers.std(ddof=1) / np.sqrt(len(numbers))) if several else float("nan"),
        degrees=float(len(numbers) - 1) if several else float("nan"),
        per_seed=tuple(numbers.tolist()),
        n_images=n_images,
        over=SEEDS,
    )
