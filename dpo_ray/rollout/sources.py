"""Steps of a group that need no judge.

Self-play: the answer of the prompt's record is chosen, the policy's completions are rejected (arXiv:2401.01335).
"""

from dataclasses import replace

from dpo_ray.types import CompletionGroup, Judgement


def with_answer(group: CompletionGroup) -> CompletionGroup:
    """The group with the record's answer as its last completion.

    Raises:
        ValueError: the prompt has no answer.
    """
    if group.prompt.answer is None:
        raise ValueError(f"prompt {group.prompt.index} has no answer")
    versions = {"first_version": group.policy_version, "last_version": group.policy_version}
    return replace(group, completions=(*group.completions, replace(group.prompt.answer, **versions)))


async def prefer_answer(group: CompletionGroup) -> Judgement:
    """Score 1 for the last completion and 0 for the others."""
    return Judgement((*(0.0 for _ in group.completions[1:]), 1.0))


async def unjudged(group: CompletionGroup) -> Judgement:
    """No scores: the training workers judge the round when it is complete."""
    return Judgement(())
