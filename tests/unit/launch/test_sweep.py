"""Ranking of trials, and search spaces by name; without a cluster."""

import pytest

from dpo_ray.launch.sweep import load_sweep
from dpo_ray.report.figures import rank_trials


def test_trials_are_ranked_by_the_metric_then_by_the_held_out_loss() -> None:
    trials = [
        {"trial": "a", "accuracy": 0.5, "eval/loss": 0.9},
        {"trial": "b", "accuracy": 0.75, "eval/loss": 0.7},
        {"trial": "c", "accuracy": 0.75, "eval/loss": 0.6},
        {"trial": "failed", "eval/loss": 0.0},
        {"trial": "diverged", "accuracy": float("nan"), "eval/loss": 0.0},
    ]
    for mode, order in (("max", ["c", "b", "a"]), ("min", ["a", "c", "b"])):
        finished, failed = rank_trials(trials, "accuracy", mode)
        assert [trial["trial"] for trial in finished] == order
        assert [trial["trial"] for trial in failed] == ["failed", "diverged"]


def test_every_space_loads_and_an_unknown_one_is_rejected_with_the_known_names() -> None:
    assert "loss.beta" in load_sweep("beta_lr").space
    with pytest.raises(ValueError, match=r"beta_rl.*beta_lr"):
        load_sweep("beta_rl")
