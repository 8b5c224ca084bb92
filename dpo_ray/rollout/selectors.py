"""Pair selectors: they pick the pairs of chosen and rejected from the candidates of a judged group.

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

Choice = Sequence[ScoredPair] | Dropped


class Selector(Protocol):
    """Picks pairs from one judged group, or gives the reason why it has none."""

    def __call__(self, group: CompletionGroup, scores: Sequence[float]) -> ScoredPair | Choice: ...


def build_selector(component: Component) -> Selector:
    """The selector of ``online.select``, with ``args`` bound.

    Raises:
        ValueError: the name or an argument is unknown, or an argument is missing.
    """
    return bind(component.use, component.args, SELECTORS, "selector")


def select_pairs(
    selector: Selector, group: CompletionGroup, scores: Sequence[float]
) -> tuple[ScoredPair, ...] | Dropped:
    """The selector's pairs for a group.

    Raises:
        ValueError: the selector returned neither pairs of two candidates of the group nor ``Dropped``.
    """
    choice = selector(group, scores)
    if isinstance(choice, Dropped):
        return choice
    pairs = [choice] if isinstance(choice, ScoredPair) else choice
    candidates = range(len(group.completions))
    valid = isinstance(pairs, Sequence) and all(
        isinstance(pair, ScoredPair) and pair.chosen != pair.rejected and {pair.chosen, pair.rejected} <= {*candidates}
        for pair in pairs
    )
    if not valid or not pairs:
        raise ValueError(
            f"the selector returned {choice!r} for prompt {group.prompt.index} with {len(candidates)} candidates; it "
            "must return ScoredPair(chosen, rejected) with the indices of two candidates, a list of such pairs, or "
            "Dropped(reason)"
        )
    if unscored := [
        index for pair in pairs for index in (pair.chosen, pair.rejected) if not math.isfinite(scores[index])
    ]:
        raise ValueError(
            f"the selector chose candidate {unscored[0]} of prompt {group.prompt.index}, which has no score; see "
            "usable_candidates"
        )
    return tuple(ScoredPair(int(pair.chosen), int(pair.rejected)) for pair in pairs)


def best_vs_worst(
    group: CompletionGroup,
    scores: Sequence[float],
    *,
    min_gap: float = 0.0,
    choose_truncated: bool = True,
    pairs: int = 1,
) -> Choice:
    """Pair the highest with the lowest score; of equal scores, take the earlier candidate.

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
    candidates = usable_candidates(group, scores)
    if isinstance(candidates, Dropped):
        return candidates
    return _widest(group, scores, candidates, min_gap, choose_truncated, pairs)


def random_pair(group: CompletionGroup, scores: Sequence[float], *, min_gap: float = 0.0) -> Choice:
    """Draw two distinct candidates at random and choose the better one: smaller gaps than best against worst.

    The draw depends on ``group.seed`` only, so selecting a round twice gives the same pairs. For arguments and reasons
    see ``best_vs_worst``.
    """
    candidates = usable_candidates(group, scores)
    if isinstance(candidates, Dropped):
        return candidates
    return _widest(group, scores, sorted(random.Random(group.seed).sample(candidates, 2)), min_gap)


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


def _widest(
    group: CompletionGroup,
    scores: Sequence[float],
    candidates: Sequence[int],
    min_gap: float,
    choose_truncated: bool = True,
    pairs: int = 1,
) -> Choice:
    """The ``pairs`` pairs of candidates with the largest gaps."""
    ordered = [ScoredPair(i, j) for i in candidates for j in candidates if scores[i] > scores[j]]
    if not ordered:
        return Dropped("tie")
    with_text = [pair for pair in ordered if group.completions[pair.chosen].text.strip()]
    choosable = [pair for pair in with_text if choose_truncated or group.completions[pair.chosen].finished]
    if not choosable:
        return Dropped("truncated" if with_text else "empty")
    gap = lambda pair: scores[pair.chosen] - scores[pair.rejected]  # noqa: E731
    if not (wide := [pair for pair in choosable if gap(pair) >= min_gap]):
        return Dropped("small_gap")
    return sorted(wide, key=lambda pair: (-gap(pair), pair.chosen, pair.rejected))[:pairs]


SELECTORS: dict[str, Selector] = {"best_vs_worst": best_vs_worst, "random_pair": random_pair}
