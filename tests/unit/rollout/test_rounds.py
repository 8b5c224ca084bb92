"""The prompts of a round and their seeds."""

from dataclasses import replace

import pytest

from dpo_ray.rollout.rounds import SEEDS, digest_of_prompts, prompts_of_round, seed_of, validate_round_size
from dpo_ray.types import Prompt


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


def test_seeds_of_neighboring_prompts_are_far_apart():
    seeds = {seed_of(run, round, prompt) for run in range(3) for round in range(10) for prompt in range(100)}
    assert len(seeds) == 3000
    assert len({seed // 1000 for seed in seeds}) > 2990  # with i-th candidates at seed + i, hardly any overlap


def test_a_seed_is_the_same_in_every_process():
    assert seed_of(0, 0, 0) == 2044750941
    assert seed_of(1, 2, 3) == 1212592519


def test_the_digest_of_a_prompt_set_changes_with_its_prompts_their_order_and_their_fields():
    three = prompts(3)
    other_answer = [replace(three[0], fields={"answer": "4"}), *three[1:]]
    sets = [three, three[::-1], prompts(4), other_answer, [*three[:2], replace(three[2], token_ids=(7,))]]
    assert len({digest_of_prompts(prompts) for prompts in sets}) == 5
    assert digest_of_prompts(three) == digest_of_prompts(prompts(3))
