"""The protocol through which the training loops report progress, and the timer of their phases."""

import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import Protocol

from dpo_ray.types import Metrics


class Reporter(Protocol):
    """Receives the progress of a run. All ranks call every method; values equal on all ranks are written once."""

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
        """True if this rank has received a request to stop early; ranks may differ for a moment, see ``any_rank``."""


class PhaseTimer:
    """Measures phases: ``with timer(name)`` sets ``timer.seconds[name]``, wall-clock.

    Args:
        seconds: phases that were measured before.
    """

    def __init__(self, seconds: Mapping[str, float]) -> None:
        self.seconds = dict(seconds)

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - started
