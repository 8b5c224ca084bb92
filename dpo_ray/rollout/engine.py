"""What a rollout engine is: it writes completions, scores tokens, and takes new weights.

The pool in ``launch`` wraps one engine in one actor and speaks to it through this contract alone. Knows nothing of
vLLM, of Ray, or of how weights travel.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from dpo_ray.config.schema import SamplingConfig
from dpo_ray.types import CompletionGroup, Messages, Prompt

Render = Callable[[Messages], list[int]]
"""Chat template and tokenizer in one: a conversation to token ids, with the generation prompt at the end."""

UNPUSHED = -1
"""Policy version of the weights an engine loaded from disk, before the first push."""


class Engine(Protocol):
    """One rollout engine. Calls come one at a time.

    Example:
        engine.start_update()
        for bucket in buckets:
            engine.load(bucket)
        digest = engine.finish_update(version=3)
        groups = engine.generate(prompts, sampling=sampling, candidates=4, seeds=seeds)   # policy_version 3
    """

    @property
    def version(self) -> int:
        """Policy version of the weights in use; ``UNPUSHED`` before the first push."""
        ...

    def generate(
        self, prompts: Sequence[Prompt], *, sampling: SamplingConfig, candidates: int, seeds: Sequence[int]
    ) -> list[CompletionGroup]:
        """Completions of each prompt, one group a prompt, in the order given.

        The same call on the same weights gives the same completions, as far as the engine's arithmetic does not depend
        on what else is in the batch.

        Args:
            prompts: at least one message each; the chat template is applied here, once.
            sampling: temperature, nucleus, token limit and stop strings. With a stop string the text ends before it,
                while ``token_ids`` end with the token that completed it, and no end-of-turn token follows.
            candidates: completions a prompt.
            seeds: one a prompt; the i-th completion of a prompt uses its seed + i.

        Raises:
            ValueError: a prompt leaves no room for ``sampling.max_tokens``; names its index.
            RuntimeError: a weight update was started and not finished, or the engine sleeps.
        """
        ...

    def token_logps(self, token_ids: Sequence[int]) -> list[float]:
        """Log-probability in nats of each token after the first, given those before it, under the current weights.

        Temperature and nucleus play no part: these are the model's own probabilities.
        """
        ...

    def sleep(self) -> None:
        """Give the GPU up to whoever shares it: weights go to host memory, keys and values are forgotten."""
        ...

    def wake(self) -> None:
        """Take the GPU again, with the weights that the engine fell asleep with. An engine that is awake stays so."""
        ...

    def init_transfer(self, info: dict[str, Any]) -> None:
        """Hand the transport's receiving ends, unread, what they need to know before the first message."""
        ...

    def start_update(self) -> None:
        """Open a weight update. Until it is finished the engine refuses to generate.

        An engine that sleeps wakes for it: its weights when the update is opened, its cache when it is finished.

        Raises:
            RuntimeError: an update is open already. Its layers are half loaded, so the engine has to be replaced.
        """
        ...

    def load(self, bucket: Any) -> None:
        """Take one message of the weight transport, and hand it unread to the transport's receiving end."""
        ...

    def finish_update(self, version: int) -> str:
        """Put the received weights to use and forget every key and value computed with the old ones.

        Returns:
            Digest of the bytes received since ``start_update``, as the transport computes it.

        Raises:
            RuntimeError: old keys and values could not be dropped, or tensor-parallel workers received different bytes.
        """
        ...

    def close(self) -> None:
        """Give back memory and processes; the engine is of no use afterwards."""
        ...
