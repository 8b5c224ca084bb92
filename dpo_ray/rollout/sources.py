"""Steps of a group that need no judge.

Self-play: the answer of the prompt's record is chosen, the policy's completions are rejected (arXiv:2401.01335).
"""

from collections.abc import Sequence
from dataclasses import replace

from dpo_ray.types import CompletionGroup, Dropped, Judgement, ScoredPair


def with_answer(group: CompletionGroup) -> CompletionGroup:
    """The group with the record's answer as its last completion.

    Raises:
        ValueError: the prompt has no answer.
    """
    if group.prompt.answer is None:
        raise ValueError(f"prompt {group.prompt.index} has no answer")
    versions = {"first_version": group.policy_version, "last_version": group.policy_version}
    return replace(group, completions=(*group.completions, replace(group.prompt.answer, **versions)))


def choose_answer(group: CompletionGroup, scores: Sequence[float]) -> tuple[ScoredPair, ...] | Dropped:
    """The record's answer, which is the last completion, against each different completion of the policy."""
    answer, seen, pairs = len(group.completions) - 1, {group.completions[-1].text}, list[ScoredPair]()
    for index, completion in enumerate(group.completions[:-1]):
        if completion.token_ids and completion.text not in seen:
            seen.add(completion.text)
            pairs.append(ScoredPair(answer, index))
    if pairs:
        return tuple(pairs)
    return Dropped("duplicates" if any(c.token_ids for c in group.completions[:-1]) else "empty")


async def unjudged(group: CompletionGroup) -> Judgement:
    """No scores: there is no judge, or the training workers judge the round when it is complete."""
    return Judgement(())
