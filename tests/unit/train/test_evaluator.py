"""The schedule of evaluations, and evaluations by the engines as they arrive."""

from types import SimpleNamespace
from typing import Any

import pytest

from dpo_ray.config.schema import RunConfig
from dpo_ray.rollout.evaluation import Evaluation
from dpo_ray.train.evaluator import PromptEvaluator, evaluation_due
from dpo_ray.types import Metrics


@pytest.mark.parametrize(
    ("settings", "evaluated"),
    [
        ({"eval_every": 4}, [0, 4, 8, 9]),
        ({"eval_every": None}, [0, 9]),
        # Each checkpoint is ranked.
        ({"eval_every": None, "save_every": 3, "best_metric": "eval/loss"}, [0, 3, 6, 9]),
        # The rungs of a scheduler, whatever is saved.
        ({"eval_at": (1, 3), "save_every": 2, "best_metric": "eval/loss"}, [1, 3, 9]),
    ],
)
def test_evaluations_are_due_where_the_settings_say(settings: dict[str, Any], evaluated: list[int]) -> None:
    run = RunConfig(**settings)
    assert [step for step in range(10) if evaluation_due(run, step, 9)] == evaluated


class Recorded:
    """Evaluations on disk."""

    def __init__(self, *versions: int) -> None:
        self.versions = set(versions)

    def recorded(self, version: int) -> bool:
        return version in self.versions

    def metrics_of(self, version: int) -> Metrics:
        return {"heldout/score": float(version)}

    def record(self, evaluation: Evaluation, policy: Any, reference: Any) -> Metrics:
        self.versions.add(evaluation.version)
        return self.metrics_of(evaluation.version)


def evaluator(rounds: Any, **settings: Any) -> PromptEvaluator:
    trainer: Any = SimpleNamespace(config=SimpleNamespace(run=RunConfig(**settings)))
    reporter: Any = None
    return PromptEvaluator(trainer, rounds, None, reporter, total=99)


@pytest.mark.parametrize(
    ("recorded", "asked"),
    [((), [0, 4, 8]), ((0,), [4, 8]), ((0, 4), [8]), ((0, 5), [8]), ((0, 9), []), ((0, 4, 8), [])],
)
def test_a_resumed_run_asks_for_the_evaluations_since_the_last_one(recorded: tuple[int, ...], asked: list[int]) -> None:
    resumed = evaluator(Recorded(*recorded), eval_every=4)
    resumed.resume(9)
    assert resumed.pending == asked


FAILED = {"failed": 1}  # some prompts failed, so it is not empty


def test_an_evaluation_in_place_of_another_counts_as_that_of_its_own_version_once() -> None:
    rounds = Recorded()
    waiting = evaluator(rounds, eval_every=2)
    for version in (2, 4, 6):
        waiting.maybe_request(version)
    waiting.receive(Evaluation(4, instead_of=2, **FAILED), 6)
    assert waiting.pending == [6]
    assert waiting.take_unranked() == {4: {"heldout/score": 4.0}}
    waiting.pending.append(4)
    waiting.receive(Evaluation(4, instead_of=4, **FAILED), 6)
    assert waiting.take_unranked() == {}, "it is on disk"
    waiting.receive(Evaluation(6), 6)
    assert (waiting.pending, rounds.versions) == ([], {4})
