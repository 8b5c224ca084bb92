"""Dispatch: sends each request to an engine that serves a recent enough policy, and again if that engine fails."""

import asyncio
import contextlib
import heapq
import itertools
import logging
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from dpo_ray.rollout.engine import Request, RequestTimedOut
from dpo_ray.rollout.membership import Member, Membership
from dpo_ray.storage import error_summary
from dpo_ray.types import CompletionGroup, NonRetryableError

logger = logging.getLogger(__name__)

ENGINE_ATTEMPTS = 3
"""Engines that may fail over one request, the last one alone with it: then the request is the likely cause."""
GRACE_S = 30.0
"""Seconds beyond a request's deadline after which its engine counts as hung: a working one would have aborted it."""
POLL_S = 5.0
"""Longest wait of one question for the membership."""
RESTART_S = 1.0
"""Pause before a fleet that does not answer is asked again."""
QUEUED_SHARE = 0.25
"""Sequences that wait in an engine, as a fraction of those it generates at a time: it never runs out of work."""


class FleetFailed(NonRetryableError):
    """There are no engines, and there will be none."""


class EngineError(RuntimeError):
    """Several engines failed over the same request."""


class VersionGone(RuntimeError):
    """Every engine serves a newer policy than the one requested."""


class _Versions(NamedTuple):
    """The policy versions that a request accepts, and whether its engine may serve others beside it."""

    oldest: int
    newest: int | None
    alone: bool

    def include(self, version: int) -> bool:
        """True if the version is in the range."""
        return version >= self.oldest and (self.newest is None or version <= self.newest)


@dataclass(slots=True, eq=False)
class _Waiting:
    """A request that waits for its engine."""

    request: Request
    turn: asyncio.Future[Member]
    member: Member | None = None
    """The engine that was chosen."""


@dataclass(slots=True)
class _Queue:
    """The requests that wait for the same engines, evaluations and earlier rounds first."""

    members: dict[str, Member]
    """The engines that may take them, by id; filtered once per membership, since there may be a thousand."""
    heap: list[tuple[bool, int, int, _Waiting]] = field(default_factory=list)

    def first(self) -> _Waiting | None:
        """The next request; those whose round was cancelled are dropped."""
        while self.heap and self.heap[0][-1].turn.done():
            heapq.heappop(self.heap)
        return self.heap[0][-1] if self.heap else None


class Dispatcher:
    """The engines as one: requests in, groups out. Belongs to one event loop.

    A request goes to the least busy engine of its versions. None gets more than it can generate at a time and a few
    that wait, nor, while others are still loading the same weights, more than its share of all requests.

    Args:
        membership: ``Fleet.membership``.
        suspect: ``Fleet.suspect``.
    """

    def __init__(
        self,
        membership: Callable[[int, float], Awaitable[Membership]],
        suspect: Callable[[str, str], Awaitable[None]],
    ) -> None:
        self._membership, self._suspect = membership, suspect
        self.current = Membership(epoch=-1)
        self._running: Counter[str] = Counter()
        """Sequences of the requests in progress, by member id."""
        self._sequences = 0
        """Sequences of all requests, in progress or waiting."""
        self._occupied: set[str] = set()
        """Ids of the members that serve a request alone."""
        self._queues: dict[_Versions, _Queue] = {}
        self._order = itertools.count()

    async def follow(self) -> None:
        """Follow the membership until cancelled; a fleet that restarts is asked again."""
        while True:
            try:
                current = await self._membership(self.current.epoch, POLL_S)
            except Exception as error:
                # The fleet's process died: its engines with it.
                logger.warning("the fleet does not answer: %s", error)
                current = Membership(epoch=-1)
                await asyncio.sleep(RESTART_S)
            if current != self.current:
                self._set(current)

    def _set(self, current: Membership) -> None:
        self.current = current
        self._queues = {versions: queue for versions, queue in self._queues.items() if queue.heap}
        for versions, queue in self._queues.items():
            queue.members = self._members(versions)
        ids = {member.id for member in current.members}
        self._running = Counter({id: count for id, count in self._running.items() if count or id in ids})
        self._running.update(dict.fromkeys(ids, 0))
        self._assign()

    def _members(self, versions: _Versions) -> dict[str, Member]:
        return {member.id: member for member in self.current.members if versions.include(member.version)}

    async def generate(self, request: Request, *, oldest: int, newest: int | None = None) -> CompletionGroup:
        """Complete a prompt by an engine whose policy is in the range of versions; waits for one.

        Raises:
            ValueError, RequestTimedOut: see ``Engine.generate``.
            EngineError: ENGINE_ATTEMPTS engines failed.
            VersionGone: all engines are newer than ``newest``.
            FleetFailed: see there.
        """
        failures = 0
        while True:
            # The requests of an engine fail together; the last attempt, alone, shows which of them is at fault.
            versions = _Versions(oldest, newest, alone=failures == ENGINE_ATTEMPTS - 1)
            async with self._engine(request, versions) as member:
                try:
                    async with asyncio.timeout(request.deadline_s + GRACE_S):
                        return await member.engine.generate(request)
                except (ValueError, RequestTimedOut):
                    raise
                except Exception as error:
                    reason = error_summary(error)
                    self._leave_out(member)  # before its room is free for the next request
            failures += await self._report(member, reason)
            if failures == ENGINE_ATTEMPTS:
                raise EngineError(f"{failures} engines failed over prompt {request.prompt.index}: {reason}")

    @contextlib.asynccontextmanager
    async def _engine(self, request: Request, versions: _Versions) -> AsyncIterator[Member]:
        """The engine that a request is sent to; waits for it."""
        waiting = _Waiting(request, asyncio.get_running_loop().create_future())
        queue = self._queues.get(versions)
        if queue is None:
            queue = self._queues[versions] = _Queue(self._members(versions))
        heapq.heappush(queue.heap, (not request.evaluation, request.round, next(self._order), waiting))
        self._sequences += request.candidates
        try:
            self._assign()
            yield await waiting.turn
        finally:
            self._sequences -= request.candidates
            if waiting.member is not None:
                self._running[waiting.member.id] -= request.candidates
                self._occupied.discard(waiting.member.id)
            self._assign()

    def _assign(self) -> None:
        """Choose engines for the requests that wait, as far as there are any with room."""
        reserved = set(self._occupied)
        for versions, queue in sorted(self._queues.items(), key=lambda item: (not item[0].alone, item[1].heap[:1])):
            while (waiting := queue.first()) is not None:
                if (problem := self._problem(versions)) is not None:
                    waiting.turn.set_exception(problem)
                    continue
                member = self._least_busy(queue, reserved)
                if member is None:
                    break
                if versions.alone:
                    reserved.add(member.id)
                    if self._running[member.id]:
                        break  # it gets no others until its requests are done
                    self._occupied.add(member.id)
                elif not self._has_room(member, waiting.request):
                    break
                waiting.member = member
                self._running[member.id] += waiting.request.candidates
                waiting.turn.set_result(member)

    def _problem(self, versions: _Versions) -> Exception | None:
        """Why there will be no engine of these versions."""
        if self.current.error is not None:
            return FleetFailed(self.current.error)
        members, newest = self.current.members, versions.newest
        if newest is not None and members and all(member.version > newest for member in members):
            return VersionGone(f"all engines serve policy version {members[0].version}, not {newest}")
        return None

    def _least_busy(self, queue: _Queue, reserved: set[str]) -> Member | None:
        free = queue.members.keys() - reserved if reserved else queue.members
        return queue.members[min(free, key=self._running.__getitem__)] if free else None

    def _has_room(self, member: Member, request: Request) -> bool:
        """True if a member may get a request.

        An evaluation waits in the engine: an update waits for those that it has, and would pass others by.
        """
        running = self._running[member.id]
        share = self._sequences / max(len(self.current.members), self.current.expected)
        fits = running + request.candidates <= (1 + QUEUED_SHARE) * member.max_sequences
        return running == 0 or (running < share and (fits or request.evaluation))

    def _leave_out(self, member: Member) -> None:
        """Send nothing to an engine until the fleet has answered for it."""
        members = tuple(other for other in self.current.members if other.id != member.id)
        self._set(replace(self.current, members=members))

    async def _report(self, member: Member, reason: str) -> bool:
        """Report an engine to the fleet; returns False if the fleet has died, and its engines with it."""
        try:
            async with asyncio.timeout(POLL_S):
                await self._suspect(member.id, reason)
                self._set(await self._membership(-1, 0.0))
        except Exception:
            await asyncio.sleep(RESTART_S)
            return False
        return True
