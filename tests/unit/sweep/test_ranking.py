"""Order, exclusions and repeats of trials."""

import math
from dataclasses import replace

from dpo_ray.sweep.ranking import configurations, rank
from dpo_ray.sweep.trials import Constraint, Objective, Trial


def trial(name: str, metric: float | None = None, *, status: str = "done", loss: float = 1.0, **values: float) -> Trial:
    metrics = {} if metric is None else {"step": 4, "accuracy": metric, "eval/loss": loss}
    return Trial(name, values, status, metrics)  # type: ignore[arg-type]


def test_trials_that_cannot_win_are_excluded_with_the_reason() -> None:
    objective = Objective("accuracy", constraint=Constraint("kl", 10.0))
    trials = [
        replace(trial("good", 0.5), metrics={"accuracy": 0.5, "kl": 10.0}),
        replace(trial("far", 0.9), metrics={"accuracy": 0.9, "kl": 10.5}),
        replace(trial("no-kl", 0.9), metrics={"accuracy": 0.9}),
        replace(trial("nan", 0.9), metrics={"accuracy": math.nan, "kl": 1.0}),
        replace(trial("null", 0.9), metrics={"accuracy": None, "kl": 1.0}),
        replace(trial("other", 0.9), metrics={"kl": 1.0}),
        trial("failed", 0.9, status="failed"),
        trial("waiting", status="waiting"),
    ]
    ranking = rank(trials, objective)
    assert [t.name for t in ranking.ranked] == ["good"]
    assert {t.name: reason for t, reason in ranking.excluded} == {
        "far": "exceeds kl ≤ 10",
        "no-kl": "has no kl",
        "nan": "has a non-finite accuracy",
        "null": "has a non-finite accuracy",
        "other": "has no accuracy",
        "failed": "failed",
        "waiting": "has no evaluation",
    }


def test_equal_metrics_are_ordered_by_the_held_out_loss_and_finished_trials_come_first() -> None:
    trials = [
        trial("worse", 0.5, loss=0.1),
        trial("tie", 0.75, loss=0.7),
        trial("best", 0.75, loss=0.6),
        replace(trial("stopped", 0.9, status="stopped"), metrics={"accuracy": 0.9, "step": 4}),
        replace(trial("earlier", 0.95, status="stopped"), metrics={"accuracy": 0.95, "step": 2}),
        trial("running", 0.8, status="running"),
    ]
    ranked = rank(trials, Objective("accuracy")).ranked
    assert [t.name for t in ranked] == ["best", "tie", "worse", "stopped", "running", "earlier"]
    assert rank(trials, Objective("accuracy", "min")).ranked[0].name == "worse"


def test_trials_that_differ_in_the_seed_only_are_one_configuration_with_mean_and_deviation() -> None:
    trials = [
        trial("a0", 0.6, beta=0.1, **{"run.seed": 0}),
        trial("b0", 0.7, beta=0.2, **{"run.seed": 0}),
        trial("a1", 0.8, beta=0.1, **{"run.seed": 1}),
        trial("b1", 0.5, beta=0.2, **{"run.seed": 1}),
    ]
    objective = Objective("accuracy")
    first, second = configurations(rank(trials, objective).ranked, objective)
    assert (first.values, [t.name for t in first.trials]) == ({"beta": 0.1}, ["a1", "a0"])
    assert first.mean == 0.7
    assert abs((first.deviation or 0) - 0.02**0.5) < 1e-12
    assert second.mean == 0.6


def test_identical_trials_are_not_repeats() -> None:
    trials = [trial("a", 0.6, beta=0.1), trial("b", 0.6, beta=0.1)]
    found = configurations(rank(trials, Objective("accuracy")).ranked, Objective("accuracy"))
    assert [c.deviation for c in found] == [None, None]


def test_repeats_that_were_stopped_are_in_no_statistic_of_their_configuration() -> None:
    trials = [
        trial("a0", 0.6, beta=0.1, **{"run.seed": 0}),
        trial("a1", 0.8, beta=0.1, **{"run.seed": 1}),
        replace(trial("a2", 0.1, status="stopped", beta=0.1, **{"run.seed": 2}), metrics={"accuracy": 0.1, "step": 1}),
        replace(trial("b0", 0.9, status="stopped", beta=0.2, **{"run.seed": 0}), metrics={"accuracy": 0.9, "step": 1}),
        replace(trial("b1", 0.5, status="stopped", beta=0.2, **{"run.seed": 1}), metrics={"accuracy": 0.5, "step": 2}),
        replace(trial("b2", 0.7, status="running", beta=0.2, **{"run.seed": 2}), metrics={"accuracy": 0.7, "step": 2}),
    ]
    first, second = configurations(rank(trials, Objective("accuracy")).ranked, Objective("accuracy"))
    assert (first.finished, first.metrics, [t.name for t in first.behind]) == (True, (0.8, 0.6), ["a2"])
    assert (second.finished, second.metrics, [t.name for t in second.behind]) == (False, (0.7, 0.5), ["b0"])
