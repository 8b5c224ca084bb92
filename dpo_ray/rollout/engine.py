"""The engine protocol: requests in, groups of completions out, weight updates between two steps.

Independent of vLLM and Ray: ``VLLMEngine`` is the real one, tests use fakes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from dpo_ray.config.rounds import SamplingConfig
from dpo_ray.types import CompletionGroup, Prompt

UNPUSHED = -1
"""Policy version of the weights that an engine loaded from disk, before the first update."""


class MessageLost(RuntimeError):
    """A message of a weight update cannot be fetched, because its owner died; the engine is unharmed."""


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt to complete."""

    prompt: Prompt
    sampling: SamplingConfig
    candidates: int
    """Number of completions."""
    seed: int
    """Sampling seed of the first completion; the i-th uses ``seed + i``."""
    deadline_s: float
    """Seconds from the arrival at the engine after which the request is aborted."""
    round: int = 0
    """Its round: the requests of earlier rounds go first."""
    evaluation: bool = False
    """True for a request that goes before others, is sampled by one policy version from its first to its last token,
    and returns log-probabilities."""


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """A snapshot of an engine."""

    version: int
    """Policy version of the weights in use; ``UNPUSHED`` before the first update."""
    running: int
    """Sequences that are generated."""
    waiting: int
    """Sequences that wait for their turn."""
    generated_tokens: int
    """Tokens generated since the start."""
    busy_s: float
    """Seconds spent in steps since the start."""
    step_s: float
    """Seconds since the step in progress began; 0 between steps."""
    cache_hit_rate: float
    """Fraction of prompt tokens found in the prefix cache since the start."""
    max_sequences: int
    """Sequences that it generates at a time."""


class RequestTimedOut(TimeoutError):
    """A request was not complete at its deadline."""


class RequestAborted(RuntimeError):
    """A request was aborted with all others of its engine."""


class Engine(Protocol):
    """One engine. Requests interleave; each call may be made while others are in progress.

    An exception that a request raises (``ValueError``, ``RequestTimedOut``) concerns this request only. Any other
    exception, or no answer, means that the engine must be replaced.
    """

    async def generate(self, request: Request) -> CompletionGroup:
        """Complete a prompt.

        Raises:
            ValueError: the prompt leaves no room for ``sampling.max_tokens``.
            RequestTimedOut: the deadline passed.
        """
        ...

    async def status(self) -> EngineStatus:
        """The engine's status; answers at once, also during a long step.

        Raises:
            Exception: the engine cannot be used any more.
        """
        ...

    async def abort(self) -> None:
        """Abort all requests, with a RequestAborted: the run that they belong to has ended."""
        ...

    async def start_update(self) -> None:
        """Start a weight update between two steps; an unfinished one is abandoned.

        Waits until the running evaluation requests are done and, with ``online.max_lag: 0``, all running requests.
        Requests that arrive meanwhile wait until the update is finished.
        """
        ...

    async def init_transfer(self, info: Mapping[str, Any]) -> None:
        """Pass the transport's initialization info to the receiver in every worker of the engine."""
        ...

    async def load(self, message: Any) -> None:
        """Pass one message of the transport to the receiver in every worker of the engine.

        Raises:
            MessageLost: the message cannot be fetched.
        """
        ...

    async def finish_update(self, version: int) -> str:
        """Switch to the received weights and drop all keys and values computed with the old ones.

        Until ``serve``, only ``token_logps`` is answered.

        Returns:
            Digest of the received weights.
        """
        ...

    async def token_logps(self, token_ids: Sequence[int]) -> list[float]:
        """The model's log-probability of each token after the first, nats."""
        ...

    async def serve(self) -> None:
        """Complete prompts with the weights of ``finish_update``."""
        ...

    async def sleep(self) -> None:
        """Free the GPU for the process that shares it, once the running requests are done."""
        ...
