"""Actors that stand for engines and coordinator, apart from the tests: their processes import next to nothing."""

import os
from typing import Any

from dpo_ray.types import Completion, CompletionGroup, Prompt


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


class Pushing:
    """A coordinator that has engines and can start no others."""

    def __init__(self, engines: list[Any]) -> None:
        self.engines, self.told = engines, ()

    def begin_push(self) -> list[Any]:
        """All engines, dead or not."""
        return self.engines

    def replace(self, index: int) -> Any:
        """There is no place for another."""
        from dpo_ray.launch.rollouts.pool import EngineFailed

        raise EngineFailed("no place")

    def pushed(self, *told: Any) -> None:
        """Keep what the push came to."""
        self.told = told

    def outcome(self) -> Any:
        """What ``pushed`` was told."""
        return self.told
