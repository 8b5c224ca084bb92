"""Steps of a group that need no judge.

Self-play: the answer of the prompt's record is chosen, the policy's completions are rejected (arXiv:2401.01335).
"""

from collections.abc import Sequence
from dataclasses import replace

from dpo_ray.rollout.selectors.preferences import Choice, Pairs
from dpo_ray.types import CompletionGroup, Judgement, ScoredPair


def with_answer(group: CompletionGroup) -> CompletionGroup:
    """The group with the record's answer as its last completion.

    Raises:
        ValueError: the prompt has no answer.
    """
    if group.prompt.answer is None:
        raise ValueError(f"prompt {group.prompt.index} has no answer")
    versions = {"first_version": group.policy_version, "last_version": group.policy_version}
    return replace(group, completions=(*group.completions, replace(group.prompt.answer, **versions)))


def choose_answer(group: CompletionGroup, scores: Sequence[float]) -> Choice:
    """The record's answer, which is the last completion, against each different completion of the policy."""
    *sampled, answer = group.completions
    pairs = Pairs(ScoredPair(len(sampled), index) for index in range(len(sampled)))
    pairs = pairs.filter(lambda pair: bool(sampled[pair.rejected].token_ids), "empty")
    first_of_text = {sampled[pair.rejected].text: pair for pair in reversed(pairs)} | {answer.text: None}
    return pairs.filter(lambda pair: first_of_text[sampled[pair.rejected].text] == pair, "duplicates").choice()


async def unjudged(group: CompletionGroup) -> Judgement:
    """No scores: there is no judge, or the training workers judge the round when it is complete."""
    return Judgement(())
