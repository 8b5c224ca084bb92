"""Pair selectors: they pick chosen and rejected from the candidates of a judged group.

All selectors here skip candidates whose score is not finite, candidates without a token, and repeated texts. A
completion of white space only is never chosen; it may be rejected, which teaches the policy not to answer with nothing.
"""

import math
import random
from collections.abc import Sequence
from typing import Protocol

from dpo_ray.config import Component
from dpo_ray.plugins import bind
from dpo_ray.types import CompletionGroup, Dropped, ScoredPair


class Selector(Protocol):
    """Picks chosen and rejected from one judged group, or gives the reason why it has no pair."""

    def __call__(self, group: CompletionGroup, scores: Sequence[float]) -> ScoredPair | Dropped: ...


def build_selector(component: Component) -> Selector:
    """The selector of ``online.select``, with ``args`` bound.

    Raises:
        ValueError: the name or an argument is unknown, or an argument is missing.
    """
    return bind(component.use, component.args, SELECTORS, "selector")


def best_vs_worst(
    group: CompletionGroup, scores: Sequence[float], *, min_gap: float = 0.0, choose_truncated: bool = True
) -> ScoredPair | Dropped:
    """Pair the highest with the lowest score; of equal scores, take the earlier candidate.

    Args:
        scores: one per completion; NaN if the judge has none.
        min_gap: smallest difference of the two scores, in the judge's unit.
        choose_truncated: True allows a completion that hit the token limit as chosen. False prevents a judge that
            prefers long answers from teaching the policy never to end.

    Returns:
        The pair, or the reason for dropping the group: ``bad_score``, ``empty`` or ``duplicates`` (fewer than two
        candidates left after skipping bad scores, empty and repeated texts, in that order), ``tie``, ``empty`` or
        ``truncated`` (only empty or truncated completions beat the others), ``small_gap``.
    """
    candidates = usable_candidates(group, scores)
    if isinstance(candidates, Dropped):
        return candidates
    return _prefer(group, scores, candidates, min_gap, choose_truncated)


def random_pair(group: CompletionGroup, scores: Sequence[float], *, min_gap: float = 0.0) -> ScoredPair | Dropped:
    """Draw two distinct candidates at random and choose the better one: smaller gaps than best against worst.

    The draw depends on ``group.seed`` only, so selecting a round twice gives the same pairs. For arguments and reasons
    see ``best_vs_worst``.
    """
    candidates = usable_candidates(group, scores)
    if isinstance(candidates, Dropped):
        return candidates
    return _prefer(group, scores, sorted(random.Random(group.seed).sample(candidates, 2)), min_gap)


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


def _prefer(
    group: CompletionGroup,
    scores: Sequence[float],
    candidates: Sequence[int],
    min_gap: float,
    choose_truncated: bool = True,
) -> ScoredPair | Dropped:
    worst = min(candidates, key=lambda i: scores[i])
    if max(scores[i] for i in candidates) == scores[worst]:
        return Dropped("tie")
    not_empty = [i for i in candidates if group.completions[i].text.strip()]
    choosable = [i for i in not_empty if choose_truncated or group.completions[i].finished]
    if not choosable:
        return Dropped("truncated" if not_empty else "empty")
    best = max(choosable, key=lambda i: scores[i])
    if scores[best] == scores[worst]:
        return Dropped("empty" if choosable == not_empty else "truncated")
    if scores[best] - scores[worst] < min_gap:
        return Dropped("small_gap")
    return ScoredPair(chosen=best, rejected=worst)


SELECTORS: dict[str, Selector] = {"best_vs_worst": best_vs_worst, "random_pair": random_pair}
