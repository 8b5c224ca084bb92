"""Replays of early stopping on made-up learning curves, against decisions taken by hand."""

import pytest

from benchmarks.early_stopping import Replay, replay
from dpo_ray.config import Config
from dpo_ray.sweep.trials import Objective, SweepDefinition, Trial
from dpo_ray.types import Metrics

METRIC = "eval/rewards/accuracies"
CURVES = {"good": {1: 0.9, 2: 0.9, 4: 0.9}, "bad": {1: 0.1, 2: 0.1, 4: 0.1}, "late": {1: 0.0, 2: 0.5, 4: 1.0}}
"""Metric by step; the rungs with ``reduction_factor: 2`` are 1 and 2, and trials end at 4."""


@pytest.mark.parametrize(
    ("use", "order", "outcome"),
    [
        # The second is below the median of both at rung 1: 4 + 1 of 8 steps.
        ("asha", ("good", "bad"), Replay(False, 5 / 8, 0.0)),
        # The first of a rung goes on, and the second is better.
        ("asha", ("bad", "good"), Replay(False, 1.0, 0.0)),
        # The best at the end is the worst at rung 1; 0.1 is lost.
        ("asha", ("good", "late"), Replay(True, 5 / 8, 0.1)),
        # Both wait at rung 1, whichever is first.
        ("halving", ("bad", "good"), Replay(False, 5 / 8, 0.0)),
        # Two of three continue from rung 1, one from rung 2: 1 + 2 + 4 of 12 steps.
        ("halving", ("late", "bad", "good"), Replay(True, 7 / 12, 0.1)),
    ],
)
def test_a_replay_ends_trials_as_the_scheduler_would(use: str, order: tuple[str, ...], outcome: Replay) -> None:
    config = Config.model_validate(
        {
            "model": {"path": "m"},
            "run": {"eval_every": 1},
            "sweep": {"scheduler": {"use": use, "args": {"reduction_factor": 2}}},
        }
    )
    definition = SweepDefinition(
        keys={}, objective=Objective(METRIC, "max", None), scheduler={}, search={}, samples=3, seed=0, time="step"
    )
    curves: dict[str, list[Metrics]] = {
        name: [{"step": step, METRIC: value} for step, value in CURVES[name].items()] for name in order
    }
    trials = [Trial(name, {}, "done", metrics=curves[name][-1]) for name in order]
    assert replay(config, definition, trials, curves) == pytest.approx(outcome)
