"""Importance of the keys of a sweep, and the trials on the frontier of two metrics."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dpo_ray.types import is_number

MIN_TRIALS = 8
"""With fewer trials the effect of a key cannot be separated from chance."""
MAX_GROUPS = 4
TRIALS_PER_GROUP = 4
SHUFFLES = 1000


class Importance(NamedTuple):
    """The effect of one key on the metric."""

    share: float
    """Share of the variance between trials that the key explains by itself, 0 to 1."""
    chance: float
    """95 % quantile of the share over random assignments of the metric to the trials."""

    @property
    def exceeds_chance(self) -> bool:
        """True if so large a share is unlikely for a key without effect."""
        return self.share > self.chance


def importance(
    values: Sequence[Mapping[str, Any]], metric: np.ndarray, keys: Sequence[str], *, seed: int = 0
) -> dict[str, Importance] | None:
    """Share of the metric's variance between trials that each key explains by itself.

    The trials are grouped by the key: numbers into up to four groups of equal size by rank, other values by value. The
    share is the adjusted R² of the group means, 1 - (1 - R²)(n - 1)/(n - groups), whose expectation is 0 for a key
    without effect; negative values count as 0. Shares need not add up to 1: effects of keys in combination are in none
    of them, and keys whose samples are correlated share theirs.

    Args:
        values: swept values of each of n trials.
        metric: (n,) finite.

    Returns:
        None for fewer than MIN_TRIALS trials, or if all have the same metric.
    """
    if len(metric) < MIN_TRIALS or np.ptp(metric) == 0:
        return None
    generator = np.random.default_rng(seed)
    shuffled = np.stack([metric, *(generator.permutation(metric) for _ in range(SHUFFLES))])
    explained = {key: _explained(_groups([mapping.get(key) for mapping in values]), shuffled) for key in keys}
    return {key: Importance(float(s[0]), float(np.quantile(s[1:], 0.95))) for key, s in explained.items()}


def _explained(groups: np.ndarray, metrics: np.ndarray) -> np.ndarray:
    """(m,) adjusted R² of the group means, at least 0, for each of (m, n) assignments of the metric."""
    (_, n), names = metrics.shape, np.unique(groups)
    if not 1 < len(names) < n:
        return np.zeros(len(metrics))
    within = sum(metrics[:, groups == name].var(1) * (groups == name).sum() for name in names)
    return np.maximum(0.0, 1 - within / (n * metrics.var(1)) * (n - 1) / (n - len(names)))


def _groups(column: Sequence[Any]) -> np.ndarray:
    """(n,) number of the group of each value; equal values are in the same group."""
    if not all(map(is_number, column)):
        return np.unique([repr(value) for value in column], return_inverse=True)[1]
    numbers = np.array(column, dtype=float)
    unique, number = np.unique(numbers, return_inverse=True)
    if len(unique) <= MAX_GROUPS:
        return number
    count = min(MAX_GROUPS, max(2, len(numbers) // TRIALS_PER_GROUP))
    edges = np.quantile(numbers, np.arange(1, count) / count, method="higher")
    return np.searchsorted(edges, numbers, side="right")


def frontier(cost: np.ndarray, gain: np.ndarray) -> list[int]:
    """Indices of the points that no other point beats: none costs at most as much and gains more, or less for as much.

    Args:
        cost: (n,) smaller is better.
        gain: (n,) larger is better.

    Returns:
        By ascending cost; of equal points the first.
    """
    chosen: list[int] = []
    for i in np.lexsort((np.arange(len(cost)), -gain, cost)).tolist():
        if not chosen or gain[i] > gain[chosen[-1]]:
            chosen.append(i)
    return chosen
