"""Pair selectors, on groups small enough to see the expected pair."""

import math
from collections import Counter
from dataclasses import replace
from inspect import signature
from typing import Any

import numpy as np
import pytest

from dpo_ray.config import Component
from dpo_ray.rollout.selectors import SELECTORS, build_selector, select_pairs
from dpo_ray.rollout.selectors.arguments import ACCEPTED
from dpo_ray.rollout.selectors.by_length import length_controlled, length_matched
from dpo_ray.rollout.selectors.by_score import (
    all_pairs,
    best_vs_random,
    best_vs_worst,
    margin,
    random_pair,
    top_bottom_k,
)
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


def test_random_pair_with_several_pairs_draws_that_many_and_does_not_replace_ties(group):
    four = group("a", "b", "c", "d")
    assert len(pairs_of(random_pair, four, [0.0, 1.0, 2.0, 3.0], pairs=2)) == 2
    assert len(pairs_of(random_pair, four, [0.0, 1.0, 2.0, 3.0], pairs=9)) == 6
    assert len(pairs_of(random_pair, four, [0.0, 0.0, 1.0, 1.0], pairs=9)) == 4, "two of six are ties"


def test_best_vs_random_chooses_the_best_and_draws_each_other_candidate_about_equally_often(group):
    scores = [0.0, 3.0, 1.0, 2.0]
    drawn = Counter(pairs_of(best_vs_random, group("a", "b", "c", "d", seed=seed), scores)[0] for seed in range(1200))
    assert set(drawn) == {ScoredPair(chosen=1, rejected=i) for i in (0, 2, 3)}
    assert all(330 <= times <= 470 for times in drawn.values())  # 400 each, standard deviation 16


def test_best_vs_random_draws_among_those_that_are_worse_by_min_gap(group):
    four, scores = group("a", "b", "c", "d"), [0.0, 3.0, 1.0, 2.0]
    assert pairs_of(best_vs_random, four, scores, pairs=9, min_gap=2.0) == [ScoredPair(1, 0), ScoredPair(1, 2)]
    assert len(pairs_of(best_vs_random, four, scores, pairs=2)) == 2


def test_all_pairs_takes_every_better_and_worse_completion(group):
    assert all_pairs(group("a", "b", "c"), [0.0, 1.0, 3.0]) == [ScoredPair(2, 0), ScoredPair(2, 1), ScoredPair(1, 0)]
    assert len(pairs_of(all_pairs, group("a", "b", "c", "d"), [0.0, 1.0, 1.0, 3.0])) == 5, "one of six is a tie"


def test_more_pairs_than_all_pairs_may_take_are_drawn_by_the_seed_of_the_group(group):
    scores = [0.0, 1.0, 2.0, 3.0, 4.0]  # ten pairs
    drawn = Counter(
        pair for seed in range(600) for pair in pairs_of(all_pairs, group(*"abcde", seed=seed), scores, pairs=3)
    )
    assert sum(drawn.values()) == 1800
    assert len(drawn) == 10
    assert all(140 <= times <= 220 for times in drawn.values())  # 180 each, standard deviation 11


def test_margin_takes_the_largest_gaps_within_its_range(group):
    three, scores = group("a", "b", "c"), [0.0, 1.0, 3.0]  # gaps of 3, 2 and 1
    assert margin(three, scores, min_gap=1.0, max_gap=2.0) == [ScoredPair(2, 1)]
    assert margin(three, scores, min_gap=1.0, max_gap=2.0, pairs=9) == [ScoredPair(2, 1), ScoredPair(1, 0)]
    assert margin(three, scores, min_gap=1.5, max_gap=2.5, pairs=9) == [ScoredPair(2, 1)]
    assert margin(three, scores, max_gap=0.5) == Dropped("large_gap")
    assert margin(three, scores, min_gap=2.5, max_gap=2.8) == Dropped("large_gap")
    assert margin(three, scores, min_gap=3.5, max_gap=4.0) == Dropped("small_gap")


def test_top_bottom_k_matches_the_best_with_the_worst_and_uses_no_completion_twice(group):
    five, scores = group("a", "b", "c", "d", "e"), [5.0, 1.0, 4.0, 2.0, 3.0]
    assert top_bottom_k(five, scores) == [ScoredPair(0, 1), ScoredPair(2, 3)]
    assert top_bottom_k(five, scores, k=1) == best_vs_worst(five, scores)
    assert top_bottom_k(five, scores, k=9) == [ScoredPair(0, 1), ScoredPair(2, 3)], "the one in the middle is left"
    assert top_bottom_k(five, scores, min_gap=3.0) == [ScoredPair(0, 1)]


def test_top_bottom_k_passes_over_a_truncated_best_completion(group):
    finished, scores = group("a", "b", "c", "d"), [4.0, 3.0, 2.0, 1.0]
    truncated = replace(
        finished, completions=(replace(finished.completions[0], finished=False), *finished.completions[1:])
    )
    assert top_bottom_k(truncated, scores, choose_truncated=False) == [ScoredPair(1, 3)], "nothing beats a or c"


LENGTHS = ("a b c d e f g h i", "a", "b c")
"""10, 2 and 3 tokens, with that of the end."""


def test_length_controlled_chooses_by_the_score_minus_the_penalty_per_token(group):
    scores = [2.0, 1.5, 0.0]  # 1.0, 1.3 and -0.3 after 0.1 per token
    assert length_controlled(group(*LENGTHS), scores) == [ScoredPair(0, 2)]
    (pair,) = pairs_of(length_controlled, group(*LENGTHS), scores, penalty=0.1)
    assert pair == ScoredPair(1, 2)
    assert pair.gap == pytest.approx(1.6)
    (shorter,) = pairs_of(length_controlled, group(*LENGTHS[:2]), scores[:2], penalty=0.1)
    assert shorter == ScoredPair(chosen=1, rejected=0), "the lower score, and eight tokens less"
    assert shorter.gap == pytest.approx(0.3)
    assert length_controlled(group(*LENGTHS[:2]), scores[:2], penalty=0.1, min_gap=0.4) == Dropped("small_gap")


def test_length_controlled_takes_pairs_whose_ratio_of_lengths_is_allowed(group):
    three, scores = group(*LENGTHS), [2.0, 1.5, 0.0]  # ratios: 10/3 of the first to the last, 10/2, and 2/3
    assert length_controlled(three, scores, max_length_ratio=5.0) == [ScoredPair(0, 2)]
    assert length_controlled(three, scores, max_length_ratio=3.0) == [ScoredPair(1, 2)]
    assert length_controlled(three, scores, min_length_ratio=4.0, max_length_ratio=6.0) == [ScoredPair(0, 1)]
    assert length_controlled(three, scores, max_length_ratio=0.5) == Dropped("length")
    assert length_controlled(three, scores, min_length_ratio=5.5) == Dropped("length")


def test_length_matched_takes_the_pair_of_the_closest_lengths_with_a_large_enough_gap(group):
    four, scores = group(*LENGTHS, "a b c d e f g h"), [2.0, 1.5, 0.0, 0.5]  # 10, 2, 3 and 9 tokens
    assert length_matched(four, scores) == [ScoredPair(0, 3)], "10 to 9"
    assert length_matched(four, scores, min_gap=1.6) == [ScoredPair(0, 2)], "10 to 3 is the only other gap over 1.6"
    assert length_matched(four, scores, pairs=2) == [ScoredPair(0, 3), ScoredPair(1, 2)], "10 to 9, and 3 to 2"


def test_of_equally_close_lengths_the_largest_gap_counts(group):
    assert length_matched(group("a", "b", "c"), [1.0, 0.0, 3.0]) == [ScoredPair(2, 1)]


@pytest.mark.parametrize(
    ("use", "args", "message"),
    [
        ("best_vs_worst", {"pairs": 0}, r"online.select.args.pairs is 0; accepted: a whole number from 1"),
        ("all_pairs", {"pairs": 2.0}, r"pairs is 2.0; accepted: a whole number from 1"),
        ("top_bottom_k", {"k": True}, r"k is True; accepted: a whole number from 1"),
        ("random_pair", {"min_gap": -0.1}, r"min_gap is -0.1; accepted: a finite number from 0"),
        ("margin", {"max_gap": "wide"}, r"max_gap is 'wide'; accepted: a number above 0"),
        ("margin", {"min_gap": 2, "max_gap": 1.5}, r"min_gap is 2 and max_gap is 1.5, so that no pair would be left"),
        ("length_controlled", {"penalty": math.nan}, r"penalty is nan; accepted: a finite number from 0"),
        ("length_controlled", {"min_length_ratio": 2, "max_length_ratio": 1}, r"min_length_ratio is 2 and max"),
        ("length_matched", {"choose_truncated": "no"}, r"choose_truncated is 'no'; accepted: true or false"),
    ],
)
def test_an_argument_out_of_range_is_rejected_before_anything_starts(use, args, message):
    with pytest.raises(ValueError, match=message):
        build_selector(Component(use=use, args=args))


def test_every_argument_of_a_selector_has_a_range():
    for use, selector in SELECTORS.items():
        parameters = list(signature(selector).parameters.values())[2:]
        assert {parameter.name for parameter in parameters} <= set(ACCEPTED)
        build_selector(Component(use=use, args={parameter.name: parameter.default for parameter in parameters}))


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


@pytest.mark.parametrize(
    ("use", "args", "left_out"),
    [
        ("best_vs_worst", {}, {"not_picked": 5}),
        ("best_vs_worst", {"pairs": 9, "min_gap": 1.5, "choose_truncated": False}, {"truncated": 3, "small_gap": 2}),
        ("best_vs_random", {"pairs": 9}, {"not_picked": 3}),
        ("margin", {"max_gap": 2.5, "pairs": 2}, {"large_gap": 1, "not_picked": 3}),
        ("top_bottom_k", {}, {"not_picked": 4}),
        ("length_controlled", {"max_length_ratio": 1.0, "pairs": 9}, {"length": 3}),
        ("length_matched", {"pairs": 4}, {"not_picked": 2}),
        ("all_pairs", {"pairs": 6}, {}),
        ("all_pairs", {"pairs": 2}, {"not_picked": 4}),
    ],
    ids=str,
)
def test_pairs_that_a_selector_leaves_out_are_counted_by_reason(group, use, args, left_out):
    """Six pairs, whose longer completion is better: gaps of 3, 2, 2, 1, 1 and 1; the best is truncated."""
    four = group("a b c d", "a b c", "a b", "a")
    best, *others = four.completions
    four = replace(four, completions=(replace(best, finished=False), *others))
    scores = [4.0, 3.0, 2.0, 1.0] if use != "length_controlled" else [4.0, 1.0, 2.0, 3.0]
    choice = select_pairs(build_selector(Component(use=use, args=args)), four, scores)
    assert not isinstance(choice, Dropped)
    assert {reason: count for reason, count in choice.left_out.items() if count} == left_out
    assert len(choice) + sum(left_out.values()) == 6


def test_draws_that_tie_and_pairs_that_are_not_drawn_are_counted_apart(group):
    for seed in range(20):
        choice = select_pairs(SELECTORS["random_pair"], group("a", "b", "c", seed=seed), [0.0, 0.0, 1.0])
        assert choice == Dropped("tie") or (not isinstance(choice, Dropped) and choice.left_out["not_picked"] == 2)
    choice = select_pairs(
        build_selector(Component(use="random_pair", args={"pairs": 3})), group(*"abc"), [0.0, 0.0, 1.0]
    )
    assert not isinstance(choice, Dropped)
    assert (len(choice), choice.left_out["tie"], choice.left_out["not_picked"]) == (2, 1, 0)


def test_select_pairs_takes_a_single_pair_a_list_or_a_reason(group):
    two = group("a", "b")
    pair = ScoredPair(chosen=1, rejected=0)
    assert select_pairs(lambda group, scores: pair, two, [0.0, 1.0]) == [pair]
    assert select_pairs(best_vs_worst, two, [0.0, 1.0]) == [pair]
    assert select_pairs(best_vs_worst, two, [1.0, 1.0]) == Dropped("tie")


def test_select_pairs_converts_indices_of_numpy_and_rejects_candidates_without_a_score(group):
    order: Any = np.arange(1, -1, -1)  # not Python integers
    numpy_pair = lambda group, scores: ScoredPair(order[0], order[1])  # noqa: E731
    choice = select_pairs(numpy_pair, group("a", "b", "c"), [0.0, 1.0, 2.0])
    assert not isinstance(choice, Dropped)
    assert [type(choice[0].chosen), type(choice[0].rejected)] == [int, int]
    with pytest.raises(ValueError, match="chose candidate 2 of prompt 0, which has no score"):
        select_pairs(lambda group, scores: ScoredPair(2, 0), group("a", "b", "c"), [0.0, 1.0, math.nan])


def test_the_gap_of_a_pair_is_kept_and_must_be_a_finite_number_from_zero(group):
    half: Any = np.float32(0.5)  # which JSON has no text for
    kept = select_pairs(lambda group, scores: ScoredPair(1, 0, half), group("a", "b"), [0.0, 1.0])
    assert not isinstance(kept, Dropped)
    assert (type(kept[0].gap), kept[0].gap) == (float, 0.5)
    for gap in (-0.5, math.nan, math.inf):
        with pytest.raises(ValueError, match="the gap of a pair, if it has one, is a finite number from 0"):
            select_pairs(lambda group, scores, gap=gap: ScoredPair(1, 0, gap), group("a", "b"), [0.0, 1.0])


@pytest.mark.parametrize("choice", [None, (0, 1), [], ScoredPair(0, 0), ScoredPair(0, 2), [ScoredPair(-1, 0)]], ids=str)
def test_a_choice_that_is_no_pair_of_two_candidates_is_rejected(group, choice):
    with pytest.raises(ValueError, match=r"the selector returned .* for prompt 4 with 2 candidates"):
        select_pairs(lambda group, scores: choice, group("a", "b", index=4), [0.0, 1.0])
