"""The interfaces of schedulers and searchers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from dpo_ray.types import Metrics

Decision = Literal["continue", "stop", "pause"]


@dataclass(frozen=True, slots=True)
class Update:
    """A decision on a trial that is paused."""

    trial: str
    action: Literal["stop", "resume", "clone"]
    donor: str = ""
    """The trial whose newest checkpoint it continues from; ``clone`` only."""
    values: Mapping[str, Any] | None = None
    """Values it continues with; ``clone`` only."""


class Scheduler(Protocol):
    """Decides which trials run on. Deterministic: replaying the same calls gives the same results."""

    whole_population: bool
    """True if all trials must be added before the first one starts."""
    pauses: bool
    """True if trials may pause, so that they save a checkpoint where they do."""

    def add(self, trial: str, values: Mapping[str, Any]) -> None:
        """A new trial."""

    def started(self, trial: str) -> None:
        """A trial got a slot."""

    def report(self, trial: str, metrics: Metrics) -> Decision:
        """An evaluation before the end of a trial."""
        ...

    def paused(self, trial: str) -> None:
        """A trial has saved its state and freed its slot."""

    def ended(self, trial: str, metrics: Metrics, *, failed: bool) -> None:
        """A trial is at its end or failed; ``metrics``: its latest evaluation."""

    def updates(self) -> list[Update]:
        """Decisions on paused trials since the last call."""
        ...

    def choose(self, ready: Sequence[str]) -> str | None:
        """The next one to run of trials that wait, oldest first; None leaves the slot to a new trial."""
        ...


class Searcher(Protocol):
    """Picks the values of trials. Deterministic: replaying the same calls gives the same results."""

    exhausted: bool
    """True if it has no more values."""

    def suggest(self, trial: str) -> Mapping[str, Any] | None:
        """Values of the next trial; None if there are no more, or none before another trial has ended."""
        ...

    def report(self, trial: str, metrics: Metrics) -> None:
        """An evaluation before the end of a trial."""

    def ended(self, trial: str, metrics: Metrics, *, failed: bool) -> None:
        """A trial has ended or was stopped; ``metrics``: its latest evaluation."""


class StartsTogether:
    """The part of a scheduler whose trials start together and pause: decisions that have not been fetched."""

    whole_population = True
    pauses = True

    def __init__(self) -> None:
        self.decided: list[Update] = []

    def started(self, trial: str) -> None: ...

    def updates(self) -> list[Update]:
        decided, self.decided = self.decided, []
        return decided

    def choose(self, ready: Sequence[str]) -> str | None:
        return ready[0] if ready else None


class RunToEnd:
    """The scheduler that stops nothing: trials in order."""

    whole_population = False
    pauses = False

    def add(self, trial: str, values: Mapping[str, Any]) -> None: ...

    def started(self, trial: str) -> None: ...

    def report(self, trial: str, metrics: Metrics) -> Decision:
        return "continue"

    def paused(self, trial: str) -> None: ...

    def ended(self, trial: str, metrics: Metrics, *, failed: bool) -> None: ...

    def updates(self) -> list[Update]:
        return []

    def choose(self, ready: Sequence[str]) -> str | None:
        return ready[0] if ready else None
