"""The outcome of a sweep: its best configuration, the certainty of its lead, and the others that are as good.

Two sources of noise can hide or fake a lead: the held-out set is a sample of examples, and a run depends on its seed.
The first is estimated by a bootstrap over examples, paired because all trials are evaluated on the same ones; the
second by the spread over seeds, where configurations were repeated.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dpo_ray.sweep.bootstrap import MIN_EXAMPLES, bootstrap_interval, seed_margin
from dpo_ray.sweep.held_out import HeldOut, Unit, mean_held_out, paired, read_held_out
from dpo_ray.sweep.ranking import Configuration, Ranking, configurations, rank
from dpo_ray.sweep.trials import Objective, Trial
from dpo_ray.types import is_number


@dataclass(frozen=True, slots=True)
class Lead:
    """The difference of the best configuration to another one; positive if the best one is better."""

    other: Configuration
    difference: float
    low: float | None = None
    high: float | None = None
    """95 % interval over held-out examples; None without results by example, and if these are too few."""
    examples: int = 0
    unit: Unit = "pairs"
    identical: bool = False
    """True if both have the same result on every example."""
    seed_margin: float | None = None
    """Half of the 95 % interval over seeds; None without repeats."""
    where: str = ""
    """The step (round) at which the two are compared, such as ``step 12``; empty for their ends."""

    @property
    def too_few(self) -> bool:
        """True if all of the held-out examples could favor the same trial by chance."""
        return self.low is None and self.examples > 0

    @property
    def exceeds_examples(self) -> bool | None:
        """True if the lead is larger than the noise of the held-out set; None if that is not known."""
        return None if self.low is None else self.low > 0

    @property
    def exceeds_seeds(self) -> bool | None:
        """True if the lead is larger than the noise of seeds; None if that is not known."""
        return None if self.seed_margin is None else self.difference > self.seed_margin

    @property
    def level(self) -> Literal["clear", "tie", "unknown"]:
        """clear: larger than every noise that is known. tie: within one of them. unknown: no noise is known."""
        known = [exceeds for exceeds in (self.exceeds_examples, self.exceeds_seeds) if exceeds is not None]
        if self.identical or not all(known):
            return "tie"
        return "clear" if known else "unknown"


@dataclass(frozen=True, slots=True)
class Verdict:
    """The outcome of a sweep in numbers."""

    objective: Objective
    ranking: Ranking
    configurations: tuple[Configuration, ...] = ()
    """Best first."""
    leads: tuple[Lead, ...] = ()
    """Leads of the best configuration over each comparable one, in the order of ``configurations``: over those that ran
    to the end as it did, or, if it did not, over those that stopped at the same step."""
    over_stopped: Lead | None = None
    """If only the best configuration ran to the end: its lead over the best stopped one, at the step where that one
    stopped."""
    keys: tuple[str, ...] = field(default=())
    """Swept keys that differ between trials, without the seed."""

    @property
    def best(self) -> Configuration | None:
        """The configuration to pick; None if no trial can win."""
        return self.configurations[0] if self.configurations else None

    @property
    def pick(self) -> Trial | None:
        """The trial of the best configuration with the best metric."""
        return self.best.trials[0] if self.best else None

    @property
    def ties(self) -> list[Configuration]:
        """Configurations whose difference to the best one is within the noise."""
        return [lead.other for lead in self.leads if lead.level == "tie"]


def build_verdict(trials: Sequence[Trial], objective: Objective, folder: Path) -> Verdict:
    """The verdict on the trials of a sweep.

    Args:
        folder: has the run directory of each trial, by its name.
    """
    ranking = rank(trials, objective)
    found = configurations(ranking.ranked, objective)
    keys = varying_keys([configuration.values for configuration in found])
    if not found:
        return Verdict(objective, ranking)
    best_finished, step = found[0].finished, _step(found[0])
    rivals = [c for c in found[1:] if c.finished or (not best_finished and _step(c) == step)]
    repeats = [c.metrics for c in (found[0], *rivals)]
    best = _held_out(found[0], objective, folder)
    leads = [
        _lead(found[0], other, best, _held_out(other, objective, folder), objective, seed_margin(repeats, 0, number))
        for number, other in enumerate(rivals, 1)
    ]
    over_stopped = _over_stopped(found[0], found[1:], objective, folder) if best_finished and not leads else None
    return Verdict(objective, ranking, tuple(found), tuple(leads), over_stopped, keys)


def _over_stopped(
    best: Configuration, others: Sequence[Configuration], objective: Objective, folder: Path
) -> Lead | None:
    """The lead over the first of ``others`` that was stopped, where it stopped; None without results by example."""
    stopped = next((c for c in others if {trial.status for trial in c.trials} == {"stopped"}), None)
    if stopped is None:
        return None
    at = stopped.trials[0].metrics
    read = partial(read_held_out, metric=objective.metric, step=at.get("step"), version=at.get("round"))
    of_best, of_stopped = (read(folder / c.trials[0].name) for c in (best, stopped))
    if of_best is None or of_stopped is None:
        return None
    best_then = replace(best, metrics=(float(of_best.values.mean()),))
    stopped_then = replace(stopped, metrics=(float(of_stopped.values.mean()),))
    where = f"round {at['round']}" if "round" in at else f"step {at.get('step')}"
    return replace(_lead(best_then, stopped_then, of_best, of_stopped, objective, None), other=stopped, where=where)


def _step(configuration: Configuration) -> Any:
    return configuration.trials[0].metrics.get("step")


def varying_keys(values: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Keys that do not have the same value everywhere; all keys if every configuration has the same values."""
    keys = dict.fromkeys(key for mapping in values for key in mapping)
    return tuple(key for key in keys if len({repr(mapping.get(key)) for mapping in values}) > 1) or tuple(keys)


def _held_out(configuration: Configuration, objective: Objective, folder: Path) -> HeldOut | None:
    """Values by example, as means over the repeats."""
    of_trials = [
        read_held_out(
            folder / trial.name, objective.metric, step=trial.metrics.get("step"), version=trial.metrics.get("round")
        )
        for trial in configuration.trials
    ]
    present = [values for values in of_trials if values is not None]
    return mean_held_out(present) if len(present) == len(of_trials) else None


def _lead(
    best: Configuration,
    other: Configuration,
    of_best: HeldOut | None,
    of_other: HeldOut | None,
    objective: Objective,
    margin: float | None,
) -> Lead:
    sign = 1.0 if objective.mode == "max" else -1.0
    lead = sign * (best.mean - other.mean)
    if of_best is None or of_other is None:
        return Lead(other, lead, identical=best.metrics == other.metrics and not margin, seed_margin=margin)
    first, second = paired(of_best, of_other)
    differences = sign * (first - second)
    if not len(differences) or not np.isfinite(differences).all():
        return Lead(other, lead, seed_margin=margin)
    low, high = bootstrap_interval(differences)
    significant = len(differences) >= MIN_EXAMPLES or low <= 0 <= high
    interval = (low, high) if significant else (None, None)
    identical = not differences.any()
    return Lead(other, lead, *interval, len(differences), of_best.examples, identical, margin)


@dataclass(frozen=True, slots=True)
class Region:
    """Configurations around the best one that are as good as it."""

    spans: Mapping[str, tuple[Any, ...]]
    """Values of each key that varies within the region, in order: of a number its lowest and highest."""
    fixed: Mapping[str, Any]
    """The other keys, with the value of the best configuration."""
    members: tuple[Configuration, ...]
    """Without the best one."""


def as_good_region(verdict: Verdict) -> Region | None:
    """The neighbors of the best configuration that are as good as it; None without any.

    Grows from the best configuration to the nearest tie (numbers compare by rank among the sampled values), as long as
    no configuration with a clear difference, and none that cannot win, lies within the spans.
    """
    best = verdict.best
    if best is None or not verdict.ties:
        return None
    center = best.values
    rivals = [c for c in verdict.configurations[1:] if c not in verdict.ties]
    worse = [c.values for c in rivals] + [trial.values for trial, _ in verdict.ranking.excluded]
    places = {key: _places([c.values[key] for c in verdict.configurations if key in c.values]) for key in verdict.keys}

    def distance(other: Configuration) -> float:
        steps = [_distance(places[key], center.get(key), other.values.get(key)) for key in verdict.keys]
        return math.hypot(*steps)

    members: list[Configuration] = []
    for tie in sorted(verdict.ties, key=distance):
        spans = _spans([best, *members, tie], verdict.keys)
        if not any(_within(values, spans) for values in worse):
            members.append(tie)
    if not members:
        return None
    spans = _spans([best, *members], verdict.keys)
    varying = {key: values for key, values in spans.items() if len(values) > 1}
    return Region(varying, {key: best.values.get(key) for key in spans if key not in varying}, tuple(members))


def _places(values: Sequence[Any]) -> dict[Any, int]:
    numbers = sorted({value for value in values if is_number(value)})
    return {value: place for place, value in enumerate(numbers)}


def _distance(places: Mapping[Any, int], one: Any, other: Any) -> float:
    """Steps between two numbers among the sampled ones, relative to all of them; 1 between different other values."""
    if is_number(one) and is_number(other):
        return abs(places[one] - places[other]) / max(1, len(places) - 1)
    return float(one != other)


def _spans(members: Sequence[Configuration], keys: Sequence[str]) -> dict[str, tuple[Any, ...]]:
    spans = {}
    for key in keys:
        values = [member.values.get(key) for member in members]
        if all(map(is_number, values)):
            spans[key] = tuple(dict.fromkeys((min(values), max(values))))  # type: ignore[type-var]
        else:
            spans[key] = tuple({repr(value): value for value in values}.values())
    return spans


def _within(values: Mapping[str, Any], spans: Mapping[str, tuple[Any, ...]]) -> bool:
    for key, span in spans.items():
        value = values.get(key)
        if all(map(is_number, (value, *span))):
            if not span[0] <= value <= span[-1]:  # type: ignore[operator]
                return False
        elif value not in span:
            return False
    return True
