"""Ranking of trials, and search spaces by name; without a cluster."""

import pytest

from dpo_ray.launch.sweep import Sweep, Trial, load_sweep, rank


def test_trials_are_ranked_by_the_metric_then_by_the_held_out_loss() -> None:
    def trial(name: str, accuracy: float | None, loss: float) -> Trial:
        return Trial(name, {}, {"accuracy": accuracy, "eval/loss": loss})

    trials = [trial("a", 0.5, 0.9), trial("b", 0.75, 0.7), trial("c", 0.75, 0.6), trial("failed", None, 0.0)]
    assert [t.name for t in rank(trials, Sweep({}, metric="accuracy"))] == ["c", "b", "a"]
    assert [t.name for t in rank(trials, Sweep({}, metric="accuracy", mode="min"))] == ["a", "c", "b"]


def test_every_space_loads_and_an_unknown_one_is_rejected_with_the_known_names() -> None:
    assert "loss.beta" in load_sweep("beta_lr").space
    with pytest.raises(ValueError, match=r"beta_rl.*beta_lr"):
        load_sweep("beta_rl")
