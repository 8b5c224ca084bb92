"""The fleet: engines that start, serve, are updated, die and are replaced, each by itself.

Independent of Ray and vLLM. A fleet lives in one event loop.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dpo_ray.rollout.engine import Engine, EngineStatus, MessageLost
from dpo_ray.rollout.membership import Board, Member, Membership, Notifier
from dpo_ray.rollout.updates import ATTEMPTS, EngineSilent, Update, UpdateOver, within
from dpo_ray.storage import error_summary
from dpo_ray.types import EngineLost, Probe

logger = logging.getLogger(__name__)

PING_INTERVAL_S = 5.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0
"""Pause before a slot gets another engine: doubled with each one that did not come to serve."""
RETIRE_TIMEOUT_S = 60.0
STATUS_S = 2.0
"""Longest wait for a status that metrics ask for."""
SUSPICIONS, SUSPICION_WINDOW_S = 3, 600.0
"""An engine that answers is replaced nevertheless if callers suspect it so often within the window."""


class ConstructorError(RuntimeError):
    """An engine's constructor raised; it would probably do so again."""


@dataclass(slots=True, eq=False)
class _Slot:
    """A place for an engine."""

    index: int
    starts: int = 0
    pauses: int = 0
    """Engines that were replaced since one last served."""
    failed_starts: int = 0
    """Since the last engine that was up."""


@dataclass(slots=True, eq=False)
class _Life:
    """An engine from the moment that it is up until it is replaced."""

    id: str
    slot: _Slot
    engine: Engine
    lost: asyncio.Future[str]
    """Result: why it must be replaced."""
    loading: bool = False
    status: EngineStatus | None = None
    check: asyncio.Task[None] | None = None
    """The check that a suspicion started."""
    cleared: list[float] = field(default_factory=list)
    """Times of the suspicions that were followed by an answer."""


class Fleet:
    """The engines of a run.

    Args:
        launch: starts the engine of a slot and waits until it is up. Raises ConstructorError if its constructor raised,
            and others if it got no resources or died.
        retire: kills the engine of a slot, if there is one, and frees its resources; also after a failed launch.
        slots: number of engines.
        start_timeout_s: longest wait for one engine, and longest time without any.
        sync_timeout_s: longest wait for one answer in a weight update, and for the sender's next call.
        drain_timeout_s: longest time in which an engine finishes its running requests before an update.
        ping_timeout_s: longest wait for a status, and longest step; then an engine counts as hung.
        logs: where the logs of the engines are, for error messages.
        epoch: first epoch; greater than all of an earlier fleet.
        ping_interval_s: pause between two status calls of an engine.
    """

    def __init__(
        self,
        launch: Callable[[int], Awaitable[Engine]],
        retire: Callable[[int, Engine | None], Awaitable[None]],
        slots: int,
        *,
        start_timeout_s: float,
        sync_timeout_s: float,
        ping_timeout_s: float,
        drain_timeout_s: float = 0.0,
        logs: str = "the logs of the engines",
        epoch: int = 0,
        ping_interval_s: float = PING_INTERVAL_S,
    ) -> None:
        self._launch, self._retire = launch, retire
        self._slots = [_Slot(index) for index in range(slots)]
        self.start_timeout_s, self.sync_timeout_s, self.ping_timeout_s = start_timeout_s, sync_timeout_s, ping_timeout_s
        self.logs, self.ping_interval_s, self.drain_timeout_s = logs, ping_interval_s, drain_timeout_s
        self._lives: dict[str, _Life] = {}
        self._board = Board(epoch)
        self._update_begun, self._start_tried = Notifier(), Notifier()
        self._update: Update | None = None
        self._watch: asyncio.Task[None] | None = None
        self._last_failure = ""
        self._constructor_errors: set[int] = set()
        """Slots whose first engine did not get beyond its constructor."""
        self._ever_up = self._asleep = self._awaiting_start = False
        self._none_since = time.monotonic()

    async def run(self) -> None:
        """Start all engines and replace those that fail, until cancelled; then retire them. May be called again."""
        self._none_since = time.monotonic()
        for slot in self._slots:
            slot.pauses = slot.failed_starts = 0
        async with asyncio.TaskGroup() as group:
            for slot in self._slots:
                group.create_task(self._supervise(slot))
            group.create_task(self._watch_absence())

    async def started(self, wait_s: float) -> None:
        """Wait until each slot's engine is up or has failed to start, at most ``wait_s`` seconds."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                while len(self._lives) + sum(slot.failed_starts > 0 for slot in self._slots) < len(self._slots):
                    await self._start_tried.wait()

    # -------------------------------------------------------------------------------------------------- for the callers

    async def membership(self, after: int, wait_s: float) -> Membership:
        """The membership; waits for an epoch greater than ``after``, at most ``wait_s`` seconds."""
        return await self._board.read(after, wait_s)

    async def suspect(self, member_id: str, reason: str) -> None:
        """Check an engine that failed over a request, and replace it if it does not answer or is suspected often."""
        if (life := self._lives.get(member_id)) is None:
            return
        if life.check is None or life.check.done():
            life.check = asyncio.create_task(self._check_suspect(life, reason))
        await asyncio.wait({life.check})

    async def statuses(self) -> dict[str, EngineStatus]:
        """The status of each engine that is up; that of the last ping if it does not answer soon."""

        async def ask(life: _Life) -> None:
            with contextlib.suppress(Exception):  # pings decide what an engine that does not answer is worth
                life.status = await within(STATUS_S, life.engine.status(), "no status in {}")

        await asyncio.gather(*(ask(life) for life in list(self._lives.values())))
        return {life.id: life.status for life in self._lives.values() if life.status is not None}

    async def reset(self) -> None:
        """Begin another run: engines abort the requests of the last one, and serve after the next update.

        Raises:
            RuntimeError: the fleet has failed.
        """
        if self._board.error is not None:
            raise RuntimeError(self._board.error)
        if self._watch is not None:
            self._watch.cancel()
        if self._update is not None:
            self._update.stop("another run begins")
            self._update = None
        self._board.members.clear()
        self._board.metrics = None
        self._changed()
        engines, slow = list(self._lives.values()), "aborting requests: no answer in {} (online.engine_timeout_s)"
        await self._call(engines, lambda engine: engine.abort(), self.ping_timeout_s, slow)

    async def replace_unfinished(self) -> None:
        """Replace the engines that hold a part of a policy, because the sender of the other part has died."""
        for life in [life for life in self._lives.values() if life.loading]:
            self._lose(life, "its weight update was not finished")
        await self.started(self.start_timeout_s)

    async def sleep(self) -> None:
        """Put all engines to sleep, also those that come up later, until the next update."""
        self._asleep = True
        awake = [life for life in self._lives.values() if not life.loading]
        slow = "falling asleep: no answer in {} (sync_timeout_s)"
        await self._call(awake, lambda engine: engine.sleep(), self.sync_timeout_s, slow)

    async def _call(
        self, lives: Sequence[_Life], call: Callable[[Engine], Awaitable[None]], limit_s: float, slow: str
    ) -> None:
        """Call engines; those that fail are replaced, with the reason ``slow`` if they take longer."""

        async def answer(life: _Life) -> None:
            try:
                await within(limit_s, call(life.engine), slow)
            except Exception as error:
                self._lose(life, error_summary(error), error)

        await asyncio.gather(*map(answer, lives))

    # --------------------------------------------------------------------------------- for the sender: see EngineGroup

    async def begin_update(self, version: int, *, collective: bool) -> list[str]:
        """Start an update; returns the ids of the engines that take part.

        The first collective one waits until each slot's engine is up or has failed to start, since others would be left
        out of it.
        """
        if collective and self._update is None:
            self._awaiting_start = True
            await self.started(self.start_timeout_s)
            self._awaiting_start = False
        if self._watch is not None:
            self._watch.cancel()
        if self._update is not None:
            self._update.stop(f"the update to policy version {version} has begun")
        self._asleep = False
        update = self._update = Update(
            version,
            collective=collective,
            present=self._lives,
            timeout_s=self.sync_timeout_s,
            drain_s=self.drain_timeout_s,
        )
        self._watch = asyncio.create_task(self._watch_sender(update))
        self._update_begun.notify_all()
        self._changed(visible=False)
        return await update.begin()

    async def init_transfer(self, infos: Sequence[Mapping[str, Any]]) -> None:
        """Pass each participating engine its initialization info, in the order of ``begin_update``."""
        update = self._open_update()
        await update.init_transfer(dict(zip(update.loading, infos, strict=True)))

    async def load(self, message: Any) -> None:
        """Send a message to every engine."""
        await self._open_update().load(message)

    async def end_update(self, digest: str, probe: Probe) -> None:
        """Finish the update."""
        await self._open_update().end(digest, probe)

    def _open_update(self) -> Update:
        if self._update is None:
            raise EngineLost("no weight update has begun: the fleet has restarted")
        return self._update

    async def _watch_sender(self, update: Update) -> None:
        """Abandon an update whose sender stays away: its engines would wait for ever."""
        while not (update.complete or update.over.done()):
            calls = update.sender_calls
            await asyncio.sleep(self.sync_timeout_s)
            if update.awaits_sender and update.sender_calls == calls:
                return self._abandon(
                    update, f"the sender sent nothing for {self.sync_timeout_s:g} s (online.sync_timeout_s)"
                )

    def _abandon(self, update: Update, reason: str) -> None:
        """Give an update up. Engines that hold parts of it serve nothing."""
        if update.over.done():
            return
        logger.warning("the update to policy version %d is abandoned: %s", update.version, reason)
        for life in [self._lives[id] for id in update.loading if id in self._lives]:
            self._board.members.pop(life.slot.index, None)
        update.stop(reason)
        self._changed()

    # ------------------------------------------------------------------------------------------------- supervision

    async def _supervise(self, slot: _Slot) -> None:
        """Keep an engine in a slot."""
        while True:
            life = None
            try:
                life = await self._start(slot)
                if life is not None:
                    await self._live(life)
            finally:
                await self._retire_slot(slot, life)
            pause = min(FIRST_PAUSE_S * 2**slot.pauses, LONGEST_PAUSE_S)
            slot.pauses += 1
            await asyncio.sleep(pause)

    async def _start(self, slot: _Slot) -> _Life | None:
        """Start the engine of a slot; None if that fails."""
        slot.starts += 1
        id = f"{slot.index}.{slot.starts}"
        try:
            engine = await within(self.start_timeout_s, self._launch(slot.index), "not up after {} (start_timeout_s)")
            if self._asleep:
                await within(self.sync_timeout_s, engine.sleep(), "falling asleep: no answer in {} (sync_timeout_s)")
        except Exception as error:
            slot.failed_starts += 1
            self._last_failure = f"engine {id}: {error_summary(error)}"
            logger.warning("engine %s did not start: %s", id, error_summary(error))
            if slot.starts == 1 and isinstance(error, ConstructorError):
                self._constructor_errors.add(slot.index)
            if len(self._constructor_errors) == len(self._slots) and not self._ever_up:
                self._fail(f"no engine could be built; the last error: {self._last_failure}; see {self.logs}")
            self._check_version()
            self._start_tried.notify_all()
            return None
        slot.failed_starts = 0
        self._ever_up = True
        life = self._lives[id] = _Life(id, slot, engine, asyncio.get_running_loop().create_future())
        logger.info("engine %s is up", id)
        self._start_tried.notify_all()
        self._changed(visible=False)
        return life

    async def _live(self, life: _Life) -> None:
        """Watch and update an engine until it must be replaced."""
        tasks = [asyncio.create_task(self._guard(life, work(life))) for work in (self._ping, self._keep_updated)]
        try:
            await asyncio.wait({life.lost})
            logger.warning("engine %s is replaced: %s", life.id, life.lost.result())
        finally:
            self._lose(life, "the fleet shuts down")
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    async def _guard(self, life: _Life, work: Awaitable[None]) -> None:
        try:
            await work
        except Exception as error:
            self._lose(life, error_summary(error), error)

    def _lose(self, life: _Life, reason: str, error: Exception | None = None) -> None:
        """Take an engine out at once; its slot gets another."""
        if life.lost.done():
            return
        life.lost.set_result(reason)
        del self._lives[life.id]
        self._board.members.pop(life.slot.index, None)
        self._last_failure = f"engine {life.id}: {reason}"
        if not self._lives:
            self._none_since = time.monotonic()
        if self._update is not None:
            self._update.record_failure(life.id, life.slot.index, reason, error)
        self._check_version()
        self._changed()

    async def _retire_slot(self, slot: _Slot, life: _Life | None) -> None:
        try:
            retired = self._retire(slot.index, life.engine if life else None)
            await within(RETIRE_TIMEOUT_S, retired, "not retired after {}")
        except Exception as error:
            logger.warning("the engine of slot %d was not retired in order: %s", slot.index, error_summary(error))

    async def _ping(self, life: _Life) -> None:
        while True:
            await self._check(life)
            await asyncio.sleep(self.ping_interval_s)

    async def _check(self, life: _Life) -> EngineStatus:
        """The status; raises if an engine cannot be used, does not answer, or hangs in a step."""
        limit = self.ping_timeout_s
        status = await within(limit, life.engine.status(), "no status in {} (online.engine_timeout_s)")
        life.status = status
        if status.step_s > limit:
            raise EngineSilent(f"in one step for {status.step_s:.0f} s (online.engine_timeout_s: {limit:g})")
        return status

    async def _check_suspect(self, life: _Life, reason: str) -> None:
        try:
            await self._check(life)
        except Exception as error:
            return self._lose(life, f"{reason}; {error_summary(error)}", error)
        now = time.monotonic()
        life.cleared = [cleared for cleared in life.cleared if now - cleared < SUSPICION_WINDOW_S] + [now]
        if len(life.cleared) >= SUSPICIONS:
            self._lose(life, f"it answers, and failed over {SUSPICIONS} requests: {reason}")

    async def _keep_updated(self, life: _Life) -> None:
        """Take an engine through each update, whose failure ends the engine."""
        tried: Update | None = None
        while True:
            while (update := self._update) is None or update is tried or not update.expects(life.id):
                await self._update_begun.wait()
            if life.lost.done():
                return
            tried, life.loading = update, True
            try:
                await update.apply(life.id, life.engine)
            except UpdateOver:
                continue
            except MessageLost as error:
                self._abandon(update, error_summary(error))
                continue
            if self._asleep:
                await within(self.sync_timeout_s, life.engine.sleep(), "falling asleep: no answer in {}")
            if life.lost.done():
                return
            status = life.status or await self._check(life)
            life.loading = False
            life.slot.pauses = update.attempts[life.slot.index] = 0
            self._board.members[life.slot.index] = Member(
                life.id, life.engine, update.version, update.digest, status.max_sequences
            )
            self._board.metrics = update.metrics()
            self._changed()

    async def _watch_absence(self) -> None:
        """Fail the run if there is no engine for too long."""
        limit = self.start_timeout_s
        while True:
            await asyncio.sleep(min(1.0, limit / 10))
            if not self._lives and time.monotonic() - self._none_since > limit + min(1.0, limit / 10):
                cause = self._last_failure or "none has failed, they wait for resources"
                self._fail(f"no engine was up for {limit:g} s (cluster.start_timeout_s); {cause}; see {self.logs}")

    def _check_version(self) -> None:
        """Fail the run if every slot has failed over an update, or has no engine."""
        update = self._update
        if update is None or update.over.done() or max(update.attempts.values(), default=0) < ATTEMPTS:
            return
        if all(slot.failed_starts or update.attempts[slot.index] >= ATTEMPTS for slot in self._slots):
            self._fail(f"no engine took over policy version {update.version}: {update.last_failure}; see {self.logs}")

    def _fail(self, error: str) -> None:
        if self._board.error is None:
            logger.error("%s", error)
            self._board.error = error
            self._changed()

    def _changed(self, *, visible: bool = True) -> None:
        """Publish a change. ``visible``: True if members or error changed; the rest is compared."""
        update, board = self._update, self._board
        active = update is not None and update.active
        before = (board.needs_weights, board.expected)
        board.needs_weights = bool(self._lives) and not (board.members or active or self._awaiting_start)
        loading = set(update.loading) if update is not None and active else set()
        board.expected = len(loading.union(member.id for member in board.members.values()))
        if visible or before != (board.needs_weights, board.expected):
            board.publish()
