"""The engines that serve requests, as the fleet publishes them and as callers wait for changes."""

import asyncio
import contextlib
from collections.abc import Mapping
from dataclasses import dataclass

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
    max_sequences: int = 256
    """``EngineStatus.max_sequences``."""


@dataclass(frozen=True, slots=True)
class Membership:
    """The engines that serve requests at a moment."""

    epoch: int
    """Increases with every change."""
    members: tuple[Member, ...] = ()
    expected: int = 0
    """Number of engines that serve or take part in the update in progress."""
    needs_weights: bool = False
    """True if no engine serves and none is about to: some are up, and the weights must be published again."""
    error: str | None = None
    """Why the run cannot continue."""
    unplaced: bool = False
    """True if the fleet has restarted and its engines share the workers' GPUs, on which only workers that start may
    place them."""
    metrics: Mapping[str, float] | None = None
    """The last update: ``sync/probe_difference`` (nats per token, largest), ``perf/push_s`` (slowest engine)."""


class Notifier:
    """Wakes all waiters; they re-check their condition."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def notify_all(self) -> None:
        """Wake all waiters."""
        self._event.set()
        self._event = asyncio.Event()

    async def wait(self) -> None:
        """Wait for the next ``notify_all``."""
        await self._event.wait()


class Board:
    """The membership in its current state. Lives in one event loop.

    Args:
        epoch: first epoch.
    """

    def __init__(self, epoch: int) -> None:
        self.members: dict[int, Member] = {}
        """By slot."""
        self.expected = 0
        self.needs_weights = False
        self.error: str | None = None
        self.metrics: Mapping[str, float] | None = None
        self._epoch = epoch
        self._published: Membership | None = None
        self._notifier = Notifier()

    def publish(self) -> None:
        """Begin a new epoch, after a change of an attribute."""
        self._epoch += 1
        self._published = None
        self._notifier.notify_all()

    async def read(self, after: int, wait_s: float) -> Membership:
        """The membership; waits for an epoch greater than ``after``, at most ``wait_s`` seconds."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                while self._epoch <= after:
                    await self._notifier.wait()
        if self._published is None:
            members = tuple(self.members[slot] for slot in sorted(self.members))
            self._published = Membership(
                self._epoch, members, self.expected, self.needs_weights, self.error, metrics=self.metrics
            )
        return self._published
