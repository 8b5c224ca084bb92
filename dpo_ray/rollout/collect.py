"""The decisions of a collection that are pure functions: which prompts a round holds, their seeds, the pairs it gives.

Nothing here has a state or a cursor. A restarted run that asks for the same round gets the same answer.
"""

import hashlib
from collections.abc import Sequence

import numpy as np

from dpo_ray.rollout.selectors import Selector
from dpo_ray.types import CompletionGroup, Dropped, Prompt, ScoredPair

SEEDS = 2**31 - 1000
"""Sampling seeds lie in [0, SEEDS): the i-th of up to 1000 candidates, at ``seed + i``, still fits 31 bits."""


def prompts_of_round(prompts: Sequence[Prompt], *, seed: int, round: int, per_round: int) -> list[Prompt]:
    """The prompts that round ``round`` writes candidates for.

    An epoch is one pass over a permutation fixed by (seed, epoch); each round takes the next ``per_round`` of it. What
    is left when the epoch no longer fills a round sits that epoch out, so a round never holds a prompt twice.

    Raises:
        ValueError: there are fewer prompts than a round holds.
    """
    if per_round > len(prompts):
        raise ValueError(
            f"online.prompts_per_round is {per_round}, but online.prompts holds {len(prompts)} prompts; "
            f"set it to {len(prompts)} or less, or give more prompts"
        )
    epoch, place = divmod(round, len(prompts) // per_round)
    order = np.random.default_rng([seed, epoch]).permutation(len(prompts))
    return [prompts[i] for i in order[place * per_round : (place + 1) * per_round].tolist()]


def seed_of(run_seed: int, round: int, prompt_index: int) -> int:
    """The sampling seed of the first candidate of a prompt in a round, in [0, SEEDS).

    Hashed, so that neighbouring prompts do not share seeds when the i-th candidate uses ``seed + i``.
    """
    return stable_hash(run_seed, round, prompt_index) % SEEDS


def stable_hash(*key: int) -> int:
    """A 64-bit number that depends on every part of ``key`` and looks random; the same in every process."""
    digest = hashlib.blake2b("/".join(str(int(part)) for part in key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def select_pairs(
    groups: Sequence[CompletionGroup], scores: Sequence[Sequence[float]], selector: Selector
) -> list[ScoredPair | Dropped]:
    """The selector's choice for each group, in order.

    Raises:
        ValueError: the selector returned something else than a pair of two candidates of the group, or ``Dropped``.
    """
    return [_checked(selector(group, group_scores), group) for group, group_scores in zip(groups, scores, strict=True)]


def _checked(choice: ScoredPair | Dropped, group: CompletionGroup) -> ScoredPair | Dropped:
    if isinstance(choice, Dropped):
        return choice
    candidates = range(len(group.completions))
    if (
        isinstance(choice, ScoredPair)
        and choice.chosen in candidates
        and choice.rejected in candidates
        and choice.chosen != choice.rejected
    ):
        return choice
    raise ValueError(
        f"the selector returned {choice!r} for prompt {group.prompt.index} with {len(candidates)} candidates; it must "
        "return ScoredPair(chosen, rejected) with two different indices of candidates, or Dropped(reason)"
    )
