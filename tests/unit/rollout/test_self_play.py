"""Self-play: the record's answer against completions of the policy."""

from dataclasses import replace

from dpo_ray.rollout.selectors import Pairs
from dpo_ray.rollout.sources import choose_answer
from dpo_ray.types import Completion, Dropped, ScoredPair


def test_completions_that_are_empty_repeated_or_the_answer_make_no_pair_and_are_counted(group):
    bare = Completion("", (), finished=True)
    several = group("right", "wrong", "wrong", "", "worse", "right")  # the last one is the answer
    choice = choose_answer(replace(several, completions=(bare, *several.completions)), [])
    assert choice == [ScoredPair(6, 2), ScoredPair(6, 4), ScoredPair(6, 5)]
    assert isinstance(choice, Pairs)
    assert choice.left_out == {"empty": 1, "duplicates": 2}
    assert choose_answer(group("right", "right"), []) == Dropped("duplicates")
    assert choose_answer(replace(several, completions=(bare, several.completions[-1])), []) == Dropped("empty")
