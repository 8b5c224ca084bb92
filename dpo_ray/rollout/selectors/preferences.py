"""The preferences of a judged group: the pairs that a selector may pick from, or the reason for having none."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations

from dpo_ray.types import CompletionGroup, Dropped, ScoredPair

Choice = Sequence[ScoredPair] | Dropped
NOT_PICKED = "not_picked"
"""Reason of acceptable pairs that the selector did not pick."""


class Pairs(list[ScoredPair]):
    """Pairs that a selector may pick from.

    Args:
        left_out: number of pairs that were left out before, by reason, in the order of the checks.
    """

    def __init__(self, pairs: Iterable[ScoredPair], left_out: Mapping[str, int] | None = None) -> None:
        super().__init__(pairs)
        self.left_out = dict(left_out or {})

    def filter(self, accepts: Callable[[ScoredPair], bool], reason: str) -> "Pairs":
        """The accepted pairs; the others count as left out."""
        return self.only(filter(accepts, self), reason)

    def pick(self, pairs: Iterable[ScoredPair]) -> Choice:
        """Choose ``pairs`` among these; if there are none, the reason."""
        return self.only(pairs, NOT_PICKED).choice()

    def choice(self) -> Choice:
        """All pairs; if there are none, the reason of the last check that left out some."""
        return self or Dropped([reason for reason, count in self.left_out.items() if count][-1])

    def only(self, pairs: Iterable[ScoredPair], reason: str) -> "Pairs":
        """Some of the pairs; the others count as left out."""
        only = Pairs(pairs, self.left_out)
        only.left_out[reason] = only.left_out.get(reason, 0) + len(self) - len(only)
        return only


def usable_candidates(group: CompletionGroup, scores: Sequence[float]) -> list[int] | Dropped:
    """Indices of the distinct, scored completions that have a token; ``Dropped`` if there are fewer than two."""
    scored = [i for i, score in enumerate(scores) if math.isfinite(score)]
    nonempty = [i for i in scored if group.completions[i].token_ids]
    first_of_text: dict[str, int] = {}
    for i in nonempty:
        first_of_text.setdefault(group.completions[i].text, i)
    distinct = list(first_of_text.values())
    for remaining, reason in ((scored, "bad_score"), (nonempty, "empty"), (distinct, "duplicates")):
        if len(remaining) < 2:
            return Dropped(reason)
    return distinct


def preferences(group: CompletionGroup, scores: Sequence[float], *, min_gap: float, choose_truncated: bool) -> Pairs:
    """All acceptable pairs of usable candidates, those with the largest gaps of scores first.

    For arguments and reasons see ``best_vs_worst``.
    """
    candidates = usable_candidates(group, scores)
    if isinstance(candidates, Dropped):
        return Pairs((), {candidates.reason: 1})
    every = pairs_among(candidates)
    return preferences_of(every, group, scores, min_gap=min_gap, choose_truncated=choose_truncated)


def pairs_among(candidates: Iterable[int]) -> Pairs:
    """All unordered pairs of candidates."""
    return Pairs(ScoredPair(i, j) for i, j in combinations(candidates, 2))


def preferences_of(
    pairs: Pairs, group: CompletionGroup, scores: Sequence[float], *, min_gap: float, choose_truncated: bool
) -> Pairs:
    """The acceptable ones of ``pairs`` of usable candidates, in any order, sorted as by ``preferences``."""
    completions = group.completions
    pairs = pairs.filter(lambda pair: scores[pair.chosen] != scores[pair.rejected], "tie")
    ordered = Pairs(map(lambda pair: _ordered(pair, scores), pairs), pairs.left_out)
    with_text = ordered.filter(lambda pair: bool(completions[pair.chosen].text.strip()), "empty")
    choosable = with_text.filter(lambda pair: choose_truncated or completions[pair.chosen].finished, "truncated")
    wide = choosable.filter(lambda pair: gap(pair, scores) >= min_gap, "small_gap")
    wide.sort(key=lambda pair: (-gap(pair, scores), pair.chosen, pair.rejected))
    return wide


def gap(pair: ScoredPair, scores: Sequence[float]) -> float:
    """Score of the chosen minus score of the rejected completion."""
    return scores[pair.chosen] - scores[pair.rejected]


def _ordered(pair: ScoredPair, scores: Sequence[float]) -> ScoredPair:
    return pair if gap(pair, scores) > 0 else ScoredPair(pair.rejected, pair.chosen)
