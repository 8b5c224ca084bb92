"""The judges' processes as one judge of single groups: batches, time-outs, and another attempt for what failed."""

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from dpo_ray.rollout.judges.calls import Capacity
from dpo_ray.types import CompletionGroup, Judgement, JudgeUnavailable


class JudgeReplica(Protocol):
    """A judge in a process of its own."""

    async def score(self, groups: Sequence[CompletionGroup]) -> list[Judgement]:
        """Scores of every completion of every group, checked.

        Raises:
            JudgeDied: the process died.
        """
        ...

    async def idle(self) -> None:
        """Wait until no call is in progress; calls of a caller that died continue.

        Raises:
            JudgeDied: the process died meanwhile.
        """
        ...

    async def ready(self) -> Any:
        """Wait until the judge is built, after its process was started again."""
        ...

    async def restart(self) -> None:
        """Kill the process, whatever it does; another starts. Calls in progress raise."""
        ...


class JudgeDied(RuntimeError):
    """The judge's process died during a call."""


class JudgeFailed(RuntimeError):
    """The judge hung, died or raised over one group, as often as it may."""


@dataclass(slots=True, eq=False)
class _Waiting:
    """A group that waits for its scores."""

    group: CompletionGroup
    judgement: asyncio.Future[Judgement]
    alone: bool = False
    """True after a batch with it failed: only the group at fault fails again."""
    exclusive: bool = False
    """True after processes died with it alone in its call, and other calls in progress: one of them is at fault."""
    attempts: int = 0


class _Problem(NamedTuple):
    """Why a call failed."""

    text: str
    own: bool = True
    """False if the process died with other calls in progress, or was killed because another one hung."""
    died: bool = False


@dataclass(slots=True, eq=False)
class _Process:
    """A replica, and the calls in progress in it."""

    replica: JudgeReplica
    restarts: int = 0
    restarting: asyncio.Lock = field(default_factory=asyncio.Lock)
    requests: int = 0
    """Number of requests of the calls that have begun."""
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when a call ends."""
    calls: int = 0
    overlaps: int = 0
    """Number of calls that began beside another one."""
    open: asyncio.Event = field(default_factory=asyncio.Event)
    """Set if no call has the process for itself, or waits for that."""
    _entering: asyncio.Lock = field(default_factory=asyncio.Lock)
    _idle: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.open.set()

    async def room(self, most: int) -> None:
        """Wait until the calls that have begun have fewer than ``most`` requests."""
        while self.requests >= most:
            self.ended.clear()
            await self.ended.wait()

    @contextlib.asynccontextmanager
    async def call(self, *, exclusive: bool) -> AsyncIterator[None]:
        """Shared or exclusive lock around one call: an exclusive call waits for those in progress and delays others."""
        async with contextlib.AsyncExitStack() as turn:
            await turn.enter_async_context(self._entering)
            if exclusive:
                self.open.clear()
                turn.callback(self.open.set)
            while exclusive and self.calls:
                self._idle.clear()
                await self._idle.wait()
            self.overlaps += self.calls > 0
            self.calls += 1
            if not exclusive:
                await turn.aclose()
            try:
                yield
            finally:
                self.calls -= 1
                self._idle.set()


class JudgePool:
    """Scores single groups by replicas that take batches. Belongs to one event loop.

    Args:
        batch: largest number of groups per call; those that wait are spread over the calls that may begin.
        capacity: of each replica.
        timeout_s: longest wait for one call; then the replica is restarted.
        retries: further attempts for a group that failed alone.
    """

    def __init__(
        self, replicas: Sequence[JudgeReplica], *, batch: int, capacity: Capacity, timeout_s: float, retries: int
    ) -> None:
        self._processes, self._batch, self._capacity = list(map(_Process, replicas)), batch, capacity
        self._timeout_s, self._retries = timeout_s, retries
        self._queue: asyncio.Queue[_Waiting] = asyncio.Queue()

    async def run(self) -> None:
        """Serve until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for process in self._processes:
                tasks.create_task(self._serve(process))

    async def score(self, group: CompletionGroup) -> Judgement:
        """One score per completion; NaN for a completion without a score.

        Raises:
            JudgeFailed, JudgeUnavailable: see there; the latter is not retried.
        """
        waiting = _Waiting(group, asyncio.get_running_loop().create_future())
        self._queue.put_nowait(waiting)
        return await waiting.judgement

    async def _serve(self, process: _Process) -> None:
        """Begin calls of a process while it has room; groups without a call wait in the queue, where no time runs."""
        await self._take_over(process)
        async with asyncio.TaskGroup() as calls:
            while True:
                await asyncio.sleep(0)  # other replicas take their turns
                await process.open.wait()
                await process.room(self._capacity.requests)
                batch = await self._next_batch()
                if not process.open.is_set():  # other replicas are free
                    for waiting in batch:
                        self._queue.put_nowait(waiting)
                    continue
                requests = self._capacity.cost([waiting.group for waiting in batch])
                process.requests += requests
                calls.create_task(self._serve_batch(process, batch, requests))

    async def _take_over(self, process: _Process) -> None:
        """Wait for the calls that a pool before this one has left; a process that hangs over them is restarted.

        Calls of two pools at a time would exceed the judge's capacity, and wait for each other while their time runs.
        """
        limit = asyncio.timeout(self._timeout_s)
        try:
            async with limit:
                await process.replica.idle()
        except Exception:
            await self._recover(process, hung=limit.expired(), restarts=process.restarts)

    async def _serve_batch(self, process: _Process, batch: Sequence[_Waiting], requests: int) -> None:
        """Score a batch, or put its groups into the queue again."""
        try:
            problem = await self._call(process, batch)
        finally:
            process.requests -= requests
            process.ended.set()
        if problem is None:
            return
        for waiting in batch:
            waiting.attempts += problem.own and len(batch) == 1
            waiting.exclusive |= problem.died and waiting.alone
            waiting.alone = True
            self._again(waiting, problem.text)

    async def _next_batch(self) -> list[_Waiting]:
        batch = [await self._queue.get()]
        # Spread over the calls that may begin: two groups take longer than one in most judges whose calls overlap.
        size = min(self._batch, math.ceil((1 + self._queue.qsize()) / self._free_requests()))
        while len(batch) < size and not batch[0].alone and not self._queue.empty():
            following = self._queue.get_nowait()
            if following.alone:
                self._queue.put_nowait(following)
                break
            batch.append(following)
        return batch

    def _free_requests(self) -> int:
        """Requests that all processes have room for; at least 1."""
        free = (self._capacity.requests - process.requests for process in self._processes if process.open.is_set())
        return max(1, sum(max(0, room) for room in free))

    async def _call(self, process: _Process, batch: Sequence[_Waiting]) -> _Problem | None:
        """Score a batch; returns what went wrong, or None."""
        async with process.call(exclusive=batch[0].exclusive):
            return await self._score(process, batch)

    async def _score(self, process: _Process, batch: Sequence[_Waiting]) -> _Problem | None:
        limit, restarts = asyncio.timeout(self._timeout_s), process.restarts
        beside, overlaps = process.calls > 1, process.overlaps
        try:
            async with limit:
                judgements = await process.replica.score([waiting.group for waiting in batch])
        except JudgeUnavailable as error:
            for waiting in batch:
                if not waiting.judgement.done():
                    waiting.judgement.set_exception(error)
            return None
        except Exception as error:
            killed = restarts != process.restarts and not limit.expired()
            died = isinstance(error, JudgeDied) and not killed
            others = beside or overlaps != process.overlaps
            await self._recover(process, hung=limit.expired(), restarts=restarts)
            if limit.expired():
                return _Problem(f"returned no scores in {self._timeout_s:g} s (online.judge.timeout_s)")
            text = "died: its process ended" if died else f"raised {type(error).__name__}: {error}"
            return _Problem(text, own=not killed and not (died and others), died=died)
        for waiting, judgement in zip(batch, judgements, strict=True):
            if not waiting.judgement.done():
                waiting.judgement.set_result(judgement)
        return None

    async def _recover(self, process: _Process, *, hung: bool, restarts: int) -> None:
        """Restart a replica that hangs, unless another call has done so, and wait until it is ready."""
        async with process.restarting:
            with contextlib.suppress(Exception):
                if hung and restarts == process.restarts:
                    process.restarts += 1
                    await process.replica.restart()
                await process.replica.ready()

    def _again(self, waiting: _Waiting, problem: str) -> None:
        """Put a group into the queue again, alone, or give it up."""
        if waiting.judgement.done():  # its round was cancelled
            return
        if waiting.attempts > self._retries:
            waiting.judgement.set_exception(JudgeFailed(f"the judge {problem}"))
        else:
            self._queue.put_nowait(waiting)
