"""Engines, a fleet and judges that answer at once, fail or hang, in place of processes."""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

from dpo_ray.config.rounds import OnlineConfig
from dpo_ray.rollout.engine import Engine, EngineStatus, Request
from dpo_ray.rollout.judges import capacity_of, check_scores
from dpo_ray.rollout.judging import JudgePool
from dpo_ray.rollout.membership import Member, Membership
from dpo_ray.types import Completion, CompletionGroup, Judgement, Prompt


def prompts(count: int) -> list[Prompt]:
    """Prompts of one token."""
    return [Prompt(i, ({"role": "user", "content": str(i)},), (i,), {"answer": i}) for i in range(count)]


def online(**values: Any) -> OnlineConfig:
    """A small configuration."""
    return OnlineConfig.model_validate({"prompts": "p.jsonl", "rounds": 4, "prompts_per_round": 8, **values})


class FakeEngine:
    """Completes a prompt with texts of its seed; ``act`` may wait or raise before.

    Attributes:
        requests: all that it was asked.
    """

    def __init__(self, version: int = 0, act: Callable[[Request], Any] | None = None, max_sequences: int = 256) -> None:
        self.version, self.act, self.max_sequences = version, act, max_sequences
        self.requests: list[Request] = []
        self.running = self.most = 0

    async def generate(self, request: Request) -> CompletionGroup:
        """Completions of two tokens."""
        self.requests.append(request)
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            if self.act is not None and (action := self.act(request)) is not None:
                await action
            completions = tuple(
                Completion(f"{request.seed + i}", (request.seed % 97, i), True, self.version, self.version, -1.0)
                for i in range(request.candidates)
            )
            return CompletionGroup(request.prompt, completions, request.seed)
        finally:
            self.running -= 1


class FakeFleet:
    """A membership that tests change."""

    def __init__(self, *engines: FakeEngine) -> None:
        self.engines = dict(enumerate(engines))
        self.loading: set[int] = set()
        """Engines that load weights and are no members yet."""
        self.suspected: list[tuple[str, str]] = []
        self.error: str | None = None
        self.needs_weights = self.unplaced = False
        self.epoch = 0
        self.changed = asyncio.Event()

    async def membership(self, after: int, wait_s: float) -> Membership:
        """The members, at once if they have changed."""
        if after == self.epoch:
            try:
                async with asyncio.timeout(wait_s):
                    await self.changed.wait()
            except TimeoutError:
                pass
        self.changed.clear()
        as_engine = lambda engine: cast(Engine, engine)  # noqa: E731
        members = tuple(
            Member(str(i), as_engine(engine), engine.version, f"d{engine.version}", engine.max_sequences)
            for i, engine in self.engines.items()
            if i not in self.loading
        )
        metrics = {"perf/push_s": 0.5}
        return Membership(
            self.epoch, members, len(self.engines), self.needs_weights, self.error, self.unplaced, metrics
        )

    async def statuses(self) -> dict[str, EngineStatus]:
        """Two sequences run and one waits in each engine, which has made 300 tokens in 3 s; 1 of 4 was cached."""
        return {
            str(i): EngineStatus(engine.version, 2, 1, 300, 3.0, 0.0, 0.25, engine.max_sequences)
            for i, engine in self.engines.items()
        }

    async def suspect(self, member_id: str, reason: str) -> None:
        """Remove an engine."""
        self.suspected.append((member_id, reason))
        self.engines.pop(int(member_id), None)
        self.change()

    def change(self) -> None:
        """Announce a change."""
        self.epoch += 1
        self.changed.set()

    def publish(self, version: int) -> None:
        """All engines serve a version."""
        for engine in self.engines.values():
            engine.version = version
        self.change()


class FakeReplica:
    """A judge whose scores are numbers of the prompt; ``act`` may wait or raise before."""

    def __init__(self, act: Callable[[Sequence[CompletionGroup]], Any] | None = None) -> None:
        self.act, self.restarts = act, 0
        self.batches: list[list[int]] = []

    async def score(self, groups: Sequence[CompletionGroup]) -> list[Judgement]:
        """Scores 0, 1, 2 ... of the completions of each group."""
        self.batches.append([group.prompt.index for group in groups])
        if self.act is not None and (action := self.act(groups)) is not None:
            await action
        return [Judgement(tuple(float(i) for i in range(len(group.completions)))) for group in groups]

    async def idle(self) -> None:
        """At once."""

    async def ready(self) -> int:
        """At once."""
        return 1

    async def restart(self) -> None:
        """Count restarts."""
        self.restarts += 1


class OwnReplica(FakeReplica):
    """A judge in this process.

    Attributes:
        most: largest number of calls in progress, whose time-outs run.
    """

    def __init__(self, judge: Any) -> None:
        super().__init__()
        self.judge, self.calls, self.most = judge, 0, 0

    async def score(self, groups: Sequence[CompletionGroup]) -> list[Judgement]:
        """Scores of the judge."""
        self.calls += 1
        self.most = max(self.most, self.calls)
        try:
            return check_scores(groups, await self.judge(groups))
        finally:
            self.calls -= 1


def score_in_pool(judge: Any, groups: Sequence[CompletionGroup]) -> tuple[list[Judgement], int]:
    """Judge each group by a call of its own, as many at a time as an async judge has capacity for.

    Returns:
        The judgements, and the largest number of calls in progress.
    """

    async def main() -> tuple[list[Judgement], int]:
        capacity = capacity_of(judge, max(len(group.completions) for group in groups))
        replica = OwnReplica(judge)
        pool = JudgePool([replica], batch=1, capacity=capacity, timeout_s=60.0, retries=0)
        serving = asyncio.ensure_future(pool.run())
        judgements = await asyncio.gather(*map(pool.score, groups))
        serving.cancel()
        await judge.close()
        return judgements, replica.most

    return asyncio.run(main())


def raise_for(indices: Iterable[int], error: Exception) -> Callable[[Any], None]:
    """An action that raises for a request, or a batch, with one of some prompts."""
    bad = set(indices)

    def act(asked: Any) -> None:
        groups = [asked] if isinstance(asked, Request) else asked
        if bad & {group.prompt.index for group in groups}:
            raise error

    return act
