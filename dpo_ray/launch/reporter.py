"""The reporters of the training loops: metrics.jsonl, and the status actor or the mailbox of a sweep."""

import json
import logging
from pathlib import Path
from typing import Any

import ray

from dpo_ray.launch.sweeps.mailbox import Channel
from dpo_ray.storage import open_appendable, read_jsonl, write_atomically
from dpo_ray.sweep.scheduling import Decision
from dpo_ray.types import Metrics, finite_or_none

logger = logging.getLogger(__name__)


class RunReporter:
    """Implements ``train.reporter.Reporter`` for one rank; only rank 0 writes files and updates the status.

    Args:
        online: steps end rounds, whose metrics belong to the line of the last step: each line waits for the next call.
    """

    def __init__(self, run_dir: Path, status_actor: Any, rank: int, *, online: bool = False) -> None:
        self.status_actor, self.rank, self.online = status_actor, rank, online
        self.last_step: Metrics = {}
        if rank == 0:
            self.file = open_appendable(run_dir / "metrics.jsonl")
        self.pending_answer: Any = None

    def phase(self, name: str, done: int = 0, total: int = 0) -> None:
        """Sets the current phase and its progress."""
        if self.rank == 0:
            self._update_status("phase", name, done, total)

    def note(self, text: str) -> None:
        """Logs a line and displays it."""
        if self.rank == 0:
            logger.info(text)
            self._update_status("note", text)

    def start(self, step: int, round: int = 0) -> None:
        """Drops recorded lines beyond ``step`` optimizer steps and ``round`` rounds: they will be written again."""
        if self.rank == 0:
            lines = read_jsonl(self.file) if step or round else []
            kept = [line for line in lines if line["step"] <= step and line.get("round", -1) < round]
            if self.file.exists():
                write_atomically(self.file, (json.dumps(line) + "\n" for line in kept))
            self._update_status("resumed", {key: value for line in kept for key, value in line.items()})

    def step(self, metrics: Metrics) -> None:
        """Appends a line to metrics.jsonl and updates the status."""
        if self.rank == 0:
            self._append(self.last_step if self.online else metrics)
            self.last_step = metrics
            self._update_status("step", metrics)

    def round(self, metrics: Metrics) -> None:
        """Appends the line of a round's last step with the metrics of the round, and updates the status."""
        if self.rank == 0:
            self._append(self.last_step | metrics)
            self.last_step = {}
            self._update_status("step", metrics)

    def _append(self, metrics: Metrics) -> None:
        if metrics:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(finite_or_none(metrics)) + "\n")

    def evaluation(self, metrics: Metrics) -> None:
        """Appends held-out metrics."""
        self.step(metrics)

    def round_evaluation(self, round: int, metrics: Metrics) -> None:
        """An evaluation by the engines, after ``round`` rounds; its metrics reach a later line of metrics.jsonl."""

    def _update_status(self, method: str, *arguments: Any) -> None:
        """Updates the status without waiting."""
        getattr(self.status_actor, method).remote(*arguments)

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
            return False  # it restarts, or the driver is gone and nobody is left to request a stop


class TrialReporter(RunReporter):
    """Reports a trial of a sweep: its evaluations are answered by the scheduler's decision.

    Args:
        rounds: length of the trial; online only.
    """

    def __init__(self, run_dir: Path, channel: Channel, trial: str, rank: int, *, rounds: int | None = None) -> None:
        super().__init__(run_dir, None, rank, online=rounds is not None)
        self.channel, self.trial, self.rounds = channel, trial, rounds
        self.position = (0, 0)
        """Steps taken, and those of the whole trial."""
        self.decision: Decision = "continue"
        self.steps = 0
        """Steps taken."""

    def start(self, step: int, round: int = 0) -> None:
        """Drops recorded lines as for any run; the time of the trial counts from here."""
        super().start(step, round)
        self.steps = step
        if self.rank == 0:
            self.channel.ask("begun", self.trial)

    def step(self, metrics: Metrics) -> None:
        """Appends a line to metrics.jsonl."""
        self.steps = metrics.get("step", self.steps)
        super().step(metrics)

    def phase(self, name: str, done: int = 0, total: int = 0) -> None:
        """Sets the current phase and its progress."""
        self.position = (done, total)
        super().phase(name, done, total)

    def evaluation(self, metrics: Metrics) -> None:
        """Appends held-out metrics, and asks for the decision of the scheduler."""
        super().evaluation(metrics)
        done, total = self.position
        self._report(metrics, final=done == total)

    def round_evaluation(self, round: int, metrics: Metrics) -> None:
        """Asks for the decision of the scheduler."""
        self._report({"step": self.steps, "round": round, **metrics}, final=round == self.rounds)

    def stop_requested(self) -> bool:
        """True if the scheduler has stopped or paused the trial."""
        return self.decision != "continue"

    def _report(self, metrics: Metrics, *, final: bool) -> None:
        if self.rank == 0 and self.decision == "continue":
            self.decision = self.channel.report(self.trial, metrics, final=final)

    def _update_status(self, method: str, *arguments: Any) -> None:
        """A trial has no status: the sweep displays its evaluations."""
