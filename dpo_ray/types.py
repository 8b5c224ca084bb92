"""What crosses package boundaries: prompts, completions, judged groups and preference pairs; the kind of a failure.

Text-level and plain: no torch, no Ray, nothing outside the standard library, so that every package and every process
can hold them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Message = Mapping[str, str]
"""One chat turn: ``{"role": "user", "content": "..."}``."""

Messages = tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt that candidates are written for."""

    index: int
    """Position in the prompt set, from 0; stable over rounds and restarts."""
    messages: Messages
    """The conversation up to the turn to be written."""


@dataclass(frozen=True, slots=True)
class Completion:
    """One completion sampled by an engine."""

    text: str
    token_ids: tuple[int, ...]
    """Tokens as sampled, with the end-of-turn token where the model wrote one."""
    finished: bool
    """True when the model ended its turn; False when the token limit cut it."""


@dataclass(frozen=True, slots=True)
class CompletionGroup:
    """The candidates one engine wrote for one prompt."""

    prompt: Prompt
    prompt_token_ids: tuple[int, ...]
    """The prompt as the engine saw it: chat template applied, generation prompt included."""
    completions: tuple[Completion, ...]
    policy_version: int
    """Version of the weights that wrote every completion of the group."""
    seed: int
    """Sampling seed of the first completion; the i-th used ``seed + i``."""


@dataclass(frozen=True, slots=True)
class ScoredPair:
    """A selected preference: which two candidates of a group become chosen and rejected."""

    chosen: int
    """Index into ``group.completions``."""
    rejected: int


@dataclass(frozen=True, slots=True)
class Dropped:
    """Why a group gave no pair."""

    reason: str
    """A short snake_case word that is counted, e.g. ``tie``."""


@dataclass(frozen=True, slots=True)
class TokenPair:
    """A preference pair as token ids: what the training step consumes."""

    prompt: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Tokens of the prompt-shared row: the prompt counts once."""
        return len(self.prompt) + len(self.chosen) + len(self.rejected)


@dataclass(frozen=True, slots=True)
class TokenSample:
    """One prompt and one completion as token ids, for measuring the policy on its own samples."""

    prompt: tuple[int, ...]
    completion: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class RoundData:
    """What a finished collection hands to training."""

    index: int
    pairs: tuple[TokenPair, ...]
    samples: tuple[TokenSample, ...]
    """One completion a prompt, picked without looking at the scores: an unbiased sample of the policy."""
    policy_version: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Judge scores, counts of what was kept and dropped, and timings of the collection."""


Metrics = dict[str, Any]
"""One line of metrics.jsonl."""


@dataclass(frozen=True, slots=True)
class TrainResult:
    """How a training loop ended."""

    metrics: Metrics
    """The last evaluation, or the last step."""
    stopped_at: str | None = None
    """Where it stopped because it was asked to, such as ``step 12 of 40``; None at the end of the run."""


class NonRetryableError(RuntimeError):
    """A failure that would come again: starting the training workers again does not help."""
