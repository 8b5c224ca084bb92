"""Pair selectors, on groups small enough to see the expected pair."""

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from dpo_ray.config import Component
from dpo_ray.rollout.selectors import SELECTORS, best_vs_worst, build_selector, random_pair, select_pairs
from dpo_ray.types import Completion, Dropped, ScoredPair


def test_best_vs_worst_takes_the_highest_and_the_lowest_score(group):
    assert best_vs_worst(group("a", "b", "c"), [0.2, 0.9, -0.4]) == [ScoredPair(chosen=1, rejected=2)]


def test_of_equal_scores_the_earlier_candidate_is_taken(group):
    assert best_vs_worst(group("a", "b", "c", "d"), [1.0, 0.0, 1.0, 0.0]) == [ScoredPair(chosen=0, rejected=1)]


def pairs_of(select, group, scores, **arguments) -> list[ScoredPair]:
    """The pairs of a group that has some."""
    choice = select(group, scores, **arguments)
    assert not isinstance(choice, Dropped)
    return list(choice)


@pytest.mark.parametrize("select", SELECTORS.values(), ids=SELECTORS)
def test_a_tie_gives_no_pair(group, select):
    assert select(group("a", "b", "c"), [0.5, 0.5, 0.5]) == Dropped("tie")


@pytest.mark.parametrize("select", SELECTORS.values(), ids=SELECTORS)
def test_identical_texts_are_one_candidate_with_the_score_of_the_first(group, select):
    assert select(group("a", "a", "a"), [0.0, 1.0, 2.0]) == Dropped("duplicates")
    assert select(group("a", "b", "a"), [0.0, 1.0, 2.0]) == [ScoredPair(chosen=1, rejected=0)]


@pytest.mark.parametrize("select", SELECTORS.values(), ids=SELECTORS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_candidate_whose_score_is_not_finite_is_skipped(group, select, bad):
    assert select(group("a", "b", "c"), [bad, 0.0, 1.0]) == [ScoredPair(chosen=2, rejected=1)]
    assert select(group("a", "b"), [bad, 1.0]) == Dropped("bad_score")


def test_a_duplicate_replaces_a_first_copy_without_a_score(group):
    assert best_vs_worst(group("a", "a", "b"), [math.nan, 1.0, 0.0]) == [ScoredPair(chosen=1, rejected=2)]


@pytest.mark.parametrize("select", SELECTORS.values(), ids=SELECTORS)
def test_a_gap_below_min_gap_gives_no_pair_and_a_gap_of_min_gap_does(group, select):
    assert select(group("a", "b"), [0.0, 0.25], min_gap=0.5) == Dropped("small_gap")
    assert select(group("a", "b"), [0.0, 0.5], min_gap=0.5) == [ScoredPair(chosen=1, rejected=0)]


def test_an_empty_completion_can_be_rejected(group):
    assert best_vs_worst(group("a", ""), [0.0, -1.0]) == [ScoredPair(chosen=0, rejected=1)]


def test_an_empty_completion_is_never_chosen(group):
    assert best_vs_worst(group("a", " \n", "b"), [0.0, 9.0, 1.0]) == [ScoredPair(chosen=2, rejected=0)]
    assert best_vs_worst(group("a", ""), [-0.5, 0.0]) == Dropped("empty")
    assert best_vs_worst(group("", " "), [0.0, 1.0]) == Dropped("empty")


def test_a_completion_without_a_token_is_neither_chosen_nor_rejected(group):
    full = group("a", "b", "c")
    bare = replace(full, completions=(*full.completions[:2], Completion("", (), finished=True)))
    assert best_vs_worst(bare, [0.0, 1.0, -5.0]) == [ScoredPair(chosen=1, rejected=0)]
    assert best_vs_worst(replace(bare, completions=bare.completions[1:]), [1.0, -5.0]) == Dropped("empty")


def test_random_pair_chooses_the_better_of_two_and_is_reproducible_for_a_seed(group):
    scores = [0.0, 1.0, 2.0, 3.0]
    for seed in range(50):
        (pair,) = choice = pairs_of(random_pair, group("a", "b", "c", "d", seed=seed), scores)
        assert scores[pair.chosen] > scores[pair.rejected]
        assert choice == pairs_of(random_pair, group("a", "b", "c", "d", seed=seed), scores)


def test_random_pair_draws_each_of_the_six_pairs_about_equally_often(group):
    drawn = Counter(
        pairs_of(random_pair, group("a", "b", "c", "d", seed=seed), [0.0, 1.0, 2.0, 3.0])[0] for seed in range(1200)
    )
    assert len(drawn) == 6
    assert all(140 <= times <= 260 for times in drawn.values())  # 200 each, standard deviation 13


def test_build_selector_binds_its_arguments(group):
    select = build_selector(Component(use="best_vs_worst", args={"min_gap": 2.0}))
    assert select(group("a", "b"), [0.0, 1.0]) == Dropped("small_gap")


def test_build_selector_rejects_an_unknown_name_or_argument():
    with pytest.raises(ValueError, match="no selector is called 'best_vs_wrost'; did you mean 'best_vs_worst'"):
        build_selector(Component(use="best_vs_wrost"))
    with pytest.raises(ValueError, match="takes no argument 'gap'"):
        build_selector(Component(use="best_vs_worst", args={"gap": 1.0}))


def test_a_truncated_completion_is_not_chosen_without_choose_truncated_and_may_still_be_rejected(group):
    finished = group("a", "b", "c")
    first = replace(finished.completions[0], finished=False)
    truncated = replace(finished, completions=(first, *finished.completions[1:]))
    assert best_vs_worst(truncated, [0.9, 0.5, 0.1]) == [ScoredPair(chosen=0, rejected=2)]
    assert best_vs_worst(truncated, [0.9, 0.5, 0.1], choose_truncated=False) == [ScoredPair(chosen=1, rejected=2)]
    assert best_vs_worst(truncated, [0.1, 0.5, 0.9], choose_truncated=False) == [ScoredPair(chosen=2, rejected=0)]
    assert best_vs_worst(truncated, [0.9, 0.1, 0.1], choose_truncated=False) == Dropped("truncated")


def test_several_pairs_are_those_with_the_largest_differences_of_scores(group):
    pairs = best_vs_worst(group("a", "b", "c"), [0.0, 1.0, 3.0], pairs=2)
    assert pairs == [ScoredPair(chosen=2, rejected=0), ScoredPair(chosen=2, rejected=1)]  # gaps of 3, 2 and 1
    assert len(pairs_of(best_vs_worst, group("a", "b", "c"), [0.0, 1.0, 3.0], pairs=9)) == 3
    assert len(pairs_of(best_vs_worst, group("a", "b", "c"), [0.0, 1.0, 3.0], pairs=9, min_gap=2.0)) == 2


def test_select_pairs_takes_a_single_pair_a_list_or_a_reason(group):
    two = group("a", "b")
    pair = ScoredPair(chosen=1, rejected=0)
    assert select_pairs(lambda group, scores: pair, two, [0.0, 1.0]) == (pair,)
    assert select_pairs(best_vs_worst, two, [0.0, 1.0]) == (pair,)
    assert select_pairs(best_vs_worst, two, [1.0, 1.0]) == Dropped("tie")


def test_select_pairs_converts_indices_of_numpy_and_rejects_candidates_without_a_score(group):
    order: Any = np.arange(1, -1, -1)  # not Python integers
    numpy_pair = lambda group, scores: ScoredPair(order[0], order[1])  # noqa: E731
    choice = select_pairs(numpy_pair, group("a", "b", "c"), [0.0, 1.0, 2.0])
    assert not isinstance(choice, Dropped)
    assert [type(choice[0].chosen), type(choice[0].rejected)] == [int, int]
    with pytest.raises(ValueError, match="chose candidate 2 of prompt 0, which has no score"):
        select_pairs(lambda group, scores: ScoredPair(2, 0), group("a", "b", "c"), [0.0, 1.0, math.nan])


@pytest.mark.parametrize("choice", [None, (0, 1), [], ScoredPair(0, 0), ScoredPair(0, 2), [ScoredPair(-1, 0)]], ids=str)
def test_a_choice_that_is_no_pair_of_two_candidates_is_rejected(group, choice):
    with pytest.raises(ValueError, match=r"the selector returned .* for prompt 4 with 2 candidates"):
        select_pairs(lambda group, scores: choice, group("a", "b", index=4), [0.0, 1.0])
