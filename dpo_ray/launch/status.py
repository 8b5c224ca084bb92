"""What a run tells while it runs: metrics.jsonl, a status board that the driver reads, logs in the run directory."""

import json
import logging
import math
import os
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ray

from dpo_ray.launch.cluster import same_node
from dpo_ray.storage import open_appendable
from dpo_ray.types import Metrics

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Status:
    """The run at a glance."""

    phase: str = "starting"
    done: int = 0
    total: int = 0
    """Of the phase's own unit: steps, rounds, pairs, completions; 0 when it cannot be counted."""
    round: int | None = None
    """Rounds finished."""
    step: int = 0
    metrics: Metrics = field(default_factory=dict)
    """The latest value of every metric."""
    notes: tuple[str, ...] = ()
    """Lines that the person who started the run should read."""
    changed: float = 0.0
    """Counts changes, so that a reader sees whether there is news."""


class StatusActor:
    """An actor that holds the latest Status; workers post to it without waiting, the driver polls it."""

    def __init__(self) -> None:
        self.status = Status()
        self.problem: str | None = None
        self.stopping = False
        self.stepped = False

    def report_fatal(self, problem: str) -> None:
        """Note an error after which the run must not be restarted; the first one counts."""
        self.problem = self.problem or problem

    def fatal_error(self) -> str | None:
        """The error after which the run must not be restarted."""
        return self.problem

    def phase(self, name: str, done: int, total: int) -> None:
        """Set what the run is busy with."""
        self.status = replace(self.status, phase=name, done=done, total=total, changed=self.status.changed + 1)

    def note(self, text: str) -> None:
        """Add a line for the person who started the run; one that is there already is not repeated."""
        if text not in self.status.notes:
            self.status = replace(self.status, notes=(*self.status.notes, text), changed=self.status.changed + 1)

    def step(self, metrics: Metrics) -> None:
        """Add a line of metrics of a step that was taken."""
        self.stepped = True
        self.metrics(metrics)

    def resumed(self, metrics: Metrics) -> None:
        """Take over the metrics of the run until where it goes on; all that was taken of it is saved."""
        self.stepped = False
        if metrics:
            self.metrics(metrics)

    def metrics(self, metrics: Metrics) -> None:
        """Add a line of metrics."""
        merged = self.status.metrics | metrics
        finished = merged.get("round")
        self.status = replace(
            self.status,
            metrics=merged,
            step=merged.get("step", 0),
            round=None if finished is None else finished + 1,
            changed=self.status.changed + 1,
        )

    def read(self) -> Status:
        """The latest Status."""
        return self.status

    def request_stop(self) -> bool:
        """End the run at the next place where it can go on from; whether a step was taken since the workers started."""
        self.stopping = True
        return self.stepped

    def stop_requested(self) -> bool:
        """True if the run should stop early."""
        return self.stopping


def start_status_actor() -> Any:
    """A StatusBoard actor on this process's node: no other node's end takes it away."""
    return ray.remote(num_cpus=0)(StatusActor).options(scheduling_strategy=same_node()).remote()


class RunReporter:
    """The Reporter of the training loops, over the run directory, the status board and Ray Train.

    Args:
        run_dir: shared by all workers; rank 0 writes.
        board: the StatusBoard actor's handle.
        rank: of this worker.
        to_train: also report evaluations to Ray Train, for a sweep that compares trials.
    """

    def __init__(self, run_dir: Path, status_actor: Any, rank: int, *, to_train: bool) -> None:
        self.status_actor, self.rank, self.to_train = status_actor, rank, to_train
        if rank == 0:
            self.file = open_appendable(run_dir / "metrics.jsonl")
        self.question: Any = None

    def phase(self, name: str, done: int = 0, total: int = 0) -> None:
        """Post the phase."""
        if self.rank == 0:
            self.status_actor.phase.remote(name, done, total)

    def note(self, text: str) -> None:
        """Log a line and post it."""
        if self.rank == 0:
            logger.info(text)
            self.status_actor.note.remote(text)

    def start(self, step: int, round: int = 0) -> None:
        """Drops recorded lines beyond ``step`` optimizer steps and ``round`` rounds: they will be written again."""
        if self.rank == 0:
            kept = self._drop_after(step, round) if self.file.exists() else []
            self.status_actor.resumed.remote({key: value for line in kept for key, value in line.items()})

    def _drop_after(self, step: int, round: int) -> list[Metrics]:
        lines = _whole_lines(self.file) if step or round else []
        kept = [line for line in lines if line["step"] <= step and line.get("round", -1) < round]
        unfinished = self.file.with_suffix(".unfinished")
        unfinished.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        unfinished.replace(self.file)
        return kept

    def step(self, metrics: Metrics) -> None:
        """Append a line and post it."""
        if self.rank == 0:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps({key: _finite(value) for key, value in metrics.items()}) + "\n")
            self.status_actor.step.remote(metrics)

    def round(self, metrics: Metrics) -> None:
        """Appends the line of a finished round and posts it."""
        self.step(metrics)

    def evaluation(self, metrics: Metrics) -> None:
        """A line of held-out metrics; every rank reports it to Ray Train, whose report is a barrier."""
        self.step(metrics)
        if self.to_train:
            import ray.train  # with what it imports, more than the status board's actor takes to start

            ray.train.report(metrics)

    def stop_requested(self) -> bool:
        """The status actor's latest answer; never waits for it."""
        if self.rank != 0:
            return False
        if self.question is None:
            self.question = self.status_actor.stop_requested.remote()
        ready, _ = ray.wait([self.question], timeout=0)
        if not ready:
            return False
        self.question = None
        try:
            return ray.get(ready[0])
        except ray.exceptions.RayActorError:
            return False  # the board is gone, and with it whoever could ask


def last_line(error: BaseException) -> str:
    """What an error of Ray comes to."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__


def _finite(value: Any) -> Any:
    """``value`` as JSON can hold it: NaN and infinity are null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _whole_lines(file: Path) -> list[Metrics]:
    lines = []
    for text in file.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue  # the line that a kill cut off
    return lines


def log_to_run(run_dir: Path, name: str) -> None:
    """Send everything this process prints and logs to ``logs/NAME.log`` in the run directory.

    The file descriptors themselves are redirected, so that child processes and C++ libraries are caught too.
    """
    file = os.open(open_appendable(run_dir / "logs" / f"{name}.log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True)
    logging.getLogger(__name__).info("pid %d, started %s", os.getpid(), time.strftime("%Y-%m-%d %H:%M:%S"))
