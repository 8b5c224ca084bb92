"""Confidence intervals of a mean difference: the paired bootstrap over held-out examples, and the spread over seeds."""

import math
from collections.abc import Sequence
from itertools import combinations_with_replacement
from math import factorial, prod
from statistics import variance

import numpy as np

CONFIDENCE = 0.95
MIN_EXAMPLES = 6
"""Examples that may all favor one trial by chance below this number: 2 * 0.5 ** 5 is 6 %, 2 * 0.5 ** 6 is 3 %."""
EXACT_UP_TO = 8
"""Examples up to which all resamples are enumerated: C(15, 8) = 6,435 different ones."""
RESAMPLES = 10_000
FEW_VALUES = 16
"""Different values up to which only their numbers are drawn: the differences of accuracies have at most five."""
MAX_DRAWS, MIN_RESAMPLES = 2 * 10**7, 500
"""Draws per interval, about 0.3 s: sets of more than 2,000 examples get fewer resamples."""
STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""Two-sided 95 % quantiles of Student's t with 1 to 10 degrees of freedom."""


def bootstrap_interval(differences: np.ndarray, *, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of the mean of paired differences (Efron & Tibshirani 1993, chapter 13).

    Exact up to EXACT_UP_TO examples: every resample counts with its probability. Beyond, resamples are drawn.

    Args:
        differences: (n,) finite, one per example, n > 0.
        seed: of the drawn resamples.

    Returns:
        The smallest mean with at least 2.5 % of the distribution at or below it, and the largest one with at least
        2.5 % at or above it.
    """
    values, counts = np.unique(differences, return_counts=True)
    if len(differences) <= EXACT_UP_TO:
        means, weights = _all_means(differences)
    else:
        means = _drawn_means(values, counts, np.random.default_rng(seed))
        weights = np.full(len(means), 1 / len(means))
    order = np.argsort(means)
    means, weights, tail = means[order], weights[order], (1 - CONFIDENCE) / 2
    # A rounding error in a cumulative sum must not exclude a mean with exactly 2.5 %.
    low = means[np.searchsorted(np.cumsum(weights), tail - 1e-12)]
    high = means[::-1][np.searchsorted(np.cumsum(weights[::-1]), tail - 1e-12)]
    return float(low), float(high)


def _all_means(differences: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and probability of every multiset of n examples; a multiset is drawn in n! / prod(multiplicity!) orders."""
    n = len(differences)
    drawn = np.array(list(combinations_with_replacement(range(n), n)))  # (C(2n-1, n), n)
    multiplicity = (drawn[:, :, None] == np.arange(n)).sum(1)
    orders = [factorial(n) / prod(map(factorial, row)) for row in multiplicity.tolist()]
    return differences[drawn].mean(1), np.array(orders) / n**n


def _drawn_means(values: np.ndarray, counts: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Means of resamples of the values, each of which occurs ``counts`` times."""
    n = int(counts.sum())
    if len(values) <= FEW_VALUES:
        return generator.multinomial(n, counts / n, RESAMPLES) @ values / n
    examples, resamples = values.repeat(counts), min(RESAMPLES, max(MIN_RESAMPLES, MAX_DRAWS // n))
    rows = max(1, 10**6 // n)  # bounds the memory
    sizes = [min(rows, resamples - start) for start in range(0, resamples, rows)]
    return np.concatenate([examples[generator.integers(n, size=(size, n))].mean(1) for size in sizes])


def seed_margin(repeats: Sequence[Sequence[float]], first: int, second: int) -> float | None:
    """Half of the 95 % interval of the difference between the means of two configurations over seeds.

    The standard deviation over seeds is pooled over all configurations, so that it also applies to one that ran once.

    Args:
        repeats: metric of each repeat of each configuration.
        first, second: indices of the configurations to compare.

    Returns:
        None without a repeated configuration.
    """
    spread = pooled_deviation(repeats)
    if spread is None:
        return None
    deviation, freedom = spread
    t = STUDENT_T[freedom - 1] if freedom <= len(STUDENT_T) else 1.96 + 2.6 / freedom
    return t * deviation * math.sqrt(1 / len(repeats[first]) + 1 / len(repeats[second]))


def pooled_deviation(repeats: Sequence[Sequence[float]]) -> tuple[float, int] | None:
    """Standard deviation over repeats, pooled over configurations, and its degrees of freedom."""
    repeated = [values for values in repeats if len(values) > 1]
    freedom = sum(len(values) - 1 for values in repeated)
    if not freedom:
        return None
    return math.sqrt(sum((len(values) - 1) * variance(values) for values in repeated) / freedom), freedom
