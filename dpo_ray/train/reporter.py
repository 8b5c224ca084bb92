"""The protocol through which the training loops report progress, and the timer of their phases."""

import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import Protocol

from dpo_ray.types import Metrics


class Reporter(Protocol):
    """Receives the progress of a run. Every rank calls every method; values that all ranks share are written once."""

    def phase(self, name: str, done: int = 0, total: int = 0) -> None:
        """Sets the current phase and its progress."""

    def note(self, text: str) -> None:
        """Shows a line to the person who started the run."""

    def start(self, step: int, round: int = 0) -> None:
        """Starts after ``step`` optimizer steps and ``round`` rounds; drops recorded metrics beyond them."""

    def step(self, metrics: Metrics) -> None:
        """Records the metrics of an optimizer step."""

    def round(self, metrics: Metrics) -> None:
        """Records the metrics of a finished round, under the step that ended it."""

    def evaluation(self, metrics: Metrics) -> None:
        """Records held-out metrics."""

    def stop_requested(self) -> bool:
        """True if this rank knows that the run should stop early."""


class PhaseTimer:
    """Wall-clock seconds of named phases; ``seconds`` may have some already."""

    def __init__(self, seconds: Mapping[str, float]) -> None:
        self.seconds = dict(seconds)

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - started
