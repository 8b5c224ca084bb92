"""Load balancing over the engines: requests go to one that serves a recent enough policy, and are retried elsewhere."""

import asyncio
import contextlib
import heapq
import itertools
import logging
import math
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from dpo_ray.rollout.engine import Request, RequestTimedOut
from dpo_ray.rollout.membership import Member, Membership
from dpo_ray.storage import error_summary
from dpo_ray.types import CompletionGroup, NonRetryableError

logger = logging.getLogger(__name__)

ENGINE_ATTEMPTS = 4
"""Engines that may fail over one request before it fails. The last of them serves this request alone, so the request
is the cause."""
SUSPECTED_AFTER = 2
"""Engines that failed over a request, after which it is a suspect: it goes to a quarantined engine, which serves no
other requests meanwhile."""
GRACE_S = 30.0
"""Seconds beyond a request's deadline after which its engine counts as hung: a working one would have aborted it."""
POLL_S = 5.0
"""Longest wait of one question for the membership."""
REPORT_S = 600.0
"""Longest wait for the fleet's answer about an engine, which it may take ``online.engine_timeout_s`` to check."""
RESTART_S = 1.0
"""Pause before a fleet that does not answer is asked again."""
QUEUED_SHARE = 0.25
"""Sequences that wait in an engine, as a fraction of those it generates at a time: it never runs out of work."""
HOLD_S = 10.0
"""Longest time for which requests are kept for engines that are still loading weights."""


class FleetFailed(NonRetryableError):
    """There are no engines, and there will be none."""


class EngineError(RuntimeError):
    """Several engines failed over the same request."""


class VersionGone(RuntimeError):
    """Every engine serves a newer policy than the one requested."""


class _Versions(NamedTuple):
    """The policy versions that a request accepts."""

    oldest: int
    newest: int | None
    suspect: bool
    """True after SUSPECTED_AFTER engines failed over the request."""

    def include(self, version: int) -> bool:
        """True if the version is in the range."""
        return version >= self.oldest and (self.newest is None or version <= self.newest)


@dataclass(slots=True, eq=False)
class _Waiting:
    """A request that waits for its engine."""

    request: Request
    turn: asyncio.Future[Member]
    alone: bool = False
    """True if its engine must serve no other request."""
    member: Member | None = None
    """The engine that was chosen."""


@dataclass(slots=True)
class _Queue:
    """Requests that wait for the same policy versions: evaluations first, then by round."""

    members: dict[str, Member]
    """The engines that serve these versions, by id; updated once per membership, since there may be a thousand."""
    heap: list[tuple[bool, int, int, _Waiting]] = field(default_factory=list)

    def first(self) -> _Waiting | None:
        """The next request; those whose round was cancelled are dropped."""
        while self.heap and self.heap[0][-1].turn.done():
            heapq.heappop(self.heap)
        return self.heap[0][-1] if self.heap else None


class Dispatcher:
    """Load balancer over the engines. Belongs to one event loop.

    A request goes to the least busy engine of its policy versions. An engine gets at most the sequences that it
    generates at a time and a few that wait; while others are still loading the same weights, at most its share of all
    requests. A request over which engines failed is a suspect: one engine is quarantined for suspects, few at a time,
    until the one at fault is found. Counts are per dispatcher: a judge that sends requests to engines has its own.

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
        self._changed_at = -math.inf
        """Time of the event loop at which ``current`` got its members."""
        self._left_out: Counter[str] = Counter()
        """Number of reports in progress, by member id."""
        self._reports: set[asyncio.Future[int]] = set()
        self._running: Counter[str] = Counter()
        """Sequences of the requests in progress, by member id."""
        self._sequences = 0
        """Sequences of all requests, in progress or waiting."""
        self._quarantined: str | None = None
        """Id of the quarantined member, which gets suspects only; None if there is none."""
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
        if current.members != self.current.members:
            loop = asyncio.get_running_loop()
            self._changed_at = loop.time()
            loop.call_later(HOLD_S, self._assign)
        self.current = current
        self._queues = {versions: queue for versions, queue in self._queues.items() if queue.heap}
        for versions, queue in self._queues.items():
            queue.members = self._members(versions)
        ids = {member.id for member in current.members}
        self._running = Counter({id: count for id, count in self._running.items() if count or id in ids})
        self._running.update(dict.fromkeys(ids, 0))
        self._assign()

    def _members(self, versions: _Versions) -> dict[str, Member]:
        members = (member for member in self.current.members if versions.include(member.version))
        return {member.id: member for member in members if not self._left_out[member.id]}

    async def generate(self, request: Request, *, oldest: int, newest: int | None = None) -> CompletionGroup:
        """Complete a prompt on an engine that serves a policy version from ``oldest`` to ``newest``; waits for one.

        Raises:
            ValueError, RequestTimedOut: see ``Engine.generate``.
            EngineError: ENGINE_ATTEMPTS engines failed.
            VersionGone: all engines are newer than ``newest``.
            FleetFailed: see there.
        """
        failures = 0
        while True:
            # The requests of an engine fail together. Fewer and fewer share one, until it shows which is at fault.
            versions = _Versions(oldest, newest, suspect=failures >= SUSPECTED_AFTER)
            alone = failures == ENGINE_ATTEMPTS - 1
            async with self._engine(request, versions, alone=alone) as member:
                try:
                    async with asyncio.timeout(request.deadline_s + GRACE_S):
                        return await member.engine.generate(request)
                except (ValueError, RequestTimedOut):
                    raise
                except Exception as error:
                    reason = error_summary(error)
                    self._left_out[member.id] += 1  # before its room is free for the next request
                    self._set(self.current)
            reporting = asyncio.ensure_future(self._report(member, reason))
            self._reports.add(reporting)
            reporting.add_done_callback(self._reports.discard)
            await asyncio.wait({reporting}, timeout=POLL_S)
            failures += reporting.result() if reporting.done() else 1
            if failures == ENGINE_ATTEMPTS:
                raise EngineError(f"{failures} engines failed over prompt {request.prompt.index}: {reason}")

    @contextlib.asynccontextmanager
    async def _engine(self, request: Request, versions: _Versions, *, alone: bool) -> AsyncIterator[Member]:
        """The engine that a request is sent to; waits for it."""
        waiting = _Waiting(request, asyncio.get_running_loop().create_future(), alone)
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
            self._assign()

    def _assign(self) -> None:
        """Send waiting requests to engines that have room."""
        if self._quarantined is not None and not self._running[self._quarantined]:
            self._quarantined = None
        for versions, queue in sorted(self._queues.items(), key=lambda item: (not item[0].suspect, item[1].heap[:1])):
            while (waiting := queue.first()) is not None:
                if (problem := self._problem(versions)) is not None:
                    waiting.turn.set_exception(problem)
                elif versions.suspect:
                    if not self._assign_suspects(queue):
                        break
                elif (member := self._least_busy(queue)) is None or not self._has_room(member, waiting.request):
                    break
                else:
                    self._send(waiting, member)

    def _assign_suspects(self, queue: _Queue) -> bool:
        """Quarantine an engine, or send the next suspects to it once it is idle; returns True if suspects were sent."""
        if self._quarantined is None and (member := self._least_busy(queue)) is not None:
            self._quarantined = member.id
        member = None if self._quarantined is None else queue.members.get(self._quarantined)
        if member is None or self._running[member.id]:
            return False
        few = math.isqrt(member.max_sequences)
        while (waiting := queue.first()) is not None:
            running = self._running[member.id]
            if running and (waiting.alone or running + waiting.request.candidates > few):
                break
            self._send(waiting, member)
            if waiting.alone:
                break
        return True

    def _send(self, waiting: _Waiting, member: Member) -> None:
        waiting.member = member
        self._running[member.id] += waiting.request.candidates
        waiting.turn.set_result(member)

    def _problem(self, versions: _Versions) -> Exception | None:
        """The error of requests for which there will be no engine; None if there may be one."""
        if self.current.error is not None:
            return FleetFailed(self.current.error)
        members, newest = self.current.members, versions.newest
        if newest is not None and members and all(member.version > newest for member in members):
            return VersionGone(f"all engines serve policy version {members[0].version}, not {newest}")
        return None

    def _least_busy(self, queue: _Queue) -> Member | None:
        free = queue.members if self._quarantined is None else queue.members.keys() - {self._quarantined}
        return queue.members[min(free, key=self._running.__getitem__)] if free else None

    def _has_room(self, member: Member, request: Request) -> bool:
        """True if a member may get a request.

        An evaluation waits in the engine: an update waits for those that it has, and would pass others by.
        """
        running = self._running[member.id]
        held = asyncio.get_running_loop().time() < self._changed_at + HOLD_S
        engines = max(len(self.current.members), self.current.expected if held else 0)
        fits = running + request.candidates <= (1 + QUEUED_SHARE) * member.max_sequences
        return running == 0 or (running < self._sequences / engines and (fits or request.evaluation))

    async def _report(self, member: Member, reason: str) -> int:
        """Report a suspect engine to the fleet, which checks it; until then it gets no requests.

        Returns:
            1; 0 if the fleet has died, and its engines with it.
        """
        latest = self.current
        try:
            async with asyncio.timeout(REPORT_S):
                await self._suspect(member.id, reason)
                latest = await self._membership(-1, 0.0)
        except TimeoutError:
            pass
        except Exception:
            await asyncio.sleep(RESTART_S)
            return 0
        finally:
            self._left_out[member.id] -= 1
            self._set(latest if latest.epoch > self.current.epoch else self.current)
        return 1
