"""The schedule of evaluations."""

from typing import Any

import pytest

from dpo_ray.config.schema import RunConfig
from dpo_ray.train.evaluator import evaluation_due


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
