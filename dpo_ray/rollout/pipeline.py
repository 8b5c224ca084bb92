"""The pipeline of a round: each group is generated, judged, selected and appended by itself.

Judging overlaps generating. An error is the outcome of its group; only too many of them, a failed fleet or an
unavailable judge end the round.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from dpo_ray.rollout.dispatch import FleetFailed
from dpo_ray.rollout.engine import Request
from dpo_ray.rollout.open_round import FAILED, Outcome
from dpo_ray.rollout.selectors.preferences import Choice
from dpo_ray.types import CompletionGroup, Dropped, Judgement, JudgeUnavailable, NonRetryableError

Generate = Callable[[Request], Awaitable[CompletionGroup]]
Score = Callable[[CompletionGroup], Awaitable[Judgement]]
Select = Callable[[CompletionGroup, Sequence[float]], Choice]


class TooManyFailed(NonRetryableError):
    """More groups failed than ``online.max_failed_share`` allows."""


@dataclass(slots=True)
class BusyTimer:
    """Seconds during which at least one of its activities was in progress."""

    seconds: float = 0.0
    active: int = 0
    since: float = field(default=0.0)

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Time an activity."""
        if self.active == 0:
            self.since = time.perf_counter()
        self.active += 1
        try:
            yield
        finally:
            self.active -= 1
            if self.active == 0:
                self.seconds += time.perf_counter() - self.since


@dataclass(frozen=True, slots=True)
class Pipeline:
    """The steps of a group, and how many groups are in flight.

    Attributes:
        in_flight: groups that wait for an engine, are generated, or wait for the judge.
    """

    generate: Generate
    score: Score
    select: Select
    in_flight: int
    generating: BusyTimer = field(default_factory=BusyTimer)
    judging: BusyTimer = field(default_factory=BusyTimer)

    async def run(self, requests: Iterable[tuple[int, Request]], append: Callable[[Outcome], None]) -> None:
        """Append one outcome per request, in the order in which they finish; an error of ``append`` ends the run.

        Args:
            requests: with the position of each in its round; drawn as there is room.
        """
        room = asyncio.Semaphore(self.in_flight)

        async def flow(position: int, request: Request) -> None:
            try:
                append(await self.outcome(position, request))
            finally:
                room.release()

        try:
            async with asyncio.TaskGroup() as tasks:
                for position, request in requests:
                    await room.acquire()
                    tasks.create_task(flow(position, request))
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None

    async def outcome(self, position: int, request: Request) -> Outcome:
        """Generate, judge and select; the first step that raises decides the reason of a failed group."""
        group, judgement, step = None, Judgement(()), "generate"
        try:
            with self.generating():
                group = await self.generate(request)
            step = "judge"
            with self.judging():
                judgement = await self.score(group)
            step = "select"
            choice = self.select(group, judgement.scores)
        except (FleetFailed, JudgeUnavailable):
            raise
        except Exception as error:
            message = f"{type(error).__name__}: {error}"
            return Outcome(request.prompt, position, Dropped(f"{FAILED}{step}"), group, judgement, message)
        return Outcome(request.prompt, position, choice, group, judgement)


@dataclass(slots=True)
class FailureLimit:
    """Counts failed groups of a round and raises TooManyFailed beyond a share.

    Attributes:
        round: for the message.
        prompts: groups of the round.
        share: ``online.max_failed_share``.
    """

    round: int
    prompts: int
    share: float
    reasons: dict[str, int] = field(default_factory=dict)
    first: str = ""

    def count(self, outcome: Outcome) -> None:
        """Count an outcome."""
        if outcome.error is None or not isinstance(outcome.choice, Dropped):
            return
        step = outcome.choice.reason.removeprefix(FAILED)
        self.reasons[step] = self.reasons.get(step, 0) + 1
        self.first = self.first or f"prompt {outcome.prompt.index}, {step}: {outcome.error}"
        failed = sum(self.reasons.values())
        if failed > self.share * self.prompts:
            kinds = ", ".join(f"{step}: {count}" for step, count in sorted(self.reasons.items()))
            raise TooManyFailed(
                f"{failed} of {self.prompts} groups of round {self.round} failed ({kinds}), more than "
                f"online.max_failed_share ({self.share:g}) allows; the first: {self.first}"
            )
