"""The prompts of a round, their seeds, and the validation of a selector's choice."""

import pytest

from dpo_ray.rollout.collect import SEEDS, prompts_of_round, seed_of, select_pairs, validate_round_size
from dpo_ray.rollout.selectors import best_vs_worst
from dpo_ray.types import Dropped, Prompt, ScoredPair


def prompts(n: int) -> list[Prompt]:
    return [Prompt(i, ({"role": "user", "content": str(i)},), (i,)) for i in range(n)]


def indices(n: int, round: int, per_round: int, seed: int = 0) -> list[int]:
    return [prompt.index for prompt in prompts_of_round(prompts(n), seed=seed, round=round, per_round=per_round)]


def test_the_rounds_of_an_epoch_have_every_prompt_once():
    epoch = [indices(12, round, 4) for round in range(3)]
    assert all(len(prompts) == 4 for prompts in epoch)
    assert sorted(index for prompts in epoch for index in prompts) == list(range(12))


def test_the_remainder_of_an_epoch_is_skipped_and_the_next_epoch_has_another_order():
    first = indices(10, 0, 4) + indices(10, 1, 4)  # 2 of 10 left over
    second = indices(10, 2, 4) + indices(10, 3, 4)
    assert len(set(first)) == 8
    assert len(set(second)) == 8
    assert first != second


@pytest.mark.parametrize("round", range(20))
def test_no_round_has_a_prompt_twice(round):
    assert len(set(indices(7, round, 3))) == 3


def test_a_round_depends_only_on_its_arguments():
    assert indices(100, 5, 8, seed=3) == indices(100, 5, 8, seed=3)
    assert indices(100, 5, 8, seed=3) != indices(100, 5, 8, seed=4)


def test_a_round_may_have_all_prompts():
    assert sorted(indices(5, 3, 5)) == [0, 1, 2, 3, 4]


def test_more_prompts_per_round_than_prompts_are_rejected():
    with pytest.raises(ValueError, match=r"online.prompts_per_round is 8, but online.prompts has 5"):
        validate_round_size(prompts(5), 8)


def test_seeds_leave_room_for_a_thousand_candidates_below_two_to_the_31():
    assert SEEDS + 1000 == 2**31
    assert all(0 <= seed_of(0, round, prompt) < SEEDS for round in range(10) for prompt in range(100))


def test_seeds_of_neighbouring_prompts_are_far_apart():
    seeds = {seed_of(run, round, prompt) for run in range(3) for round in range(10) for prompt in range(100)}
    assert len(seeds) == 3000
    assert len({seed // 1000 for seed in seeds}) > 2990  # with i-th candidates at seed + i, hardly any overlap


def test_a_seed_is_the_same_in_every_process():
    assert seed_of(0, 0, 0) == 2044750941
    assert seed_of(1, 2, 3) == 1212592519


def test_select_pairs_gives_one_choice_per_group(group):
    groups = [group("a", "b", index=0), group("a", "a", index=1)]
    assert select_pairs(groups, [[0.0, 1.0], [0.0, 1.0]], best_vs_worst) == [
        ScoredPair(chosen=1, rejected=0),
        Dropped("duplicates"),
    ]


@pytest.mark.parametrize("choice", [None, (0, 1), ScoredPair(0, 0), ScoredPair(0, 2), ScoredPair(-1, 0)], ids=str)
def test_a_choice_that_is_not_a_pair_of_two_candidates_is_rejected(group, choice):
    with pytest.raises(ValueError, match=r"the selector returned .* for prompt 4 with 2 candidates"):
        select_pairs([group("a", "b", index=4)], [[0.0, 1.0]], lambda group, scores: choice)
