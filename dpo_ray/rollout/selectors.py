"""Pair selectors: which two candidates of a judged group become chosen and rejected.

Every selector here treats candidates alike. Left out altogether are: a completion whose score is not finite, one
without a token (there is nothing to train on), and the second and later copies of a text. An empty completion, one of
white space only, is never chosen; it may be rejected, which teaches the policy not to fall silent.
"""

import math
import random
from collections.abc import Sequence
from typing import Protocol

from dpo_ray.config import Component
from dpo_ray.plugins import bind
from dpo_ray.types import CompletionGroup, Dropped, ScoredPair


class Selector(Protocol):
    """Picks chosen and rejected from one judged group, or says why there is no preference in it."""

    def __call__(self, group: CompletionGroup, scores: Sequence[float]) -> ScoredPair | Dropped: ...


def build_selector(component: Component) -> Selector:
    """The selector that ``online.select`` names: a function of (group, scores), with ``args`` bound.

    Raises:
        ValueError: the name is unknown, or an argument is not taken or is missing.
    """
    return bind(component.use, component.args, SELECTORS, "selector")


def best_vs_worst(
    group: CompletionGroup, scores: Sequence[float], *, min_gap: float = 0.0, choose_truncated: bool = True
) -> ScoredPair | Dropped:
    """The highest against the lowest score; the earlier candidate where scores are equal.

    Args:
        scores: one a completion; NaN where the judge has none.
        min_gap: smallest difference of the two scores, in the judge's unit.
        choose_truncated: True allows a completion that hit the token limit as chosen. False keeps a judge that likes
            long answers from teaching the policy never to end.

    Returns:
        The pair, or why there is none: ``bad_score``, ``empty`` or ``duplicates`` (fewer than two candidates left after
        scores, empties and copies are taken out, in that order), ``tie``, ``empty`` or ``cut`` (only empty or cut
        completions beat the others), ``small_gap``.
    """
    candidates = usable_candidates(group, scores)
    return (
        candidates if isinstance(candidates, Dropped) else _prefer(group, scores, candidates, min_gap, choose_truncated)
    )


def random_pair(group: CompletionGroup, scores: Sequence[float], *, min_gap: float = 0.0) -> ScoredPair | Dropped:
    """Two distinct candidates drawn at random, the better one chosen: pairs nearer to each other than best and worst.

    The draw depends on ``group.seed`` alone, so a round selected twice gives the same pairs. Arguments and reasons are
    those of ``best_vs_worst``.
    """
    candidates = usable_candidates(group, scores)
    if isinstance(candidates, Dropped):
        return candidates
    return _prefer(group, scores, sorted(random.Random(group.seed).sample(candidates, 2)), min_gap)


def usable_candidates(group: CompletionGroup, scores: Sequence[float]) -> list[int] | Dropped:
    """Indices of the distinct, scored completions that have a token; ``Dropped`` when they are fewer than two."""
    scored = [i for i, score in enumerate(scores) if math.isfinite(score)]
    written = [i for i in scored if group.completions[i].token_ids]
    first_with: dict[str, int] = {}
    for i in written:
        first_with.setdefault(group.completions[i].text, i)
    distinct = list(first_with.values())
    for left, reason in ((scored, "bad_score"), (written, "empty"), (distinct, "duplicates")):
        if len(left) < 2:
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
        return Dropped("cut" if not_empty else "empty")
    best = max(choosable, key=lambda i: scores[i])
    if scores[best] == scores[worst]:
        return Dropped("empty" if choosable == not_empty else "cut")
    if scores[best] - scores[worst] < min_gap:
        return Dropped("small_gap")
    return ScoredPair(chosen=best, rejected=worst)


SELECTORS: dict[str, Selector] = {"best_vs_worst": best_vs_worst, "random_pair": random_pair}
