"""Selectors by score.

Arguments that all of them take, and the reasons for dropping a group, are described at ``best_vs_worst``.
"""

import math
import random
from collections.abc import Sequence
from typing import TypeVar

from dpo_ray.rollout.selectors.preferences import (
    NOT_PICKED,
    Choice,
    gap,
    pairs_among,
    preferences,
    preferences_of,
    usable_candidates,
)
from dpo_ray.types import CompletionGroup, Dropped, ScoredPair

T = TypeVar("T")


def best_vs_worst(
    group: CompletionGroup,
    scores: Sequence[float],
    *,
    min_gap: float = 0.0,
    choose_truncated: bool = True,
    pairs: int = 1,
) -> Choice:
    """Pair the highest with the lowest score; of equal scores, take the earlier candidate.

    ``max_min`` of RLHFlow, arXiv:2405.07863.

    Args:
        scores: one per completion; NaN if the judge has none.
        min_gap: smallest difference of the two scores, in the judge's unit.
        choose_truncated: True allows a completion that hit the token limit as chosen. False prevents a judge that
            prefers long answers from teaching the policy never to end.
        pairs: largest number of pairs per group: those with the largest differences of scores. They share the prompt
            in one row, each completion once.

    Returns:
        The pairs, or the reason for dropping the group: ``bad_score``, ``empty`` or ``duplicates`` (fewer than two
        candidates left after skipping bad scores, empty and repeated texts, in that order), ``tie``, ``empty`` or
        ``truncated`` (only empty or truncated completions beat the others), ``small_gap``.
    """
    found = preferences(group, scores, min_gap=min_gap, choose_truncated=choose_truncated)
    return found.pick(found[:pairs])


def best_vs_random(
    group: CompletionGroup,
    scores: Sequence[float],
    *,
    min_gap: float = 0.0,
    choose_truncated: bool = True,
    pairs: int = 1,
) -> Choice:
    """Pair the highest score with others drawn at random: smaller gaps than best against worst.

    ``max_random`` of RLHFlow, arXiv:2405.07863. The draw depends on ``group.seed`` only, and is among the candidates
    that are worse by ``min_gap``.
    """
    found = preferences(group, scores, min_gap=min_gap, choose_truncated=choose_truncated)
    return found.pick(_draw([pair for pair in found if pair.chosen == found[0].chosen], group.seed, pairs))


def random_pair(
    group: CompletionGroup,
    scores: Sequence[float],
    *,
    min_gap: float = 0.0,
    choose_truncated: bool = True,
    pairs: int = 1,
) -> Choice:
    """Draw two distinct candidates at random and choose the better one: smaller gaps than best against worst.

    As online DPO with two candidates, arXiv:2402.04792. The draw depends on ``group.seed`` only. ``pairs`` counts
    draws: a tie, or a pair that the other arguments exclude, is not replaced by another.
    """
    candidates = usable_candidates(group, scores)
    if isinstance(candidates, Dropped):
        return candidates
    every = pairs_among(candidates)
    drawn = every.only(_draw(every, group.seed, pairs), NOT_PICKED)
    return preferences_of(drawn, group, scores, min_gap=min_gap, choose_truncated=choose_truncated).choice()


def all_pairs(
    group: CompletionGroup,
    scores: Sequence[float],
    *,
    min_gap: float = 0.0,
    choose_truncated: bool = True,
    pairs: int = 6,
) -> Choice:
    """All pairs with a better and a worse completion; if there are more than ``pairs``, that many drawn at random.

    As InstructGPT's comparisons, arXiv:2203.02155, section 3.5. The draw depends on ``group.seed`` only and keeps the
    distribution of gaps, whereas ``best_vs_worst`` with several pairs takes the largest. Four candidates have six
    pairs.
    """
    found = preferences(group, scores, min_gap=min_gap, choose_truncated=choose_truncated)
    return found.pick(_draw(found, group.seed, pairs))


def margin(
    group: CompletionGroup,
    scores: Sequence[float],
    *,
    min_gap: float = 0.0,
    max_gap: float = math.inf,
    choose_truncated: bool = True,
    pairs: int = 1,
) -> Choice:
    """The pairs whose gap of scores lies in [min_gap, max_gap], those with the largest gaps first.

    With ``min_gap`` alone and many ``pairs``, RS-DPO, arXiv:2402.10038. ``max_gap`` leaves out pairs that the policy
    would learn little from, or that only a judge's outlier separates.

    Returns:
        As ``best_vs_worst``; ``large_gap`` if only pairs beyond ``max_gap`` are left.
    """
    found = preferences(group, scores, min_gap=min_gap, choose_truncated=choose_truncated)
    found = found.filter(lambda pair: gap(pair, scores) <= max_gap, "large_gap")
    return found.pick(found[:pairs])


def top_bottom_k(
    group: CompletionGroup,
    scores: Sequence[float],
    *,
    k: int = 2,
    min_gap: float = 0.0,
    choose_truncated: bool = True,
) -> Choice:
    """Match the k best with the k worst: best and worst, second best and second worst, and so on.

    Each completion is in one pair, so none counts more than another. A group with fewer than 2k candidates has fewer
    pairs. For each of the best against each of the worst, see ``best_vs_worst`` with several pairs.
    """
    found = preferences(group, scores, min_gap=min_gap, choose_truncated=choose_truncated)
    matching: list[ScoredPair] = []
    for pair in found:  # the widest first, so that it joins the best and the worst of those left
        if not {pair.chosen, pair.rejected} & {i for other in matching for i in (other.chosen, other.rejected)}:
            matching.append(pair)
    return found.pick(matching[:k])


def _draw(items: Sequence[T], seed: int, count: int) -> list[T]:
    """Up to ``count`` items drawn at random, in their order."""
    drawn = sorted(random.Random(seed).sample(range(len(items)), min(count, len(items))))
    return [items[i] for i in drawn]
