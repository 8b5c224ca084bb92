"""The fleet: engines that start, serve, are updated, die and are replaced, each by itself.

Independent of Ray and vLLM.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dpo_ray.rollout.engine import Engine
from dpo_ray.types import Probe, SyncMismatch


@dataclass(frozen=True, slots=True)
class Member:
    """An engine that serves requests."""

    id: str
    """Slot and start count, such as ``0.2``: an engine that replaces another has another id."""
    engine: Engine
    version: int
    """Policy version that it serves: its digest and probe have passed."""
    digest: str = ""
    """Digest of the weights of that version."""


@dataclass(frozen=True, slots=True)
class Membership:
    """The engines that serve requests at a moment."""

    epoch: int
    """Increases with every change."""
    members: tuple[Member, ...] = ()
    needs_weights: bool = False
    """True if no engine serves and none is about to: some are up, and the weights must be published again."""
    error: str | None = None
    """Why the run cannot continue."""
    metrics: Mapping[str, float] | None = None
    """Of the last update: ``sync/probe_difference`` (nats per token, largest), ``perf/push_s`` (slowest engine)."""


def check_probe(probe: Probe, logps: Sequence[float]) -> float:
    """Compare an engine's log-probabilities of the probe tokens with the trainer's.

    This detects weights that arrived intact and are not used (a stale packed copy, a skipped layer).

    Returns:
        Mean absolute difference, nats per token.

    Raises:
        SyncMismatch: the difference is more than ``probe.tolerance``, or a log-probability is not finite.
        ValueError: there are no tokens, or the engine returned a different number of them.
    """
    tokens = len(probe.logps)
    if not tokens:
        raise ValueError("the probe has no tokens to compare; it needs at least two")
    difference = sum(abs(a - b) for a, b in zip(probe.logps, logps, strict=True)) / tokens
    if not (math.isfinite(difference) and difference <= probe.tolerance):
        raise SyncMismatch(
            f"engine and trainer differ by {difference:.4f} nats per token on the probe text ({tokens} tokens; mean "
            f"{sum(probe.logps) / tokens:.4f} in the trainer, {sum(logps) / tokens:.4f} in the engine); "
            f"accepted is {probe.tolerance} (online.probe_tolerance)"
        )
    return difference
