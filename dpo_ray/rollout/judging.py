"""The judges' processes as one judge of single groups: batches, time-outs, and another attempt for what failed."""

import asyncio
import contextlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from dpo_ray.types import CompletionGroup, Judgement, JudgeUnavailable


class JudgeReplica(Protocol):
    """A judge in a process of its own."""

    async def score(self, groups: Sequence[CompletionGroup]) -> list[Judgement]:
        """Scores of every completion of every group, checked."""
        ...

    async def ready(self) -> Any:
        """Wait until the judge is built, after its process was started again."""
        ...

    async def restart(self) -> None:
        """Kill the process, whatever it does; another starts. Calls in progress raise."""
        ...


class JudgeFailed(RuntimeError):
    """The judge hung, died or raised over one group, as often as it may."""


@dataclass(slots=True, eq=False)
class _Waiting:
    """A group that waits for its scores."""

    group: CompletionGroup
    judgement: asyncio.Future[Judgement]
    alone: bool = False
    """True after a batch with it failed: only the group at fault fails again."""
    attempts: int = 0


class _Problem(NamedTuple):
    """Why a call failed."""

    text: str
    own: bool = True
    """False if the process was killed because another call hung."""


class JudgePool:
    """Scores single groups by replicas that take batches. Belongs to one event loop.

    Args:
        batch: largest number of groups per call; a call takes those that wait, without waiting for more.
        concurrency: calls in progress per replica.
        timeout_s: longest wait for one call; then the replica is restarted.
        retries: further attempts for a group that failed alone.
    """

    def __init__(
        self, replicas: Sequence[JudgeReplica], *, batch: int, concurrency: int, timeout_s: float, retries: int
    ) -> None:
        self._replicas, self._batch, self._concurrency = replicas, batch, concurrency
        self._timeout_s, self._retries = timeout_s, retries
        self._queue: asyncio.Queue[_Waiting] = asyncio.Queue()
        self._restarts: Counter[int] = Counter()
        self._locks: defaultdict[int, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def run(self) -> None:
        """Serve until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for replica in self._replicas:
                for _ in range(self._concurrency):
                    tasks.create_task(self._serve(replica))

    async def score(self, group: CompletionGroup) -> Judgement:
        """One score per completion; NaN for a completion without a score.

        Raises:
            JudgeFailed, JudgeUnavailable: see there; the latter is not retried.
        """
        waiting = _Waiting(group, asyncio.get_running_loop().create_future())
        self._queue.put_nowait(waiting)
        return await waiting.judgement

    async def _serve(self, replica: JudgeReplica) -> None:
        while True:
            batch = await self._next_batch()
            problem = await self._call(replica, batch)
            if problem is None:
                continue
            for waiting in batch:
                waiting.attempts += problem.own and len(batch) == 1
                waiting.alone = True
                self._again(waiting, problem.text)

    async def _next_batch(self) -> list[_Waiting]:
        batch = [await self._queue.get()]
        while len(batch) < self._batch and not batch[0].alone and not self._queue.empty():
            following = self._queue.get_nowait()
            if following.alone:
                self._queue.put_nowait(following)
                break
            batch.append(following)
        return batch

    async def _call(self, replica: JudgeReplica, batch: Sequence[_Waiting]) -> _Problem | None:
        """Score a batch; returns what went wrong, or None."""
        limit, restarts = asyncio.timeout(self._timeout_s), self._restarts[id(replica)]
        try:
            async with limit:
                judgements = await replica.score([waiting.group for waiting in batch])
        except JudgeUnavailable as error:
            for waiting in batch:
                if not waiting.judgement.done():
                    waiting.judgement.set_exception(error)
            return None
        except Exception as error:
            own = limit.expired() or restarts == self._restarts[id(replica)]
            await self._recover(replica, hung=limit.expired(), restarts=restarts)
            if limit.expired():
                return _Problem(f"returned no scores in {self._timeout_s:g} s (online.judge.timeout_s)")
            return _Problem(f"raised {type(error).__name__}: {error}", own)
        for waiting, judgement in zip(batch, judgements, strict=True):
            if not waiting.judgement.done():
                waiting.judgement.set_result(judgement)
        return None

    async def _recover(self, replica: JudgeReplica, *, hung: bool, restarts: int) -> None:
        """Restart a replica that hangs, unless another call has done so, and wait until it is ready."""
        async with self._locks[id(replica)]:
            with contextlib.suppress(Exception):
                if hung and restarts == self._restarts[id(replica)]:
                    self._restarts[id(replica)] += 1
                    await replica.restart()
                await replica.ready()

    def _again(self, waiting: _Waiting, problem: str) -> None:
        """Put a group into the queue again, alone, or give it up."""
        if waiting.judgement.done():  # its round was cancelled
            return
        if waiting.attempts > self._retries:
            waiting.judgement.set_exception(JudgeFailed(f"the judge {problem}"))
        else:
            self._queue.put_nowait(waiting)
