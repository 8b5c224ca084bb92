"""Dispatch: sends each request to an engine that serves a recent enough policy, and again if that engine fails."""

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import replace

from dpo_ray.rollout.engine import Request, RequestTimedOut
from dpo_ray.rollout.membership import Member, Membership, News
from dpo_ray.types import CompletionGroup, NonRetryableError

logger = logging.getLogger(__name__)

ENGINE_ATTEMPTS = 3
"""Engines that may fail over one request: then the request is the likely cause."""
GRACE_S = 30.0
"""Seconds beyond a request's deadline after which its engine counts as hung: a working one would have aborted it."""
POLL_S = 5.0
"""Longest wait of one question for the membership."""


class FleetFailed(NonRetryableError):
    """There are no engines, and there will be none."""


class EngineError(RuntimeError):
    """Several engines failed over the same request."""


class VersionGone(RuntimeError):
    """Every engine serves a newer policy than the one requested."""


class Dispatcher:
    """The engines as one: requests in, groups out. Belongs to one event loop.

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
        self.running: Counter[str] = Counter()
        """Requests in progress, by member id."""
        self._suitable: dict[tuple[int, int | None], dict[str, Member]] = {}
        """Members of ``current`` by range of versions; filtered once, since there may be a thousand."""
        self._news = News()

    async def follow(self) -> None:
        """Follow the membership until cancelled; a fleet that restarts is asked again."""
        while True:
            try:
                current = await self._membership(self.current.epoch, POLL_S)
            except Exception as error:
                # The fleet's process died: its engines with it.
                logger.warning("the fleet does not answer: %s", error)
                current = Membership(epoch=-1)
                await asyncio.sleep(1.0)
            if current != self.current:
                self._set(current)
                self._news.tell()

    def _set(self, current: Membership) -> None:
        self.current, self._suitable = current, {}
        ids = {member.id for member in current.members}
        self.running = Counter({id: count for id, count in self.running.items() if count or id in ids})
        self.running.update(dict.fromkeys(ids, 0))

    async def generate(self, request: Request, *, oldest: int, newest: int | None = None) -> CompletionGroup:
        """Complete a prompt by an engine whose policy is in the range of versions; waits for one.

        Raises:
            ValueError, RequestTimedOut: see ``Engine.generate``.
            EngineError: ENGINE_ATTEMPTS engines failed.
            VersionGone: all engines are newer than ``newest``.
            FleetFailed: see there.
        """
        for attempt in range(1, ENGINE_ATTEMPTS + 1):
            member = await self._member(oldest, newest)
            self.running[member.id] += 1
            try:
                async with asyncio.timeout(request.deadline_s + GRACE_S):
                    return await member.engine.generate(request)
            except (ValueError, RequestTimedOut):
                raise
            except Exception as error:
                reason = f"{type(error).__name__}: {error}".rstrip(": ")
                await self._report(member, reason)
                if attempt == ENGINE_ATTEMPTS:
                    raise EngineError(
                        f"{attempt} engines failed over prompt {request.prompt.index}: {reason}"
                    ) from None
            finally:
                self.running[member.id] -= 1
        raise AssertionError("unreachable")

    async def _member(self, oldest: int, newest: int | None) -> Member:
        """The least busy engine of a version in the range."""
        while True:
            if self.current.error is not None:
                raise FleetFailed(self.current.error)
            if suitable := self._members(oldest, newest):
                return suitable[min(suitable, key=self.running.__getitem__)]
            members = self.current.members
            if newest is not None and members and all(member.version > newest for member in members):
                raise VersionGone(f"all engines serve policy version {members[0].version}, not {newest}")
            await self._news.wait()

    def _members(self, oldest: int, newest: int | None) -> dict[str, Member]:
        """Members whose version is in the range, by id."""
        if (oldest, newest) not in self._suitable:
            self._suitable[oldest, newest] = {
                member.id: member
                for member in self.current.members
                if member.version >= oldest and (newest is None or member.version <= newest)
            }
        return self._suitable[oldest, newest]

    async def _report(self, member: Member, reason: str) -> None:
        """Report an engine to the fleet, and leave it out until the fleet has answered."""
        members = tuple(other for other in self.current.members if other.id != member.id)
        self._set(replace(self.current, members=members))
        try:
            async with asyncio.timeout(POLL_S):
                await self._suspect(member.id, reason)
        except Exception:
            await asyncio.sleep(1.0)  # the fleet is restarting; its engines die with it
