"""The preferences of a judged group: the pairs that a selector may pick from, or the reason for having none."""

import math
from collections.abc import Iterable, Sequence
from itertools import combinations

from dpo_ray.types import CompletionGroup, Dropped, ScoredPair

Choice = Sequence[ScoredPair] | Dropped


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


def preferences(
    group: CompletionGroup, scores: Sequence[float], *, min_gap: float, choose_truncated: bool
) -> list[ScoredPair] | Dropped:
    """All acceptable pairs of usable candidates, those with the largest gaps of scores first.

    For arguments and reasons see ``best_vs_worst``.
    """
    candidates = usable_candidates(group, scores)
    if isinstance(candidates, Dropped):
        return candidates
    return preferences_of(
        combinations(candidates, 2), group, scores, min_gap=min_gap, choose_truncated=choose_truncated
    )


def preferences_of(
    index_pairs: Iterable[tuple[int, int]],
    group: CompletionGroup,
    scores: Sequence[float],
    *,
    min_gap: float,
    choose_truncated: bool,
) -> list[ScoredPair] | Dropped:
    """As ``preferences``, for some pairs of usable candidates, each in any order."""
    ordered = [_pair(i, j, scores) for i, j in index_pairs if scores[i] != scores[j]]
    if not ordered:
        return Dropped("tie")
    with_text = [pair for pair in ordered if group.completions[pair.chosen].text.strip()]
    choosable = [pair for pair in with_text if choose_truncated or group.completions[pair.chosen].finished]
    if not choosable:
        return Dropped("truncated" if with_text else "empty")
    wide = [pair for pair in choosable if gap(pair, scores) >= min_gap]
    if not wide:
        return Dropped("small_gap")
    return sorted(wide, key=lambda pair: (-gap(pair, scores), pair.chosen, pair.rejected))


def gap(pair: ScoredPair, scores: Sequence[float]) -> float:
    """Score of the chosen minus score of the rejected completion."""
    return scores[pair.chosen] - scores[pair.rejected]


def _pair(i: int, j: int, scores: Sequence[float]) -> ScoredPair:
    return ScoredPair(i, j) if scores[i] > scores[j] else ScoredPair(j, i)
