"""The course of a sweep: which trial runs, stops, pauses or is cloned, and the state of all of them.

A state machine that is driven by calls, without clocks, threads or processes. Each call is an event: it is journaled
and applied, and a killed sweep is continued by applying the journal.
"""

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from dpo_ray.sweep.journal import Event, Journal
from dpo_ray.sweep.ranking import TIE_BREAK
from dpo_ray.sweep.scheduling import Decision, Scheduler, Searcher, Update
from dpo_ray.sweep.trials import ENDED, Objective, Trial, TrialStatus
from dpo_ray.types import Metrics

logger = logging.getLogger(__name__)

Phase = Literal["waiting", "running", "pausing", "paused", "done", "stopped", "failed"]
"""``waiting``: ready for a slot. ``pausing``: saves its state. ``paused``: waits for the scheduler."""
STATUS: Mapping[Phase, TrialStatus] = {"pausing": "running", "paused": "waiting"}
Clone = Callable[[str, str], int]
"""Copies the newest checkpoint of a donor to a trial; returns the step of it. (trial, donor)"""


@dataclass(slots=True)
class Progress:
    """The state of one trial."""

    name: str
    values: Mapping[str, Any]
    phase: Phase = "waiting"
    metrics: Metrics = field(default_factory=dict)
    decisions: dict[int, Decision] = field(default_factory=dict)
    """Decision of each evaluation, by step or round."""
    started: float | None = None
    begun: bool = False
    """True once it is loaded on its slot."""
    last: float = 0.0
    """Times at which it began on its slot and of its latest event."""
    seconds: float = 0.0
    """Time on slots before ``started``."""
    error: str | None = None
    origin: str | None = None
    pending: Update | None = None
    """A clone whose checkpoint has not been copied."""
    interrupted: bool = False
    """True if it lost its slot while it ran, and the scheduler does not know."""
    deaths: int = 0
    """Workers lost since the sweep was started or resumed."""

    @property
    def trial(self) -> Trial:
        """The record of it."""
        status: Any = STATUS.get(self.phase, self.phase)
        on_slot = 0.0 if self.started is None else self.last - self.started
        seconds = self.seconds + on_slot
        since = self.last if self.begun else None
        return Trial(self.name, self.values, status, self.metrics, seconds, self.error, self.origin, since)

    def leave_slot(self, phase: Phase, at: float) -> None:
        """Ends its time on a slot."""
        if self.started is not None:
            self.seconds += at - self.started
        self.phase, self.started, self.begun, self.last = phase, None, False, at


class Conductor:
    """Runs a sweep's searcher and scheduler.

    Args:
        samples: number of trials.
        time: ``step`` or ``round``, the metric that counts progress.
        max_deaths: workers that a trial may lose before it fails.
        clone: copies a checkpoint; called while donor and trial are paused.
        saved: position of the newest checkpoint of a trial, -1 without one.
    """

    def __init__(
        self,
        journal: Journal,
        searcher: Searcher,
        scheduler: Scheduler,
        objective: Objective,
        *,
        samples: int,
        time: Literal["step", "round"],
        max_deaths: int,
        clone: Clone,
        saved: Callable[[str], int],
    ) -> None:
        self.journal, self.searcher, self.scheduler, self.objective = journal, searcher, scheduler, objective
        self.samples, self.time, self.max_deaths = samples, time, max_deaths
        self.clone, self.saved = clone, saved
        self.progress: dict[str, Progress] = {}
        self.exhausted = False
        """True if the searcher has no more values."""
        self.news = True
        """True if something has happened since the searcher had no values for now."""

    @property
    def trials(self) -> list[Trial]:
        """All trials, oldest first."""
        return [progress.trial for progress in self.progress.values()]

    @property
    def finished(self) -> bool:
        """True if every trial has ended and no more are to come."""
        return self.open == 0

    @property
    def open(self) -> int:
        """Trials that have not ended, with those to come: the slots that are of use."""
        to_come = self.samples - len(self.progress) if self._may_add() else 0
        return to_come + sum(progress.phase not in ENDED for progress in self.progress.values())

    def resume(self) -> bool:
        """Applies the journal; returns False if it is empty. Trials that were running wait for a slot."""
        events = self.journal.read()
        for event in events:
            if event["event"] == "add":
                suggested = self.searcher.suggest(event["trial"])
                if suggested is None or dict(suggested) != event["values"]:
                    logger.warning("the searcher does not repeat the values of %s; they stay", event["trial"])
            self._apply(event)
        for progress in self.progress.values():
            if progress.phase in ("running", "pausing") and not self._pause_if_saved(progress):
                progress.leave_slot("waiting", progress.last)
                progress.interrupted = True
        self._copy_clones()
        return bool(events)

    def next(self) -> Progress | None:
        """The trial for a free slot, which counts as running; None if there is none (yet)."""
        if self.scheduler.whole_population:
            while self._add():
                pass
            if self._may_add():
                raise ValueError(
                    f"the scheduler starts all {self.samples} trials together, and the searcher has no values after "
                    f"{len(self.progress)} until one of them ends; leave its limit of concurrent trials out"
                )
        interrupted = [progress.name for progress in self._in("waiting") if progress.interrupted]
        ready = [progress.name for progress in self._in("waiting")]
        name = interrupted[0] if interrupted else self.scheduler.choose(ready)
        if name is None and (added := self._add()):
            name = self.scheduler.choose([*ready, added])
        if name is None and not self._in("running") and not self._in("pausing"):
            # A scheduler that waits for results of trials that are all paused would wait without end.
            left = self._in("waiting") or self._in("paused")
            name = left[0].name if left else None
        if name is None:
            return None
        self._record({"event": "start", "trial": name})
        return self.progress[name]

    def begin(self, trial: str) -> None:
        """A running trial is loaded; its time counts from here: the first one on a slot loads for all that follow."""
        if self.progress[trial].phase == "running":
            self._record({"event": "begin", "trial": trial})

    def report(self, trial: str, metrics: Metrics, *, final: bool) -> Decision:
        """Takes an evaluation of a running trial; returns what the trial does next.

        An evaluation that is known, of a trial that continued from an earlier checkpoint, gets the same answer again.
        """
        progress, position = self.progress[trial], metrics[self.time]
        if progress.phase != "running":
            return "stop"
        if (known := progress.decisions.get(position)) is not None:
            if known == "pause":
                progress.phase = "pausing"
            return known
        for name, value in self._compared(metrics):
            if isinstance(value, float) and not math.isfinite(value):
                error = f"{name} is {value} after {self.time} {position}"
                self._record({"event": "fail", "trial": trial, "error": error})
                return "stop"
        event = "finish" if final else "report"
        self._record({"event": event, "trial": trial, "metrics": metrics})
        return progress.decisions[position]

    def _compared(self, metrics: Metrics) -> list[tuple[str, Any]]:
        """The metrics that order or exclude trials: an accuracy is finite also if all margins are NaN."""
        constraint = self.objective.constraint
        names = (self.objective.metric, TIE_BREAK, *([constraint.metric] if constraint else ()))
        return [(name, metrics[name]) for name in names if name in metrics]

    def finished_trial(self, trial: str) -> None:
        """A trial has run to its end, perhaps without a last evaluation."""
        progress = self.progress[trial]
        if progress.phase == "running" and progress.metrics:
            self._record({"event": "finish", "trial": trial, "metrics": progress.metrics})
        elif progress.phase == "running":
            self._record({"event": "fail", "trial": trial, "error": "it ended without an evaluation"})

    def paused(self, trial: str) -> None:
        """A trial that was asked to pause has saved its state and left its slot."""
        if self.progress[trial].phase == "pausing":
            self._record({"event": "pause", "trial": trial})

    def failed(self, trial: str, error: str, *, retryable: bool = False) -> None:
        """A trial failed; with ``retryable`` it continues from its checkpoint, up to ``max_deaths`` times."""
        progress = self.progress[trial]
        if progress.phase in ENDED:
            return
        progress.deaths += 1
        if self._pause_if_saved(progress):
            return
        if retryable and progress.deaths <= self.max_deaths:
            logger.warning("%s: %s; it continues from its newest checkpoint", trial, error)
            progress.leave_slot("waiting", time.time())
            progress.interrupted = True
            return
        self._record({"event": "fail", "trial": trial, "error": error})

    def _pause_if_saved(self, progress: Progress) -> bool:
        """Pauses a trial that lost its slot after it had saved its state for that; returns False for any other."""
        if progress.phase != "pausing" or self.saved(progress.name) != progress.metrics[self.time]:
            return False
        self._record({"event": "pause", "trial": progress.name})
        return True

    # ------------------------------------------------------------------------------------------------------- events

    def _record(self, event: Event) -> None:
        event["at"], self.news = round(time.time(), 3), True
        # Applied first: an event that raises must not be in the journal. What a kill in between loses is repeated.
        self._apply(event)
        self.journal.append(event)
        self._copy_clones()

    def _apply(self, event: Event) -> None:
        name, at = event["trial"], event["at"]
        match event["event"]:
            case "add":
                self.scheduler.add(name, event["values"])
                self.progress[name] = Progress(name, event["values"], last=at)
                return
            case "start":
                self._apply_start(self.progress[name], at)
            case "begin":
                progress = self.progress[name]
                if not progress.begun:  # else its workers were restarted on the slot
                    progress.begun, progress.started, progress.last = True, at, at
            case "report":
                self._apply_report(self.progress[name], event, at)
            case "finish":
                progress = self.progress[name]
                progress.metrics, progress.last = event["metrics"], at
                progress.decisions[event["metrics"][self.time]] = "continue"
                self._end(progress, "done", at)
            case "pause":
                progress = self.progress[name]
                progress.leave_slot("paused", at)
                # Over: it gets another answer if it continues from an earlier checkpoint later.
                progress.decisions[progress.metrics[self.time]] = "continue"
                self.scheduler.paused(name)
            case "cloned":
                progress = self.progress[name]
                progress.origin, progress.pending, progress.phase = event["origin"], None, "waiting"
                progress.decisions = {at: d for at, d in progress.decisions.items() if at <= event["position"]}
            case "fail":
                progress = self.progress[name]
                progress.error = event["error"]
                self._end(progress, "failed", at)
        self._apply_updates(at)

    def _apply_start(self, progress: Progress, at: float) -> None:
        if progress.started is not None:  # it was running when the sweep was killed
            progress.leave_slot("waiting", progress.last)
        progress.phase, progress.started, progress.last, progress.interrupted = "running", at, at, False
        self.scheduler.started(progress.name)

    def _apply_report(self, progress: Progress, event: Event, at: float) -> None:
        metrics = event["metrics"]
        progress.metrics, progress.last = metrics, at
        decided = self.scheduler.report(progress.name, metrics)
        decision: Decision = event.setdefault("decision", decided)
        if decision != decided:
            where = f"after {self.time} {metrics[self.time]}"
            logger.warning("the scheduler would %s %s %s; the earlier decision stays", decided, progress.name, where)
            if decision == "stop":
                self.scheduler.ended(progress.name, metrics, failed=False)
        progress.decisions[metrics[self.time]] = decision
        if decision == "stop":
            progress.leave_slot("stopped", at)
            self.searcher.ended(progress.name, metrics, failed=False)
            return
        self.searcher.report(progress.name, metrics)
        if decision == "pause":
            progress.phase = "pausing"

    def _end(self, progress: Progress, phase: Literal["done", "failed"], at: float) -> None:
        progress.leave_slot(phase, at)
        failed = phase == "failed"
        self.scheduler.ended(progress.name, progress.metrics, failed=failed)
        self.searcher.ended(progress.name, progress.metrics, failed=failed)

    def _apply_updates(self, at: float) -> None:
        for update in self.scheduler.updates():
            progress = self.progress[update.trial]
            progress.last = at
            if update.action == "stop":
                progress.leave_slot("stopped", at)  # it may still be saving
                self.searcher.ended(progress.name, progress.metrics, failed=False)
            elif update.action == "resume":
                progress.phase = "waiting"
            else:
                assert update.values is not None
                progress.pending, progress.values = update, update.values

    def _copy_clones(self) -> None:
        """Copies the checkpoints of clones before any trial continues, so that all donors still have theirs."""
        for progress in self.progress.values():
            if progress.pending is not None:
                donor = progress.pending.donor
                step = self.clone(progress.name, donor)
                event = {"event": "cloned", "trial": progress.name, "origin": f"{donor}@{step}", "position": step}
                self._record(event)

    # ---------------------------------------------------------------------------------------------------- new trials

    def _add(self) -> str | None:
        """Adds the next trial; None if there are enough."""
        if not self._may_add() or not self.news:
            return None
        name = f"{len(self.progress):05d}"
        values = self.searcher.suggest(name)
        if values is None:
            # A searcher that waits for results of trials when none runs would wait without end.
            self.exhausted = self.searcher.exhausted or all(p.phase in ENDED for p in self.progress.values())
            self.news = False
            return None
        # Suggested before it is applied, since a journaled trial is suggested again when the journal is applied.
        event = {"event": "add", "trial": name, "values": dict(values), "at": round(time.time(), 3)}
        self._apply(event)
        self.journal.append(event)
        return name

    def _may_add(self) -> bool:
        return len(self.progress) < self.samples and not self.exhausted

    def _in(self, phase: Phase) -> Sequence[Progress]:
        return [progress for progress in self.progress.values() if progress.phase == phase]
