"""The status actor of a run: holds a Status that the workers update and the driver displays."""

from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import RayError

from dpo_ray.launch.cluster import same_node
from dpo_ray.report.live.status import Status
from dpo_ray.types import Metrics

ANSWER_TIMEOUT_S = 30.0
"""Longest wait for an answer of the actor."""


class StatusActor:
    """Holds the latest Status and the requests that concern the whole run. Workers send updates without waiting.

    No run depends on it: Ray restarts it, empty.
    """

    def __init__(self) -> None:
        self.status = Status()
        self.fatal: str | None = None
        self.stopping = False
        self.stepped = False

    def report_fatal(self, error: str) -> None:
        """Records an error after which the workers must not be restarted; keeps the first one."""
        self.fatal = self.fatal or error

    def fatal_error(self) -> str | None:
        return self.fatal

    def phase(self, name: str, done: int, total: int) -> None:
        self.status = replace(self.status, phase=name, done=done, total=total)

    def note(self, text: str) -> None:
        """Adds a line for the person who started the run, unless it is a repetition."""
        if text not in self.status.notes:
            self.status = replace(self.status, notes=(*self.status.notes, text))

    def step(self, metrics: Metrics) -> None:
        """Adds the metrics of a step that the workers have taken since they started."""
        self.stepped = True
        self.metrics(metrics)

    def resumed(self, metrics: Metrics) -> None:
        """Adds the metrics up to the checkpoint from which the workers resume; no step is unsaved."""
        self.stepped = False
        self.metrics(metrics)

    def metrics(self, metrics: Metrics) -> None:
        merged = self.status.metrics | without_ties(metrics)
        last_round = merged.get("round")
        self.status = replace(self.status, metrics=merged, round=None if last_round is None else last_round + 1)

    def read(self) -> Status:
        return self.status

    def request_stop(self) -> bool:
        """Requests a stop at the next checkpoint; returns True if the workers have taken steps since they started."""
        self.stopping = True
        return self.stepped

    def stop_requested(self) -> bool:
        return self.stopping


def without_ties(metrics: Metrics) -> Metrics:
    """Metrics to display: without the accuracy of step 0, where all pairs tie because the policy is the reference."""
    hidden = "eval/rewards/accuracies" if metrics.get("step") == 0 else None
    return {key: value for key, value in metrics.items() if key != hidden}


def start_status_actor() -> Any:
    """A StatusActor on the driver's node, so that it survives the loss of any other node."""
    return ray.remote(num_cpus=0)(StatusActor).options(max_restarts=-1, scheduling_strategy=same_node()).remote()


def ask_status(status_actor: Any, method: str, *arguments: Any) -> Any:
    """The answer of a method of a StatusActor; None if the actor is gone or hangs."""
    try:
        return ray.get(getattr(status_actor, method).remote(*arguments), timeout=ANSWER_TIMEOUT_S)
    except RayError:
        return None
