"""The reporter of the training loops: metrics.jsonl, the status actor and Ray Train."""

import json
import logging
import math
from pathlib import Path
from typing import Any

import ray
import ray.train

from dpo_ray.storage import open_appendable, read_jsonl, write_atomically
from dpo_ray.types import Metrics

logger = logging.getLogger(__name__)


class RunReporter:
    """Implements ``train.reporter.Reporter`` for one rank; only rank 0 writes files and updates the status.

    Args:
        online: steps end rounds, whose metrics belong to the line of the last step: each line waits for the next call.
        to_train: also report evaluations to Ray Train, for a sweep that compares trials.
    """

    def __init__(self, run_dir: Path, status_actor: Any, rank: int, *, online: bool = False, to_train: bool) -> None:
        self.status_actor, self.rank, self.online, self.to_train = status_actor, rank, online, to_train
        self.last_step: Metrics = {}
        if rank == 0:
            self.file = open_appendable(run_dir / "metrics.jsonl")
        self.pending_answer: Any = None

    def phase(self, name: str, done: int = 0, total: int = 0) -> None:
        """Sets the current phase and its progress."""
        if self.rank == 0:
            self.status_actor.phase.remote(name, done, total)

    def note(self, text: str) -> None:
        """Logs a line and displays it."""
        if self.rank == 0:
            logger.info(text)
            self.status_actor.note.remote(text)

    def start(self, step: int, round: int = 0) -> None:
        """Drops recorded lines beyond ``step`` optimizer steps and ``round`` rounds: they will be written again."""
        if self.rank == 0:
            lines = read_jsonl(self.file) if step or round else []
            kept = [line for line in lines if line["step"] <= step and line.get("round", -1) < round]
            if self.file.exists():
                write_atomically(self.file, (json.dumps(line) + "\n" for line in kept))
            self.status_actor.resumed.remote({key: value for line in kept for key, value in line.items()})

    def step(self, metrics: Metrics) -> None:
        """Appends a line to metrics.jsonl and updates the status."""
        if self.rank == 0:
            self._append(self.last_step if self.online else metrics)
            self.last_step = metrics
            self.status_actor.step.remote(metrics)

    def round(self, metrics: Metrics) -> None:
        """Appends the line of a round's last step with the metrics of the round, and updates the status."""
        if self.rank == 0:
            self._append(self.last_step | metrics)
            self.last_step = {}
            self.status_actor.step.remote(metrics)

    def _append(self, metrics: Metrics) -> None:
        if metrics:
            with self.file.open("a", encoding="utf-8") as file:
                # JSON has no NaN and no infinity: both become null.
                nonfinite = {k: None for k, v in metrics.items() if isinstance(v, float) and not math.isfinite(v)}
                file.write(json.dumps(metrics | nonfinite) + "\n")

    def evaluation(self, metrics: Metrics) -> None:
        """Appends held-out metrics. With ``to_train`` a barrier: every rank reports them to Ray Train."""
        self.step(metrics)
        if self.to_train:
            ray.train.report(metrics)

    def stop_requested(self) -> bool:
        """The status actor's latest answer; never waits for it."""
        if self.rank != 0:
            return False
        if self.pending_answer is None:
            self.pending_answer = self.status_actor.stop_requested.remote()
        ready, _ = ray.wait([self.pending_answer], timeout=0)
        if not ready:
            return False
        self.pending_answer = None
        try:
            return ray.get(ready[0])
        except ray.exceptions.RayActorError:
            return False  # the driver is gone, and nobody is left to request a stop
