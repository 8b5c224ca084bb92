"""The order of a sweep's trials, and configurations that ran with several seeds."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any, NamedTuple

from dpo_ray.sweep.trials import STEP, Objective, Trial
from dpo_ray.types import Metrics, finite_float

SEED_KEY = "run.seed"
"""Trials that differ in nothing else are repeats of one configuration."""
TIE_BREAK = "eval/loss"
"""Orders trials of equal metric, smaller is better: accuracies on few held-out pairs are often equal."""


Preference = tuple[bool, float]
"""Sort key of an evaluation, best first."""


class Excluded(NamedTuple):
    """A trial that cannot win."""

    trial: Trial
    reason: str
    """A predicate, such as ``failed`` or ``has no eval/loss``."""


@dataclass(frozen=True, slots=True)
class Ranking:
    """Trials from best to worst, and those that cannot win."""

    ranked: tuple[Trial, ...]
    excluded: tuple[Excluded, ...]


def rank(trials: Sequence[Trial], objective: Objective) -> Ranking:
    """Orders trials by the objective.

    Failed trials, trials without a finite metric and those that violate the constraint cannot win. Finished trials
    come before those that run or were stopped early, which are ordered by step: metrics of different steps are not
    compared.
    """
    excluded = [Excluded(trial, reason) for trial in trials if (reason := exclusion(trial, objective))]
    names = {trial.name for trial, _ in excluded}
    ranked = sorted(
        (trial for trial in trials if trial.name not in names),
        key=lambda trial: (_progress_key(trial), preference(trial.metrics, objective), _tie_break(trial.metrics)),
    )
    return Ranking(tuple(ranked), tuple(excluded))


def exclusion(trial: Trial, objective: Objective) -> str | None:
    """The reason for which a trial cannot win; None if it can."""
    return "failed" if trial.status == "failed" else _exclusion_by(trial.metrics, objective)


def preference(metrics: Metrics, objective: Objective) -> Preference:
    """Orders evaluations by the objective; equal for those that tie. Those that cannot win come last."""
    if _exclusion_by(metrics, objective):
        return True, math.inf
    value = metrics[objective.metric]
    return False, -value if objective.mode == "max" else value


def _tie_break(metrics: Metrics) -> float:
    value = finite_float(metrics.get(TIE_BREAK))
    return math.inf if value is None else value


def _progress_key(trial: Trial) -> float:
    """Sort key: finished trials first, then by the step of the last evaluation, latest first."""
    return -math.inf if trial.status == "done" else -(finite_float(trial.metrics.get(STEP)) or 0.0)


def _exclusion_by(metrics: Metrics, objective: Objective) -> str | None:
    constraint = objective.constraint
    for metric in (objective.metric, *([constraint.metric] if constraint else ())):
        if metric not in metrics:
            return f"has no {metric}" if metrics else "has no evaluation"
        if finite_float(metrics[metric]) is None:
            return f"has a non-finite {metric}"
    if constraint and metrics[constraint.metric] > constraint.max:
        return f"exceeds {constraint.metric} ≤ {constraint.max:g}"
    return None


@dataclass(frozen=True, slots=True)
class Configuration:
    """Ranked trials with the same values, except for the seed."""

    values: Mapping[str, Any]
    """Swept keys without SEED_KEY."""
    trials: tuple[Trial, ...]
    """Its repeats that came furthest, best first: those that ran to the end, if any did."""
    metrics: tuple[float, ...]
    """The objective's metric of each of them."""
    behind: tuple[Trial, ...] = ()
    """Repeats that were stopped or are at an earlier step: their metrics are not compared."""

    @property
    def mean(self) -> float:
        """Mean of the metric over repeats."""
        return fmean(self.metrics)

    @property
    def deviation(self) -> float | None:
        """Standard deviation of the metric over repeats; None for a single one."""
        return stdev(self.metrics) if len(self.metrics) > 1 else None

    @property
    def finished(self) -> bool:
        """True if a repeat ran to the end."""
        return self.trials[0].status == "done"


def configurations(ranked: Sequence[Trial], objective: Objective) -> list[Configuration]:
    """The configurations of ranked trials, best mean first; finished ones before others.

    Trials that are equal in every key, also the seed, are no repeats: they stay configurations of their own.
    """
    groups: dict[tuple[str, int], list[Trial]] = {}
    seen: dict[str, int] = {}
    for trial in ranked:
        values = _key(trial.values)
        copy = seen[values] = seen.get(values, -1) + 1
        groups.setdefault((_key(_without_seed(trial.values)), copy), []).append(trial)
    found = [_configuration(group, objective) for group in groups.values()]
    order = {trial.name: place for place, trial in enumerate(ranked)}
    sign = -1 if objective.mode == "max" else 1
    return sorted(found, key=lambda c: (not c.finished, sign * c.mean * c.finished, order[c.trials[0].name]))


def _configuration(repeats: Sequence[Trial], objective: Objective) -> Configuration:
    """The configuration of ranked repeats."""
    furthest = [trial for trial in repeats if _progress_key(trial) == _progress_key(repeats[0])]
    metrics = tuple(float(trial.metrics[objective.metric]) for trial in furthest)
    return Configuration(
        _without_seed(repeats[0].values), tuple(furthest), metrics, behind=tuple(repeats[len(furthest) :])
    )


def _without_seed(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key != SEED_KEY}


def _key(values: Mapping[str, Any]) -> str:
    return json.dumps(values, sort_keys=True, default=str)
