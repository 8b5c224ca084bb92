"""Pair selectors: they pick the pairs of chosen and rejected from the candidates of a judged group.

All selectors here skip candidates whose score is not finite, candidates without a token, and repeated texts. A
completion of white space only is never chosen; it may be rejected, which teaches the policy not to answer with nothing.
A selector is a pure function of the group and its scores: draws depend on ``group.seed`` only.
"""

import math
from collections.abc import Sequence
from typing import Any, Protocol

from dpo_ray.config import Component
from dpo_ray.plugins import bind
from dpo_ray.rollout.selectors.arguments import validate_arguments
from dpo_ray.rollout.selectors.by_length import length_controlled, length_matched
from dpo_ray.rollout.selectors.by_score import (
    all_pairs,
    best_vs_random,
    best_vs_worst,
    margin,
    random_pair,
    top_bottom_k,
)
from dpo_ray.rollout.selectors.preferences import Choice, Pairs, usable_candidates
from dpo_ray.types import CompletionGroup, Dropped, ScoredPair

__all__ = ["SELECTORS", "Choice", "Pairs", "Selector", "build_selector", "select_pairs", "usable_candidates"]


class Selector(Protocol):
    """Picks pairs from one judged group, or gives the reason why it has none."""

    def __call__(self, group: CompletionGroup, scores: Sequence[float]) -> ScoredPair | Choice: ...


SELECTORS: dict[str, Selector] = {
    selector.__name__: selector
    for selector in (
        best_vs_worst, best_vs_random, random_pair, all_pairs, margin, top_bottom_k, length_controlled, length_matched,
    )
}  # fmt: skip


def build_selector(component: Component) -> Selector:
    """The selector of ``online.select``, with ``args`` bound.

    Raises:
        ValueError: the name or an argument is unknown, an argument is missing, or out of range for a selector of
            ``SELECTORS``.
    """
    selector = bind(component.use, component.args, SELECTORS, "selector")
    if component.use in SELECTORS:
        validate_arguments(component.args)
    return selector


def select_pairs(selector: Selector, group: CompletionGroup, scores: Sequence[float]) -> Pairs | Dropped:
    """The selector's pairs for a group; a selector that returns ``Pairs`` counts those that it left out.

    Raises:
        ValueError: the selector returned neither pairs of two candidates of the group nor ``Dropped``.
    """
    choice = selector(group, scores)
    if isinstance(choice, Dropped):
        return choice
    pairs = [choice] if isinstance(choice, ScoredPair) else choice
    candidates = range(len(group.completions))
    if not isinstance(pairs, Sequence) or not pairs or not all(_is_pair(pair, candidates) for pair in pairs):
        raise ValueError(
            f"the selector returned {choice!r} for prompt {group.prompt.index} with {len(candidates)} candidates; it "
            "must return ScoredPair(chosen, rejected) with the indices of two candidates, a list of such pairs, or "
            "Dropped(reason); the gap of a pair, if it has one, is a finite number from 0"
        )
    if unscored := [
        index for pair in pairs for index in (pair.chosen, pair.rejected) if not math.isfinite(scores[index])
    ]:
        raise ValueError(
            f"the selector chose candidate {unscored[0]} of prompt {group.prompt.index}, which has no score; see "
            "usable_candidates"
        )
    plain = (
        ScoredPair(int(pair.chosen), int(pair.rejected), None if pair.gap is None else float(pair.gap))
        for pair in pairs
    )
    return Pairs(plain, pairs.left_out if isinstance(pairs, Pairs) else None)


def _is_pair(pair: Any, candidates: range) -> bool:
    return (
        isinstance(pair, ScoredPair)
        and pair.chosen != pair.rejected
        and {pair.chosen, pair.rejected} <= {*candidates}
        and (pair.gap is None or 0 <= pair.gap < math.inf)
    )
