"""An engine's actor for the tests of the fleet: its process imports next to nothing."""

import os
from typing import Any

from dpo_ray.rollout.engine import UNPUSHED, EngineStatus, Request, RequestTimedOut

LOGPS = (-1.0, -2.0)
"""The fake's log-probabilities of every text of three tokens."""


class FakeEngineActor:
    """Its weights are a text, which is its own digest."""

    def __init__(self, config: dict[str, Any], index: int, *, on_cpu: bool, executor: str, worker_extension: str):
        self.version, self.weights = UNPUSHED, ""

    async def pid(self) -> int:
        return os.getpid()

    async def generate(self, request: Request) -> None:
        if request.candidates == 0:
            raise ValueError("the prompt leaves no room")
        raise RequestTimedOut("not complete")

    async def status(self) -> EngineStatus:
        return EngineStatus(self.version, 0, 0, 0, 0.0, 0.0, 0.0)

    async def start_update(self) -> None:
        self.weights = ""

    async def load(self, message: str) -> None:
        self.weights += message

    async def finish_update(self, version: int) -> str:
        self.version = version
        return self.weights

    async def token_logps(self, token_ids: Any) -> list[float]:
        return list(LOGPS)

    async def sleep(self) -> None: ...

    async def wake(self) -> None: ...


class UnbuildableEngineActor(FakeEngineActor):
    """Raises in its constructor."""

    def __init__(self, config: dict[str, Any], index: int, **options: Any):
        raise OSError(f"no such model: {config['model']['path']}")


class Sender:
    """Owns the messages that it puts into the object store."""

    def put(self, message: str) -> list[Any]:
        import ray

        return [ray.put(message)]
