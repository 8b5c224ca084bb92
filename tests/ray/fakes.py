"""Actors of engines, senders and a fleet: their processes import next to nothing."""

import os
import time
from pathlib import Path
from typing import Any

import ray

from dpo_ray.launch.rollouts.remote_engine import StoredMessage
from dpo_ray.rollout.engine import UNPUSHED, EngineStatus, Request, RequestTimedOut
from dpo_ray.types import EngineLost, Probe

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
        return EngineStatus(self.version, 0, 0, 0, 0.0, 0.0, 0.0, 256)

    async def abort(self) -> None: ...

    async def start_update(self) -> None:
        self.weights = ""

    async def load(self, message: str) -> None:
        self.weights += message

    async def finish_update(self, version: int) -> str:
        self.version = version
        return self.weights

    async def token_logps(self, token_ids: Any) -> list[float]:
        return list(LOGPS)

    async def serve(self) -> None: ...

    async def sleep(self) -> None: ...


class UnbuildableEngineActor(FakeEngineActor):
    """Raises in its constructor."""

    def __init__(self, config: dict[str, Any], index: int, **options: Any):
        raise OSError(f"no such model: {config['model']['path']}")


class Sender:
    """Owns the messages that it puts into the object store."""

    def put(self, message: str) -> list[Any]:
        return [ray.put(message)]


class RecordingFleet:
    """Keeps the calls of an update since its own start; may die, fail or hang.

    Args:
        file: exists after the first death.
        dies_at: the call at which it dies, once.
        answers_in_s: duration of each call.
    """

    def __init__(self, file: str, dies_at: str = "", answers_in_s: float = 0.0) -> None:
        self.file, self.dies_at, self.answers_in_s = Path(file), dies_at, answers_in_s
        self.calls: list[Any] = []

    def begin_update(self, version: int, *, collective: bool) -> list[str]:
        """Start over."""
        self.calls = []
        self._note("begin", version, collective)
        return ["0.1", "1.1"]

    def load(self, message: Any) -> None:
        """Keep a message."""
        if not self.calls:
            raise EngineLost("no update has begun")
        self._note("load", message)

    def end_update(self, digest: str, probe: Probe) -> None:
        """Keep the end."""
        self._note("end", digest, probe)

    def seen(self) -> list[Any]:
        """All calls, with the stored messages as an engine gets them."""
        return [tuple(ray.get(x.ref) if isinstance(x, StoredMessage) else x for x in call) for call in self.calls]

    def _note(self, name: str, *arguments: Any) -> None:
        time.sleep(self.answers_in_s)
        if name == self.dies_at and not self.file.exists():
            self.file.touch()
            os._exit(1)
        self.calls.append((name, *arguments))
