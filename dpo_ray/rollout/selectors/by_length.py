"""Selectors by score and length, against judges that prefer long answers.

Lengths are in tokens, with the end-of-turn token. Arguments and reasons are those of ``best_vs_worst``, and further
ones.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

from dpo_ray.rollout.selectors.preferences import Choice, gap, preferences
from dpo_ray.types import CompletionGroup, ScoredPair


def length_controlled(
    group: CompletionGroup,
    scores: Sequence[float],
    *,
    penalty: float = 0.0,
    min_length_ratio: float = 0.0,
    max_length_ratio: float = math.inf,
    min_gap: float = 0.0,
    choose_truncated: bool = True,
    pairs: int = 1,
) -> Choice:
    """Best against worst by score minus a penalty per token, of the pairs whose ratio of lengths is allowed.

    The penalty of RLHFlow, arXiv:2405.07863 (``max_min_p``, there per character). The chosen completion may have the
    lower score, if it is shorter. Gaps are those of penalized scores.

    Args:
        penalty: subtracted from the score per token, in the judge's unit.
        min_length_ratio: smallest length of the chosen divided by the length of the rejected completion.
        max_length_ratio: largest such ratio.

    Returns:
        As ``best_vs_worst``; ``length`` if only pairs with another ratio are left.
    """
    lengths = _lengths(group)
    penalized = [score - penalty * length for score, length in zip(scores, lengths, strict=True)]
    found = preferences(group, penalized, min_gap=min_gap, choose_truncated=choose_truncated)
    ratio = lambda pair: lengths[pair.chosen] / lengths[pair.rejected]  # noqa: E731
    allowed = found.filter(lambda pair: min_length_ratio <= ratio(pair) <= max_length_ratio, "length")
    return allowed.pick(replace(pair, gap=gap(pair, penalized)) for pair in allowed[:pairs])


def length_matched(
    group: CompletionGroup,
    scores: Sequence[float],
    *,
    min_gap: float = 0.0,
    choose_truncated: bool = True,
    pairs: int = 1,
) -> Choice:
    """The pairs whose lengths are closest by ratio; of equally close ones, those with the largest gaps of scores."""
    found = preferences(group, scores, min_gap=min_gap, choose_truncated=choose_truncated)
    lengths = _lengths(group)

    def distance(pair: ScoredPair) -> float:
        """Length of the longer divided by the length of the shorter completion."""
        shorter, longer = sorted((lengths[pair.chosen], lengths[pair.rejected]))
        return longer / shorter

    return found.pick(sorted(found, key=distance)[:pairs])


def _lengths(group: CompletionGroup) -> list[int]:
    """Tokens of each completion."""
    return [len(completion.token_ids) for completion in group.completions]
