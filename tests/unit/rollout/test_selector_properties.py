"""Every selector on drawn groups, against all pairs that its arguments accept."""

import math
from itertools import permutations
from typing import Any, NamedTuple

import hypothesis
import hypothesis.strategies as st
import pytest

from dpo_ray.config import Component
from dpo_ray.rollout.selectors import SELECTORS, build_selector, select_pairs, usable_candidates
from dpo_ray.types import Completion, CompletionGroup, Dropped, Prompt, ScoredPair

COMPLETIONS = st.builds(
    lambda text, tokens, finished: Completion(text, tuple(range(tokens)), finished),
    st.sampled_from(["", " ", *"abcdef"]),
    st.integers(0, 5),
    st.booleans(),
)
SCORES = st.one_of(st.sampled_from([0.0, 0.5, 1.0, 2.0]), st.sampled_from([math.nan, math.inf]), st.floats(-3, 3))


class Case(NamedTuple):
    """A group, its scores, and the arguments of a selector."""

    group: CompletionGroup
    scores: list[float]
    args: dict[str, Any]


@st.composite
def cases(draw: st.DrawFn, use: str) -> Case:
    completions = tuple(draw(st.lists(COMPLETIONS, min_size=2, max_size=7)))
    scores = draw(st.lists(SCORES, min_size=len(completions), max_size=len(completions)))
    values: dict[str, st.SearchStrategy[Any]] = {
        "min_gap": st.sampled_from([0.0, 0.5, 1.5]),
        "choose_truncated": st.booleans(),
        **({"k": st.integers(1, 4)} if use == "top_bottom_k" else {"pairs": st.integers(1, 8)}),
        **({"max_gap": st.sampled_from([1.5, 2.5])} if use == "margin" else {}),
    }
    if use == "length_controlled":
        values["penalty"] = st.sampled_from([0.0, 0.25])
        values["min_length_ratio"], values["max_length_ratio"] = st.sampled_from([0.0, 0.5]), st.sampled_from([1.0, 2])
    args = draw(st.fixed_dictionaries({}, optional=values))
    group = CompletionGroup(Prompt(0, (), (1,)), completions, draw(st.integers(0, 2**31)))
    return Case(group, scores, args)


def acceptable(case: Case) -> set[ScoredPair]:
    """All pairs that a selector may pick, from the meanings of its arguments."""
    completions, args = case.group.completions, case.args
    tokens = [len(completion.token_ids) for completion in completions]
    values = [score - args.get("penalty", 0.0) * length for score, length in zip(case.scores, tokens, strict=True)]
    usable = [i for i, score in enumerate(case.scores) if math.isfinite(score) and tokens[i]]
    first = {completions[i].text: i for i in reversed(usable)}
    return {
        ScoredPair(i, j)
        for i, j in permutations(sorted(first.values()), 2)
        if values[i] > values[j]
        and args.get("min_gap", 0.0) <= values[i] - values[j] <= args.get("max_gap", math.inf)
        and completions[i].text.strip()
        and (completions[i].finished or args.get("choose_truncated", True))
        and args.get("min_length_ratio", 0.0) <= tokens[i] / tokens[j] <= args.get("max_length_ratio", math.inf)
    }


@pytest.mark.parametrize("use", SELECTORS)
@hypothesis.given(st.data())
@hypothesis.settings(deadline=None, max_examples=300)
def test_a_selector_picks_distinct_acceptable_pairs_and_drops_a_group_only_without_one(
    use: str, data: st.DataObject
) -> None:
    case = data.draw(cases(use))
    select = build_selector(Component(use=use, args=case.args))
    choice, accepted = select_pairs(select, case.group, case.scores), acceptable(case)
    assert choice == select_pairs(select, case.group, case.scores), "a selector is a function of group and scores"
    if isinstance(choice, Dropped):
        assert not accepted or use == "random_pair", "a pair drawn without looking at the scores may be unacceptable"
        return
    usable = usable_candidates(case.group, case.scores)
    assert not isinstance(usable, Dropped)
    assert len(choice) + sum(choice.left_out.values()) == len(usable) * (len(usable) - 1) / 2
    assert set(choice) <= accepted
    assert len(set(choice)) == len(choice) <= case.args.get("pairs", case.args.get("k", {"all_pairs": 6}.get(use, 2)))
    penalty = case.args.get("penalty", 0.0)
    for pair in choice:
        chosen, rejected = case.group.completions[pair.chosen], case.group.completions[pair.rejected]
        gap = case.scores[pair.chosen] - case.scores[pair.rejected]
        assert gap > 0 or penalty, "only a penalty prefers a lower score"
        penalized = gap - penalty * (len(chosen.token_ids) - len(rejected.token_ids))
        assert (gap if pair.gap is None else pair.gap) == pytest.approx(penalized)


@pytest.mark.parametrize(("use", "count"), [("best_vs_worst", 1), ("best_vs_worst", 4), ("margin", 8)])
@hypothesis.given(st.data())
@hypothesis.settings(deadline=None)
def test_pairs_by_gap_are_those_with_the_largest_gaps_of_all(use: str, count: int, data: st.DataObject) -> None:
    case = data.draw(cases(use))
    select = build_selector(Component(use=use, args=case.args | {"pairs": count}))
    choice = select_pairs(select, case.group, case.scores)
    gap = lambda pair: case.scores[pair.chosen] - case.scores[pair.rejected]  # noqa: E731
    largest = sorted(map(gap, acceptable(case)), reverse=True)[:count]
    assert (() if isinstance(choice, Dropped) else tuple(map(gap, choice))) == tuple(largest)
