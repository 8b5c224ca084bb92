"""Synchronous successive halving (arXiv:1502.07943).

All trials train to the first rung and pause. The best of them continue to the next rung, the others stop, and so on.
On a small held-out set the metrics of many trials are equal: those that tie with the last one that continues then
continue, too. Trials that violate the constraint stop, unless all do: then the first of them continue. Decisions depend
on the results at a rung only, not on the order in which they arrived.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from dpo_ray.sweep.ranking import Preference, preference
from dpo_ray.sweep.scheduling import Decision, Update
from dpo_ray.sweep.trials import Objective
from dpo_ray.types import Metrics


class Halving:
    """The scheduler ``halving``.

    Args:
        rungs: positions, in ``time``.
        reduction_factor: 1 / ``reduction_factor`` of the trials at a rung continue, rounded up.
        keep_ties: those that tie with the last of these continue, too; else of equal ones the first.
        time: ``step`` or ``round``.
    """

    whole_population = True
    pauses = True

    def __init__(
        self, objective: Objective, *, rungs: Collection[int], reduction_factor: int, keep_ties: bool, time: str
    ) -> None:
        self.objective, self.rungs, self.factor, self.time = objective, frozenset(rungs), reduction_factor, time
        self.keep_ties = keep_ties
        self.open: set[str] = set()
        """Trials that have not ended."""
        self.preferences: dict[str, Preference] = {}
        """Preference of each trial by its latest evaluation."""
        self.waiting: set[str] = set()
        """Paused trials."""
        self.decided: list[Update] = []

    def add(self, trial: str, values: Mapping[str, Any]) -> None:
        self.open.add(trial)

    def started(self, trial: str) -> None: ...

    def report(self, trial: str, metrics: Metrics) -> Decision:
        self.preferences[trial] = preference(metrics, self.objective)
        return "pause" if metrics[self.time] in self.rungs and len(self.open) > 1 else "continue"

    def paused(self, trial: str) -> None:
        self.waiting.add(trial)
        self._maybe_halve()

    def ended(self, trial: str, metrics: Metrics, *, failed: bool) -> None:
        self.open.discard(trial)
        self._maybe_halve()

    def updates(self) -> list[Update]:
        decided, self.decided = self.decided, []
        return decided

    def choose(self, ready: Sequence[str]) -> str | None:
        return ready[0] if ready else None

    def _maybe_halve(self) -> None:
        """Decides once all trials that have not ended wait at a rung."""
        if not self.waiting or self.waiting < self.open:
            return
        ranked = sorted(self.waiting, key=lambda trial: (self.preferences[trial], trial))
        best = ranked[: math.ceil(len(ranked) / self.factor)]
        last = self.preferences[best[-1]]
        kept = [trial for trial in ranked if self.preferences[trial] <= last] if self.keep_ties else best
        self.open = {trial for trial in kept if not self.preferences[trial][0]} or set(best)
        self.decided += [Update(trial, "resume" if trial in self.open else "stop") for trial in ranked]
        self.waiting = set()
