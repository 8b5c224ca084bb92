"""When a round may be collected, its prompts and its sampling seeds: pure functions, so a restart repeats the round."""

import hashlib
import json
from collections.abc import Sequence

import numpy as np

from dpo_ray.types import Prompt

SEEDS = 2**31 - 1000
"""Sampling seeds are in [0, SEEDS): the i-th of up to 1000 candidates, with ``seed + i``, still fits 31 bits."""


def admitted(version: int, *, max_lag: int, rounds: int) -> range:
    """The rounds that may be collected while the trainer has finished ``version`` rounds and ``version`` is published.

    Round r, on which version r trains, needs a policy at most ``max_lag`` rounds old: ``version + max_lag >= r``.
    """
    return range(version, min(version + max_lag + 1, rounds))


def oldest_version(round: int, *, max_lag: int) -> int:
    """Oldest policy version that may sample a token of a round."""
    return max(0, round - max_lag)


def validate_round_size(prompts: Sequence[Prompt], per_round: int) -> None:
    """Raise a ValueError if there are fewer prompts than ``per_round``."""
    if per_round > len(prompts):
        raise ValueError(
            f"online.prompts_per_round is {per_round}, but online.prompts has {len(prompts)} usable prompts; "
            f"set it to {len(prompts)} or less, or add prompts"
        )


def prompts_of_round(prompts: Sequence[Prompt], *, seed: int, round: int, per_round: int) -> list[Prompt]:
    """The prompts of a round.

    An epoch is one pass over a permutation that depends on (seed, epoch); each round takes the next ``per_round``
    prompts, at most ``len(prompts)``. The remainder of an epoch, too small for a round, is skipped, so no round has a
    prompt twice.
    """
    epoch, position = divmod(round, len(prompts) // per_round)
    order = np.random.default_rng([seed, epoch]).permutation(len(prompts))
    return [prompts[i] for i in order[position * per_round : (position + 1) * per_round].tolist()]


def seed_of(run_seed: int, round: int, prompt_index: int) -> int:
    """Sampling seed of a prompt's first candidate, hashed so that neighboring prompts do not share seeds."""
    return stable_hash(run_seed, round, prompt_index) % SEEDS


def stable_hash(*key: int) -> int:
    """A pseudorandom 64-bit hash of ``key``, the same in every process."""
    digest = hashlib.blake2b("/".join(str(int(part)) for part in key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def digest_of_prompts(prompts: Sequence[Prompt]) -> str:
    """Digest of the token ids and fields of a prompt set: the prompts of every round are a function of it."""
    digest = hashlib.blake2b(digest_size=16)
    for prompt in prompts:
        digest.update(np.array([len(prompt.token_ids), *prompt.token_ids], np.int64).tobytes())
        if prompt.answer is not None:
            digest.update(np.array(prompt.answer.token_ids, np.int64).tobytes())
        digest.update(json.dumps(prompt.fields, sort_keys=True, default=str).encode())
    return digest.hexdigest()
