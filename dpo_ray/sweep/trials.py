"""The records of a sweep: its trials (``sweep.csv``) and its resolved definition (``sweep.json``)."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter

from dpo_ray.storage import write_atomically
from dpo_ray.types import Metrics

TrialStatus = Literal["waiting", "running", "done", "stopped", "failed"]
"""``stopped``: ended early by the scheduler."""
ENDED = ("done", "stopped", "failed")
KeyKind = Literal["log", "linear", "normal", "choice", "grid", "function", "constant"]
"""Kind of a domain; ``function``: values computed by the space, such as conditional ones."""

FIRST, LAST = ("trial", "status"), ("seconds", "origin", "error")
"""Columns of sweep.csv before the keys and after the metrics."""
STEP = "step"
"""First column after the keys. The other metrics follow it."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One trial as far as it has come."""

    name: str
    """Its folder under ``trials/``."""
    values: Mapping[str, Any]
    """Dotted configuration key to value."""
    status: TrialStatus = "waiting"
    metrics: Metrics = field(default_factory=dict)
    """The latest evaluation, with ``step`` (and ``round`` online)."""
    seconds: float = 0.0
    """Time on a slot, without loading and without the reference log-probabilities that all trials share."""
    error: str | None = None
    """Cause of a failure."""
    origin: str | None = None
    """The latest trial whose checkpoint it continued from, as ``NAME@STEP``; population-based training only."""
    since: float | None = None
    """Time up to which ``seconds`` counts, that of its latest event; None if it does not train. Not in sweep.csv."""


@dataclass(frozen=True, slots=True)
class Constraint:
    """Trials whose ``metric`` exceeds ``max`` cannot win."""

    metric: str
    max: float


@dataclass(frozen=True, slots=True)
class Objective:
    """The metric that a sweep optimizes."""

    metric: str
    mode: Literal["max", "min"] = "max"
    constraint: Constraint | None = None


@dataclass(frozen=True, slots=True)
class Key:
    """The domain of one configuration key."""

    kind: KeyKind
    lower: float | None = None
    upper: float | None = None
    """Bounds of ``log`` and ``linear`` domains."""
    integer: bool = False
    step: float | None = None
    """Values are multiples of it."""
    values: tuple[Any, ...] = ()
    """Values of a ``choice`` or ``grid`` domain, or of a ``constant``; domains inside them as text."""
    mean: float | None = None
    sd: float | None = None
    """Mean and standard deviation of a ``normal`` domain."""
    function: str = ""
    """Digest of the code of a ``function``; its qualified name if it has none of its own."""

    def __str__(self) -> str:
        text = f"{self.kind} {self.function}{', '.join(map(str, self.values))}".strip()
        if self.lower is not None and self.upper is not None:
            text = "integers " * self.integer + f"{_exact(self.lower)} to {_exact(self.upper)} ({self.kind})"
        if self.mean is not None and self.sd is not None:
            text += f", mean {_exact(self.mean)}, standard deviation {_exact(self.sd)}"
        return text if self.step is None else f"{text} in steps of {_exact(self.step)}"


def _exact(number: float) -> str:
    """A number with all its digits; whole numbers without a decimal point."""
    return repr(number).removesuffix(".0")


@dataclass(frozen=True, slots=True)
class SweepDefinition:
    """A resolved sweep, as ``sweep.json`` holds it."""

    keys: Mapping[str, Key]
    objective: Objective
    scheduler: Mapping[str, Any]
    """``use`` and ``args``."""
    search: Mapping[str, Any]
    """``use`` and ``args``."""
    samples: int
    """Trials, with all combinations of grid values."""
    seed: int
    time: Literal["step", "round"] = "step"
    """Unit of progress: optimizer steps offline, rounds online."""
    data: Mapping[str, str] = field(default_factory=dict)
    """Digests of pairs and prompts, by key; empty before they are prepared."""


_DEFINITION = TypeAdapter(SweepDefinition)


def write_trials(path: Path, trials: Sequence[Trial]) -> None:
    """Writes sweep.csv atomically: a line per trial with status, values, latest metrics, seconds and error."""
    keys = list(dict.fromkeys(key for trial in trials for key in trial.values))
    metrics = list(dict.fromkeys(key for trial in trials for key in trial.metrics if key != STEP))
    columns = [*FIRST, *keys, STEP, *metrics, *LAST]
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    writer.writerow(columns)
    for trial in trials:
        named = {
            "trial": trial.name, "status": trial.status, "seconds": round(trial.seconds, 3), "origin": trial.origin,
            "error": trial.error,
        }  # fmt: skip
        cells = [
            *(named[column] for column in FIRST),
            *(_cell(trial.values, key) for key in keys),
            *(_cell(trial.metrics, metric) for metric in (STEP, *metrics)),
            *(named[column] for column in LAST),
        ]
        writer.writerow(cells)
    write_atomically(path, file.getvalue())


def read_trials(path: Path) -> list[Trial]:
    """The trials of a sweep.csv, in its order; values equal those written."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = csv.reader(file)
        columns = next(rows)
        step, last = columns.index(STEP, len(FIRST)), len(columns) - len(LAST)
        return [_trial(columns, row, step, last) for row in rows]


def _trial(columns: Sequence[str], row: Sequence[str], step: int, last: int) -> Trial:
    cells = list(zip(columns, row, strict=True))
    name, status = row[: len(FIRST)]
    seconds, origin, error = row[last:]
    return Trial(
        name=name,
        values={key: _value(cell) for key, cell in cells[len(FIRST) : step] if cell},
        status=status,  # type: ignore[arg-type]
        metrics={key: _value(cell) for key, cell in cells[step:last] if cell},
        seconds=float(seconds),
        error=error or None,
        origin=origin or None,
    )


def _cell(values: Mapping[str, Any], key: str) -> str:
    """A value as JSON; strings that JSON would read as something else are quoted, others are plain."""
    if key not in values:
        return ""
    value = values[key]
    if isinstance(value, str) and value and _value(value) == value:
        return value
    return json.dumps(value)


def _value(cell: str) -> Any:
    try:
        return json.loads(cell)
    except json.JSONDecodeError:
        return cell


def write_definition(path: Path, definition: SweepDefinition) -> None:
    """Writes sweep.json atomically."""
    write_atomically(path, _DEFINITION.dump_json(definition, indent=1).decode() + "\n")


def as_read(definition: SweepDefinition) -> SweepDefinition:
    """The definition as it is read back: JSON has no tuples."""
    return _DEFINITION.validate_json(_DEFINITION.dump_json(definition))


def read_definition(path: Path) -> SweepDefinition:
    """The definition in a sweep.json."""
    return _DEFINITION.validate_json(path.read_bytes())
