"""Pairwise comparisons: the pairs to compare, how often each completion won, and agreement when a pair is swapped.

Pure functions of indices; independent of texts and of whoever compares them.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations


@dataclass(frozen=True, slots=True)
class Outcome:
    """A pair, compared in both orders. A share is 1 if ``first`` won, 0 if ``second`` won, 0.5 for a tie."""

    first: int
    second: int
    forward: float | None
    """Share of ``first`` where it was shown first; None without a verdict."""
    backward: float | None
    """Share of ``first`` where it was shown second; None without a verdict."""

    @property
    def share(self) -> float:
        """Mean share of ``first`` over both orders; an order without a verdict is a tie."""
        return sum(0.5 if share is None else share for share in (self.forward, self.backward)) / 2


def choose_pairs(candidates: int, limit: int, seed: int) -> list[tuple[int, int]]:
    """Up to ``limit`` distinct pairs of candidates; the candidates' numbers of comparisons differ by at most 2.

    Takes the pair of the least compared candidates, again and again, preferably one that links candidates that no chain
    of comparisons links yet. Equally good pairs are drawn by ``seed``.
    """
    pairs = list(combinations(range(candidates), 2))
    random.Random(seed).shuffle(pairs)
    compared, linked = [0] * candidates, list(range(candidates))

    def order(pair: tuple[int, int]) -> tuple[list[int], bool]:
        first, second = pair
        return sorted((compared[first], compared[second])), linked[first] == linked[second]

    chosen = []
    while pairs and len(chosen) < limit:
        first, second = pair = min(pairs, key=order)
        pairs.remove(pair)
        chosen.append(pair)
        compared[first] += 1
        compared[second] += 1
        linked = [linked[first] if group == linked[second] else group for group in linked]
    return chosen


def win_rates(candidates: int, outcomes: Sequence[Outcome]) -> list[float]:
    """Mean share of each candidate over its comparisons, from 0 to 1; NaN for one that was not compared."""
    shares: list[list[float]] = [[] for _ in range(candidates)]
    for outcome in outcomes:
        shares[outcome.first].append(outcome.share)
        shares[outcome.second].append(1 - outcome.share)
    return [sum(of_candidate) / len(of_candidate) if of_candidate else math.nan for of_candidate in shares]


def swap_agreement(outcomes: Sequence[Outcome]) -> float:
    """Fraction of the pairs with a verdict in both orders in which both name the same winner; NaN without such pairs.

    A tie names no winner.
    """
    both = [(o.forward, o.backward) for o in outcomes if o.forward is not None and o.backward is not None]
    return sum(forward == backward != 0.5 for forward, backward in both) / len(both) if both else math.nan
