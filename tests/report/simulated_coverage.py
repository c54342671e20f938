"""Simulated coverage of the intervals of `lib.report.statistics`.

`python -m tests.report.simulated_coverage` prints the table.
"""

from collections.abc import Iterator

import numpy as np

from lib.report import statistics

CASES = {  # true difference, share of images whose paired outcomes differ
    "small": (0.02, 0.06),
    "moderate": (0.10, 0.16),
    "unpaired": (0.05, 0.35),  # as if the two outcomes of an image were independent
}
SPREADS = (0.0, 0.02, 0.05)  # standard deviation between seeds
SEEDS = (3, 5)


def draw_differences(
    rng: np.random.Generator, runs: int, n_seeds: int, n_images: int, case: str, spread: float
) -> np.ndarray:
    """Return paired differences of Bernoulli outcomes, -1, 0 or 1: runs, seeds, images."""
    mean, discordant = CASES[case]
    per_seed = mean + spread * rng.standard_normal((runs, n_seeds, 1))
    share = np.maximum(discordant, abs(per_seed))
    u = rng.random((runs, n_seeds, n_images))
    return (u < (share + per_seed) / 2).astype(float) - (u > 1 - (share - per_seed) / 2)


def covered(values: np.ndarray, truth: float) -> tuple[float, float]:
    """Return the share of runs whose 95 % and 90 % intervals hold the truth, by `estimate_images` itself."""
    hits = np.zeros(2)
    for run in values:
        estimate = statistics.estimate_images(list(run), resamples=0)
        ends = (statistics.interval(estimate, level) for level in (0.95, 0.90))
        hits += [low <= truth <= high for low, high in ends]
    at_95, at_90 = hits / len(values)
    return float(at_95), float(at_90)


def coverage_table(runs: int, seed: int = 0) -> Iterator[tuple[int, str, float, float, float]]:
    """Yield seeds, case, spread and the coverage of the 95 % and of the 90 % interval."""
    for n_seeds in SEEDS:
        for case, (truth, _) in CASES.items():
            for spread in SPREADS:
                rng = np.random.default_rng([seed, n_seeds, int(1000 * spread), list(CASES).index(case)])
                values = draw_differences(rng, runs, n_seeds, 100, case, spread)
                yield (n_seeds, case, spread, *covered(values, truth))


if __name__ == "__main__":
    for row in coverage_table(10_000):
        print("{} seeds, {:9} spread {:.2f}: 95 % {:.3f}, 90 % {:.3f}".format(*row))
