"""The fleet: engines that start, serve, are updated, die and are replaced, each by itself. Independent of Ray and vLLM."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from dpo_ray.rollout.engine import Engine


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


@dataclass(frozen=True, slots=True)
class Probe:
    """A text whose log-probabilities prove that an engine uses the weights that it received."""

    token_ids: tuple[int, ...]
    logps: tuple[float, ...]
    """The trainer's log-probability of each token after the first, nats."""
    tolerance: float
    """Largest accepted mean absolute difference, nats per token."""


class EngineGroup(Protocol):
    """The engines as the sender of weights sees them. An update: ``begin_update``, ``load`` for each message,
    ``end_update``; a new ``begin_update`` supersedes an unfinished update.

    With ``collective`` (NCCL, CUDA IPC) sender and engines transfer together: the engines that take part are fixed by
    ``begin_update``, and each call waits for all of them. Otherwise no call waits: each engine, also one that starts
    later, loads the messages at its own pace.
    """

    def begin_update(self, version: int, *, collective: bool) -> Sequence[str]:
        """Start an update; returns the ids of the engines that take part (collective), never waiting for one that is
        not up."""
        ...

    def init_transfer(self, infos: Sequence[Mapping[str, Any]]) -> None:
        """Pass each participating engine its initialization info, in the order of ``begin_update``."""
        ...

    def load(self, message: Any) -> None:
        """Send a message to every engine. Collective: raises EngineLost if an engine failed or did not answer in time;
        the engine is replaced and the sender starts the update again with the others."""
        ...

    def end_update(self, digest: str, probe: Probe) -> None:
        """Finish the update. An engine serves the version once its digest and its probe pass; one that fails is
        replaced. If every engine fails, ``Membership.error`` has both values."""
        ...
