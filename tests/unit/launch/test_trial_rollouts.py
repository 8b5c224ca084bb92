"""Which trials can be run on the engines of another."""

from typing import Any

import pytest

from dpo_ray.config import Config, override
from dpo_ray.launch.sweeps.trial_rollouts import engine_settings

CONFIG = Config.model_validate(
    {
        "model": {"path": "m"},
        "run": {"name": "sweep"},
        "online": {"prompts": "p.jsonl", "rounds": 1, "judge": {"use": "length"}},
    }
)


@pytest.mark.parametrize(
    "values",
    [
        {"loss.beta": 0.3, "optim.lr": 1e-5, "run.seed": 7},
        {"online.sampling.temperature": 0.5, "online.candidates": 4, "online.judge": {"use": "sentiment"}},
        {"run.name": "another", "reference.refresh": "round"},
    ],
)
def test_trials_that_differ_in_training_sampling_or_judging_share_engines(values: dict[str, Any]) -> None:
    assert engine_settings(override(CONFIG, values)) == engine_settings(CONFIG)


@pytest.mark.parametrize(
    "values",
    [
        {"online.max_lag": 1},
        {"online.sampling.max_tokens": CONFIG.online.sampling.max_tokens + 1},  # type: ignore[union-attr]
        {"online.engine.kv_cache_gib": 1.5},
        {"model.dtype": "float32"},
        {"online.engine_timeout_s": 17.0},
    ],
)
def test_trials_that_need_other_engines_have_other_settings(values: dict[str, Any]) -> None:
    assert engine_settings(override(CONFIG, values)) != engine_settings(CONFIG)
