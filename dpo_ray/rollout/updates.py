"""One weight update: the steps that the sender appends, and how an engine takes them at its own pace.

An update lives in one event loop. Independent of Ray and vLLM.
"""

import asyncio
import math
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dpo_ray.rollout.engine import Engine
from dpo_ray.rollout.membership import Notifier
from dpo_ray.types import EngineLost, Probe, SyncMismatch

ATTEMPTS = 3
"""Engines of a slot that may fail over one update, other than by wrong weights, before the update counts as failed."""


class UpdateOver(Exception):
    """A newer update has begun, or this one was abandoned."""


class EngineSilent(TimeoutError):
    """An engine did not answer in time."""


@dataclass(frozen=True, slots=True)
class Step:
    """A step that every engine takes."""

    doing: str
    """For error messages, such as ``loading weights``."""
    call: Callable[[str, Engine], Awaitable[None]]
    """Takes the step with an engine, given by id and handle."""
    extra_s: float = 0.0
    """Seconds that an engine may take beyond the usual limit."""


class Update:
    """An update of the engines to ``version``.

    Args:
        present: ids of the engines that are up at the start; if ``collective``, no others take part.
        timeout_s: longest wait for one answer of an engine.
        drain_s: longest time beyond it in which an engine finishes its running requests before it starts.
    """

    def __init__(
        self, version: int, *, collective: bool, present: Collection[str], timeout_s: float, drain_s: float = 0.0
    ) -> None:
        self.version, self.collective, self.timeout_s = version, collective, timeout_s
        self.present, self.loading = frozenset(present), dict.fromkeys(present)
        """``loading``: ids of the engines that take part and have neither passed nor failed, in order."""
        self.digest = ""
        self.complete = False
        """True if the sender has appended all steps."""
        self.passed: dict[str, float] = {}
        """Difference on the probe by engine, nats per token."""
        self.push_s: float | None = None
        """Seconds until the slowest of the engines that were present at the start served."""
        self.attempts: Counter[int] = Counter()
        """Failed attempts by slot since its last engine that passed; ATTEMPTS if that received wrong weights."""
        self.last_failure = ""
        self.sender_calls = 0
        """Number of calls of the sender, for a watch that it is alive."""
        self.over: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        """Result: the reason for which the update ended."""
        self._failures: list[str] = []
        self._started = time.monotonic()
        self._notifier = Notifier()
        self._steps = [Step("starting a weight update", lambda _, engine: engine.start_update(), extra_s=drain_s)]
        self._pending = set(present) if collective else set()
        """Engines that have not taken the last step; only counted if collective."""

    @property
    def active(self) -> bool:
        """True if an engine is loading the version or may still join."""
        return not self.over.done() and (bool(self.loading) or not self.collective)

    @property
    def awaits_sender(self) -> bool:
        """True if no call of the sender is in progress and another must come."""
        return not (self.complete or self.over.done()) and (self._broken or not self._pending)

    def metrics(self) -> dict[str, float]:
        """See ``Membership.metrics``."""
        metrics = {"sync/probe_difference": max(self.passed.values())}
        return metrics if self.push_s is None else metrics | {"perf/push_s": self.push_s}

    @property
    def _broken(self) -> bool:
        """True if an engine failed in a collective update before its end: the sender must start it again."""
        return self.collective and not self.complete and bool(self._failures)

    # -------------------------------------------------------------------------------------------------- for the sender

    async def begin(self) -> list[str]:
        """Wait until all engines present have started a collective update; returns the ids of those that did."""
        self.sender_calls += 1
        while self._pending and not self.over.done():
            await self._notifier.wait()
        self._failures = []
        return list(self.loading)

    async def init_transfer(self, infos: Mapping[str, Mapping[str, Any]]) -> None:
        """Append the initialization of the transport, given by engine; see ``load``."""
        await self._append(Step("preparing a transfer of weights", lambda id, engine: engine.init_transfer(infos[id])))

    async def load(self, message: Any) -> None:
        """Append a message; if collective, wait until all engines have loaded it.

        Raises:
            EngineLost: the update is over, or an engine failed in a collective update.
        """
        await self._append(Step("loading weights", lambda _, engine: engine.load(message)))

    async def end(self, digest: str, probe: Probe) -> None:
        """Append the last steps; if collective, wait until every engine has taken them or failed.

        Raises:
            EngineLost: the update is over.
        """

        async def finish(_: str, engine: Engine) -> None:
            received = await engine.finish_update(self.version)
            if received != digest:
                raise SyncMismatch(
                    f"it received weights with digest {received}; policy version {self.version} has {digest}"
                )

        async def prove(id: str, engine: Engine) -> None:
            self.passed[id] = check_probe(probe, await engine.token_logps(probe.token_ids))

        self._require_open()
        self.digest, self.complete = digest, True
        self._steps += [
            Step("finishing a weight update", finish),
            Step("computing the probe", prove),
            Step("serving", lambda _, engine: engine.serve()),
        ]
        self.sender_calls += 1
        self._notifier.notify_all()
        while self.collective and self.loading and not self.over.done():
            await self._notifier.wait()

    async def _append(self, step: Step) -> None:
        self._require_open()
        self._steps.append(step)
        self.sender_calls += 1
        if self.collective:
            self._pending = set(self.loading)
        self._notifier.notify_all()
        while self._pending:
            self._require_open()
            await self._notifier.wait()
        self.sender_calls += 1
        self._require_open()

    def _require_open(self) -> None:
        if self.over.done():
            raise EngineLost(self.over.result())
        if self.complete:
            raise EngineLost(f"the update to policy version {self.version} has been ended")
        if self._broken:
            raise EngineLost(self._failures[0])

    # ------------------------------------------------------------------------------------------------- for the engines

    def expects(self, id: str) -> bool:
        """True if the engine takes part, or may join."""
        return not self.over.done() and (id in self.loading or not self.collective)

    async def apply(self, id: str, engine: Engine) -> None:
        """Take an engine through all steps, as they are appended, to the end of the update.

        Raises:
            UpdateOver: there is nothing more to be done. In a collective update it is raised at once, otherwise after
                the answer to the call in progress.
            SyncMismatch: the engine received other weights than those sent, or does not use them.
            EngineSilent: the engine did not answer in time.
            Exception: raised by the engine.
        """
        self.loading[id] = None
        position = 0
        while not (self.complete and position == len(self._steps)):
            step = await self._step(position)
            try:
                await self._answer(step, step.call(id, engine))
            except EngineSilent:
                raise
            except Exception as error:
                if self._broken and not isinstance(error, SyncMismatch):
                    await asyncio.wait({self.over})  # an error that follows from another engine's
                if self.over.done():  # for example, because the sender died: the engine starts again
                    raise UpdateOver from None
                raise
            position += 1
            self._pending.discard(id)
            if self.collective and not self._pending:
                self._notifier.notify_all()
        self.loading.pop(id, None)
        if id in self.present:
            self.push_s = time.monotonic() - self._started
        if self.collective:
            self._notifier.notify_all()

    def record_failure(self, id: str, slot: int, reason: str, error: Exception | None = None) -> None:
        """Remove an engine that failed. ``error``: its failure in this update; None if it failed otherwise."""
        if id not in self.loading:
            return
        del self.loading[id]
        self._pending.discard(id)
        self._failures.append(f"engine {id} failed: {reason}")
        # Wrong weights on every engine are an error of the run; if others have proven them, only this engine failed.
        self.attempts[slot] += ATTEMPTS if isinstance(error, SyncMismatch) and not self.passed else 1
        self.last_failure = self._failures[-1]
        self._notifier.notify_all()

    def stop(self, reason: str) -> None:
        """End the update, for example because a newer one has begun; drops all messages."""
        if not self.over.done():
            self.over.set_result(reason)
            self._steps.clear()
            self._notifier.notify_all()

    async def _step(self, position: int) -> Step:
        while not self.over.done() and position >= len(self._steps):
            await self._notifier.wait()
        if self.over.done():
            raise UpdateOver
        return self._steps[position]

    async def _answer(self, step: Step, call: Awaitable[None]) -> None:
        task = asyncio.ensure_future(call)
        # A call of a collective update may hang because another engine died: only a new start ends it.
        ends: set[asyncio.Future[Any]] = {task, self.over} if self.collective else {task}
        try:
            limit_s = self.timeout_s + step.extra_s
            await asyncio.wait(ends, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            if self.collective and self.over.done():
                raise UpdateOver
            raise EngineSilent(f"{step.doing}: no answer in {limit_s:g} s (online.sync_timeout_s)")
        finally:
            task.cancel()


async def within(limit_s: float, call: Awaitable[Any], otherwise: str) -> Any:
    """The result of a call; raises EngineSilent if it takes longer. ``otherwise``: message, ``{}`` is the limit."""
    timeout = asyncio.timeout(limit_s)
    try:
        async with timeout:
            return await call
    except TimeoutError:
        if not timeout.expired():
            raise
        raise EngineSilent(otherwise.format(f"{limit_s:g} s")) from None


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
