"""Actors that stand for engines and coordinator, apart from the tests: their processes import next to nothing."""

import os
import time
from pathlib import Path
from typing import Any

import ray

from dpo_ray.launch.rollouts.weights import StoredMessage
from dpo_ray.types import Completion, CompletionGroup, EngineLost, Probe, Prompt


class Engine:
    """Writes what seed it was given; dies over some prompts."""

    def __init__(self, index: int, deadly: tuple[int, ...]) -> None:
        self.index, self.deadly = index, deadly

    def generate(self, prompts: list[Prompt], seeds: list[int], candidates: int) -> list[CompletionGroup]:
        """A completion of one token, the engine's index."""
        if any(prompt.index in self.deadly for prompt in prompts):
            os._exit(1)
        completion = Completion(str(self.index), (self.index,), finished=True)
        return [
            CompletionGroup(prompt, (0,), (completion,) * candidates, 3, seed)
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]

    def start_update(self) -> None:
        """An engine with anything deadly does not survive it."""
        if self.deadly:
            os._exit(1)

    def load(self, bucket: str) -> None:
        """Take weights, which are a text."""
        self.loaded = bucket

    def finish_update(self, version: int) -> str:
        """The text is its own digest."""
        return self.loaded


class Fleet:
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
