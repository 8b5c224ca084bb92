"""Which pairs a round trains on: new, fixed and replayed ones."""

from collections import Counter

import numpy as np
import pytest

from dpo_ray.config.rounds import OnlineConfig
from dpo_ray.data.joined import JoinedPairs
from dpo_ray.data.loader import checked_gaps
from dpo_ray.rollout.ledger import RoundData
from dpo_ray.train.round_pairs import Sources
from dpo_ray.types import TokenPair
from tests.pair_list import PairList


def pairs(first: int, count: int, name: str) -> PairList:
    """Pairs whose prompt is a number."""
    return PairList([TokenPair((number,), (1, 2), (3,)) for number in range(first, first + count)], name)


def rounds(index: int) -> RoundData:
    """Eight pairs a round, from 100, 200, ... on; the reference values are their numbers."""
    numbers = np.arange(100 * (index + 1), 100 * (index + 1) + 8, dtype=float)
    return RoundData(
        index, pairs(int(numbers[0]), 8, f"round {index}"), index, {}, True, np.column_stack((numbers, -numbers))
    )


def numbers(data: RoundData) -> list[int]:
    """The prompts of a round's pairs."""
    return [data.pairs[i].prompt[0] for i in range(len(data.pairs))]


def sources(fixed: int = 0, **source: float) -> Sources:
    """Sources of rounds of eight prompts."""
    online = OnlineConfig.model_validate({"prompts": "p.jsonl", "prompts_per_round": 8, "source": source})
    return Sources(online, pairs(0, fixed, "fixed") if fixed else None, rounds, seed=3)


def test_a_round_without_other_sources_is_left_as_it_is() -> None:
    data = rounds(2)
    assert sources().add_to(data) is data


def test_a_mixture_has_its_share_of_fixed_pairs_which_are_passed_through_once_before_any_comes_again() -> None:
    """Half of each round, 8 of 20: the first 5 rounds are 2 passes."""
    drawn = [numbers(sources(20, mix=0.5).add_to(rounds(round))) for round in range(5)]
    assert all(found[:8] == numbers(rounds(round)) for round, found in enumerate(drawn))
    added = [number for found in drawn for number in found[8:]]
    assert len(added) == 40
    assert sorted(added[:20]) == sorted(added[20:]) == list(range(20))
    assert added[:20] != added[20:]


def test_replayed_pairs_are_different_ones_of_the_last_rounds_with_the_reference_values_stored_for_them() -> None:
    """A third of a round of 12; nothing before the first, and at most two rounds back."""
    by = sources(replay=1 / 3, replay_rounds=2)
    assert numbers(by.add_to(rounds(0))) == numbers(rounds(0))
    counts: Counter[int] = Counter()
    for round in range(1, 30):
        data = by.add_to(rounds(round))
        added = numbers(data)[8:]
        assert len(set(added)) == 4
        assert {number // 100 - 1 for number in added} <= {round - 1, round - 2}
        assert data.reference is not None
        assert data.reference[:, 0].tolist() == numbers(data)
        counts.update(round - (number // 100 - 1) for number in added)
    assert counts[1] == pytest.approx(counts[2], rel=0.5), "evenly from both"


def test_mixed_pairs_have_no_reference_values_yet_and_the_counts_of_a_round_say_what_was_added() -> None:
    data = sources(5, mix=0.25, replay=0.25).add_to(rounds(1))
    assert data.reference is not None
    assert np.isnan(data.reference).any(1).tolist() == [False] * 8 + [True] * 4 + [False] * 4
    assert (data.metrics["rollout/new_pairs"], data.metrics["rollout/added_pairs"]) == (8, 8)
    assert data.pairs.name_of(8).startswith("fixed")


def test_joined_pairs_read_as_those_of_their_sources_and_prompts_of_different_sources_stay_apart() -> None:
    shared = PairList([TokenPair((7,), (1,), (2,)), TokenPair((7,), (1,), (3,))], "shared")
    single = pairs(7, 3, "single")
    joined = JoinedPairs([(shared, np.array([1, 0])), (single, np.array([2, 0]))])
    assert [joined[i] for i in range(4)] == [shared[1], shared[0], single[2], single[0]]
    assert joined.tokens(2).tolist() == [9, 1, 2, 3]
    assert joined.lengths.tolist() == [[1, 1, 1], [1, 1, 1], [1, 2, 1], [1, 2, 1]]
    assert joined.members is not None
    prompts = joined.members[:, 0].tolist()
    assert prompts[0] == prompts[1]
    assert len(set(prompts)) == 3


def test_joined_pairs_have_the_gaps_of_their_sources_and_none_where_a_source_has_none() -> None:
    scored = PairList(pairs(0, 3, "scored").pairs, "scored", gaps=[0.5, 1.0, 2.0])
    again = PairList(pairs(5, 2, "again").pairs, "again", gaps=[3.0, 4.0])
    joined = JoinedPairs([(scored, np.array([2, 0])), (again, np.array([1]))])
    assert checked_gaps(joined).tolist() == [2.0, 0.5, 4.0]
    with pytest.raises(ValueError, match=r"and fixed\[4\] has none"):
        checked_gaps(JoinedPairs([(scored, np.array([1])), (pairs(0, 5, "fixed"), np.array([4]))]))
    assert JoinedPairs([(pairs(0, 2, "fixed"), np.array([0]))]).gaps is None
