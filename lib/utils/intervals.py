"""Intervals: for a share of examples (Wilson, Clopper–Pearson) and for a mean over seeds (Student's t)."""

from collections.abc import Sequence

import numpy as np
import scipy  # its parts are imported on first use


def wilson(successes: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Return the Wilson score interval of a share of n examples, both ends in [0, 1] (Wilson 1927)."""
    return _binomial(successes, n, level, "wilson")


def clopper_pearson(successes: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Return the exact interval of a share of n examples, both ends in [0, 1] (Clopper and Pearson 1934)."""
    return _binomial(successes, n, level, "exact")


def _binomial(successes: int, n: int, level: float, method: str) -> tuple[float, float]:
    if not 0 <= successes <= n or n < 1:
        raise ValueError(f"expected 0 <= successes <= n and n >= 1, got {successes} successes of {n} examples")
    interval = scipy.stats.binomtest(int(successes), int(n)).proportion_ci(level, method)
    return float(interval.low), float(interval.high)


def mean_interval(values: Sequence[float] | np.ndarray, level: float = 0.95) -> tuple[float, float, float]:
    """Return mean, low and high end of Student's t interval over independent seeds; the ends are NaN for one seed.

    For a paired comparison pass the differences per seed.
    """
    values = np.asarray(values, dtype=float)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise ValueError(f"expected a list of finite numbers, one per seed, got {values.tolist()}")
    mean = float(values.mean())
    if len(values) == 1:
        return mean, float("nan"), float("nan")
    half = float(scipy.stats.t.ppf((1 + level) / 2, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values)))
    return mean, mean - half, mean + half
