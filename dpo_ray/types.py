"""Types shared by packages: prompts, completions, groups, preference pairs, results, errors and numbers.

Only the standard library is imported, so that every process can load them quickly.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard

Message = Mapping[str, Any]
"""One chat turn: ``{"role": "user", "content": "..."}``, optionally with tool calls or reasoning."""

Messages = tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt to generate candidates for."""

    index: int
    """Position in the prompt set, from 0; the same in all rounds and after restarts."""
    messages: Messages
    """The conversation before the turn to generate, or up to where the turn is continued."""
    token_ids: tuple[int, ...]
    """The prompt as passed to an engine, with chat template and generation prompt."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """The other fields of the prompt's record, such as a reference answer, for judges and selectors."""
    text: str | None = None
    """The prompt as the record has it, if that is a string and not a conversation."""
    answer: "Completion | None" = None
    """The record's own completion, for self-play."""


@dataclass(frozen=True, slots=True)
class Completion:
    """One completion of a prompt, sampled by an engine or, for self-play, the record's own."""

    text: str
    token_ids: Sequence[int]
    """Sampled tokens, including the end-of-turn token if the model generated it. Those of engines are arrays of int32,
    since a million of them may wait for a judge: a tuple takes nine times the memory."""
    finished: bool
    """True if the model ended its turn; False if the completion was truncated at the token limit."""
    first_version: int = 0
    """Policy version that sampled the first token."""
    last_version: int = 0
    """Policy version that sampled the last token; a weight update may come in between if ``online.max_lag`` > 0."""
    logp: float | None = None
    """Sum of the engine's log-probabilities of the tokens, nats; None if the request did not ask for it."""
    sampled: bool = True
    """False for the record's own completion."""


@dataclass(frozen=True, slots=True)
class CompletionGroup:
    """The candidates that an engine generated for one prompt."""

    prompt: Prompt
    completions: tuple[Completion, ...]
    seed: int
    """Sampling seed of the first completion; the i-th used ``seed + i``."""

    @property
    def policy_version(self) -> int:
        """Oldest policy version that sampled a token of the group."""
        return min(completion.first_version for completion in self.completions)


@dataclass(frozen=True, slots=True)
class Judgement:
    """A judge's answer for a group."""

    scores: tuple[float, ...]
    """One per completion; higher is better. NaN: the completion has no score."""
    parts: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """Scores by component, one per completion: stored with the group, their means logged as judge/NAME_score."""
    means: Mapping[str, float] = field(default_factory=dict)
    """Metrics whose mean over the groups of a round is logged as judge/NAME."""
    totals: Mapping[str, float] = field(default_factory=dict)
    """Metrics whose sum over the groups of a round is logged as judge/NAME: calls, tokens, cost."""


@dataclass(frozen=True, slots=True)
class ScoredPair:
    """The chosen and the rejected candidate of a group."""

    chosen: int
    """Index into ``group.completions``."""
    rejected: int
    gap: float | None = field(default=None, compare=False)
    """Strength of the preference for ``loss.weighting: gap``, from 0; None is the difference of the scores. Pairs of
    the same candidates are equal."""


@dataclass(frozen=True, slots=True)
class Dropped:
    """A group without a pair."""

    reason: str
    """Counted as rollout/dropped_REASON, for example ``tie``."""


@dataclass(frozen=True, slots=True)
class TokenPair:
    """A preference pair, or an unpaired completion, as token ids, for training.

    Completion tokens that the model did not generate, such as the answers of tools, are stored as ``~id`` (negative):
    they are part of the input and carry no loss.
    """

    prompt: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]
    unpaired: int = 0
    """0 for a pair. 1 if ``chosen`` is a desirable completion without a pair, -1 if ``rejected`` is an undesirable one;
    the other is then a completion of another prompt, for estimates of the KL divergence, or empty."""


@dataclass(frozen=True, slots=True)
class TokenSample:
    """One prompt and one completion as token ids, to estimate the KL divergence."""

    prompt: tuple[int, ...]
    completion: Sequence[int]


Metrics = dict[str, Any]
"""One line of metrics.jsonl."""
PAIR_METRICS = (
    "loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen",
    "logps/rejected",
)  # fmt: skip
"""Metrics of pairs, in training and in evaluations, for every loss."""
PAIR_RESULTS = ("loss", "margin", "chosen_log_ratio", "rejected_log_ratio")
"""Results of single held-out pairs; log-ratios of policy to reference in nats."""


@dataclass(frozen=True, slots=True)
class TrainResult:
    """Result of a training loop."""

    metrics: Metrics
    """The last evaluation, or the last step."""
    stopped_at: str | None = None
    """Position at which it was interrupted, such as ``step 12 of 40``; None if it finished."""


class NonRetryableError(RuntimeError):
    """An error that is not retried, because it would recur; crashes and lost connections are retried."""


class SyncMismatch(NonRetryableError):
    """An engine does not use the weights that the trainer sent."""


class JudgeUnavailable(NonRetryableError):
    """A judge cannot score any group, such as one whose endpoint is down: it ends the run, which can be resumed."""


class EngineLost(RuntimeError):
    """A weight update must begin again: an engine failed or did not answer in time, or the fleet has restarted."""


@dataclass(frozen=True, slots=True)
class Probe:
    """A text whose log-probabilities prove that an engine uses the weights that it received."""

    token_ids: tuple[int, ...]
    logps: tuple[float, ...]
    """The trainer's log-probability of each token after the first, nats."""
    tolerance: float
    """Largest accepted mean absolute difference, nats per token."""


def is_number(value: Any) -> TypeGuard[float]:
    """True for int and float, not for bool."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_finite(value: Any) -> TypeGuard[float]:
    """True for a number in the range of floats; not for NaN."""
    return is_number(value) and abs(value) <= sys.float_info.max


def finite_float(value: Any) -> float | None:
    """``value`` as a float; None unless it is a finite number."""
    return float(value) if is_finite(value) else None


def finite_or_none(value: Any) -> Any:
    """``value`` with None for infinite numbers and NaN, which JSON does not have; also in mappings and lists."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite_or_none(item) for key, item in value.items()}
    return [finite_or_none(item) for item in value] if isinstance(value, list | tuple) else value
