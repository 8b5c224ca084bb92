"""A sweep as its report needs it: trials, verdict, and learning curves from the folders of the trials."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dpo_ray.report.record import Curve
from dpo_ray.report.sweep_text import DISTANCES
from dpo_ray.storage import read_jsonl
from dpo_ray.sweep.held_out import SCORE, evaluation_files
from dpo_ray.sweep.ranking import TIE_BREAK
from dpo_ray.sweep.trials import Objective, Trial
from dpo_ray.sweep.verdict import Verdict, build_verdict, varying_keys
from dpo_ray.types import finite_float

TRIALS = "trials"
"""Folder with the run directory of each trial."""
ACCURACY = "eval/rewards/accuracies"


@dataclass(frozen=True, slots=True)
class SweepRecord:
    """A finished or running sweep."""

    path: Path
    trials: tuple[Trial, ...]
    objective: Objective
    verdict: Verdict
    curves: Mapping[str, Curve]
    """The objective's metric over steps, or over rounds online, by trial; without trials that have no value."""
    unit: str
    """``optimizer step`` or ``round``."""

    @property
    def keys(self) -> tuple[str, ...]:
        """Swept keys that differ between trials."""
        return varying_keys([trial.values for trial in self.trials])

    @property
    def ranked(self) -> tuple[Trial, ...]:
        """Trials that can win, best first."""
        return self.verdict.ranking.ranked

    @property
    def distance(self) -> str | None:
        """The metric of the distance from the reference that the trials have."""
        measured = [m for m in DISTANCES if any(finite_float(t.metrics.get(m)) is not None for t in self.ranked)]
        return next((metric for metric in measured if metric != self.objective.metric), None)

    @property
    def metrics(self) -> list[str]:
        """Metrics to list of every trial: the objective's, the constraint's, the distance, and the tie break."""
        constraint = self.objective.constraint
        names = [self.objective.metric, constraint.metric if constraint else None, self.distance, TIE_BREAK]
        present = {metric for trial in self.trials for metric in trial.metrics}
        return [name for name in dict.fromkeys(names) if name is not None and name in present]


def read_sweep(run_dir: Path, trials: Sequence[Trial], objective: Objective) -> SweepRecord:
    """Reads the held-out results and the learning curves of the trials of a sweep."""
    folder = run_dir / TRIALS
    online = any(trial.metrics.get("round") is not None for trial in trials)
    axis = "round" if online else "step"
    curves = {trial.name: _curve(folder / trial.name, objective.metric, axis) for trial in trials}
    return SweepRecord(
        run_dir,
        tuple(trials),
        objective,
        build_verdict(trials, objective, folder),
        {name: curve for name, curve in curves.items() if len(curve[0])},
        "round" if online else "optimizer step",
    )


def _curve(run_dir: Path, metric: str, axis: str) -> Curve:
    """A metric over steps or rounds; of several lines at one position the last counts."""
    if metric == SCORE:
        return _score_curve(run_dir)
    points = {
        line[axis]: value
        for line in read_jsonl(run_dir / "metrics.jsonl")
        if isinstance(line.get(axis), int) and (value := finite_float(line.get(metric))) is not None
    }
    if metric == ACCURACY and points.get(0) == 0.0:
        del points[0]  # every pair ties while the policy equals its reference
    places = sorted(points)
    return np.array(places, dtype=float), np.array([points[place] for place in places], dtype=float)


def _score_curve(run_dir: Path) -> Curve:
    """Mean score of the held-out prompts over the versions of the policy, which count finished rounds."""
    means = {}
    for version, file in evaluation_files(run_dir).items():
        scores = [score for line in read_jsonl(file) if (score := finite_float(line.get("score"))) is not None]
        if scores:
            means[version] = float(np.mean(scores))
    return np.array(list(means), dtype=float), np.array(list(means.values()), dtype=float)
