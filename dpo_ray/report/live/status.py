"""The status of a run, as its display shows it."""

from dataclasses import dataclass, field

from dpo_ray.types import Metrics


@dataclass(frozen=True, slots=True)
class Status:
    """A snapshot of a run's progress."""

    phase: str = "starting"
    done: int = 0
    total: int = 0
    """Size of the phase in steps, trials, pairs or prompts; 0 if unknown."""
    round: int | None = None
    """Finished rounds."""
    metrics: Metrics = field(default_factory=dict)
    """Latest value of every metric."""
    notes: tuple[str, ...] = ()
    """Lines for the person who started the run."""
