"""Engines for the tests of the fleet: their weights are a list of texts, whose concatenation is the digest."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

from dpo_ray.rollout.engine import UNPUSHED, EngineStatus, Request
from dpo_ray.rollout.fleet import Fleet
from dpo_ray.rollout.membership import Membership
from dpo_ray.types import CompletionGroup, Probe

PROBE = Probe((1, 2, 3), (-1.0, -2.0), tolerance=0.1)
WAIT_S = 10.0
"""Longest wait for a state that a test expects."""


class FakeEngine:
    """Does what it is asked, or what a test has set for a method in ``faults``."""

    def __init__(self, slot: int, start: int) -> None:
        self.name = f"{slot}.{start}"
        self.version, self.step_s = UNPUSHED, 0.0
        self.weights: list[str] = []
        self.logps = list(PROBE.logps)
        self.infos: list[Any] = []
        self.dead = False
        self.served: set[int] = set()
        """Versions with which it was told to serve."""
        self.finished: dict[int, str] = {}
        """Digest of the weights by version."""
        self.calls: list[str] = []
        self.faults: dict[str, Callable[[], Any]] = {}
        """By method: raises, or returns a coroutine to await first."""

    async def _called(self, method: str) -> None:
        self.calls.append(method)
        if (fault := self.faults.get(method)) is not None and (waits := fault()) is not None:
            await waits

    async def generate(self, request: Request) -> CompletionGroup:
        raise NotImplementedError

    async def status(self) -> EngineStatus:
        await self._called("status")
        return EngineStatus(self.version, 0, 0, 0, 0.0, self.step_s, 0.0, 64)

    async def abort(self) -> None:
        await self._called("abort")

    async def start_update(self) -> None:
        await self._called("start_update")
        self.weights = []

    async def init_transfer(self, info: Mapping[str, Any]) -> None:
        await self._called("init_transfer")
        self.infos.append(info)

    async def load(self, message: Any) -> None:
        await self._called("load")
        self.weights.append(message)

    async def finish_update(self, version: int) -> str:
        await self._called("finish_update")
        self.version = version
        self.finished[version] = "".join(self.weights)
        return self.finished[version]

    async def token_logps(self, token_ids: Sequence[int]) -> list[float]:
        await self._called("token_logps")
        return self.logps

    async def serve(self) -> None:
        await self._called("serve")
        self.served.add(self.version)

    async def sleep(self) -> None:
        await self._called("sleep")


def dies(error: type[Exception] = ConnectionError) -> Callable[[], Any]:
    """A fault: the engine's process is dead."""

    def raises() -> None:
        raise error("the process died")

    return raises


def hangs() -> Any:
    """A fault: no answer."""
    return asyncio.sleep(3600)


class World:
    """Launches fake engines for a fleet.

    Args:
        prepare: called with each engine before it starts; may set faults, raise, or return a coroutine to await.
    """

    def __init__(self, slots: int, prepare: Callable[[FakeEngine], Any] = lambda engine: None, **options: Any) -> None:
        self.prepare = prepare
        self.starts: Counter[int] = Counter()
        self.engines: dict[str, FakeEngine] = {}
        self.alive: set[str] = set()
        self.retired: list[str] = []
        limits: dict[str, Any] = {
            "start_timeout_s": 30.0,
            "sync_timeout_s": 30.0,
            "ping_timeout_s": 30.0,
            "ping_interval_s": 0.02,
        }
        self.fleet = Fleet(self.launch, self.retire, slots, logs="engine.log", **(limits | options))

    async def launch(self, slot: int) -> FakeEngine:
        assert not any(name.startswith(f"{slot}.") for name in self.alive)
        self.starts[slot] += 1
        engine = FakeEngine(slot, self.starts[slot])
        if (waits := self.prepare(engine)) is not None:
            await waits
        self.engines[engine.name] = engine
        self.alive.add(engine.name)
        return engine

    async def retire(self, slot: int, engine: Any) -> None:
        self.retired.append(f"{slot}.{self.starts[slot]}")
        if engine is not None:
            self.alive.remove(engine.name)

    async def until(self, condition: Callable[[Membership], Any]) -> Membership:
        """The first membership that satisfies a condition."""
        current = await self.fleet.membership(-1, 0.0)
        try:
            async with asyncio.timeout(WAIT_S):
                while not condition(current):
                    current = await self.fleet.membership(current.epoch, WAIT_S)
                return current
        except TimeoutError:
            raise AssertionError(f"still {current} after {WAIT_S} s") from None

    async def serving(self, *members: str, version: int = 1) -> Membership:
        """Wait until exactly these engines serve a version."""
        expected = [(member, version) for member in members]
        return await self.until(lambda now: [(member.id, member.version) for member in now.members] == expected)

    async def up(self, *names: str) -> None:
        """Wait until these engines have been up."""
        async with asyncio.timeout(WAIT_S):
            while not set(names) <= self.engines.keys():
                await asyncio.sleep(0.001)
            await asyncio.sleep(0.001)

    async def update(self, version: int, *messages: str, collective: bool = False) -> list[str]:
        """A whole update; returns the engines that take part."""
        members = await self.fleet.begin_update(version, collective=collective)
        if collective:
            await self.fleet.init_transfer([{"rank": rank} for rank in range(len(members))])
        for message in messages:
            await self.fleet.load(message)
        await self.fleet.end_update("".join(messages), PROBE)
        return members


@contextlib.asynccontextmanager
async def running(world: World) -> AsyncIterator[World]:
    """The world with its fleet running; all engines must be retired at the end."""
    task = asyncio.create_task(world.fleet.run())
    try:
        yield world
    finally:
        task.cancel()
        await asyncio.wait({task})
    assert not world.alive
