"""Schedulers, searchers and constraints of a sweep are checked with the configuration."""

from typing import Any

import pytest

from dpo_ray.config import override
from dpo_ray.config.load import ConfigError
from dpo_ray.config.tree import Config

CONFIG = Config.model_validate({"model": {"path": "m"}})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sweep.scheduler.use": "asah"}, r"sweep\.scheduler\.use: found 'asah'; input should be 'none', 'asha'"),
        (
            {"sweep.scheduler": {"use": "asha", "args": {"max_t": 9}}},
            r"sweep\.scheduler\.args\.max_t: asha takes grace_period, reduction_factor",
        ),
        (
            {"sweep.scheduler": {"use": "asha", "args": {"reduction_factor": 1}}},
            r"sweep\.scheduler\.args\.reduction_factor: found 1; input should be greater than or equal to 2",
        ),
        ({"sweep.scheduler.use": "median", "run.eval_every": None}, r"median judges trials .* run\.eval_every is null"),
        (
            {"sweep.scheduler": {"use": "pbt", "args": {"interval": 15}}, "run.eval_every": 10},
            r"sweep\.scheduler\.args\.interval is 15: it must be a multiple of run\.eval_every, 10",
        ),
        ({"sweep.search": {"use": "sobol", "args": {"n": 1}}}, r"sweep\.search\.args\.n: sobol takes no arguments"),
        ({"sweep.search": {"use": "grid", "args": {"points": 1}}}, r"sweep\.search\.args\.points: found 1"),
        (
            {"sweep.search.use": "optuna", "sweep.scheduler.use": "halving"},
            r"optuna learns from trials that have ended, and with sweep\.scheduler\.use: halving all",
        ),
        ({"sweep.constraint": {"metric": "kl"}}, r"sweep\.constraint\.max: is required"),
    ],
)
def test_a_setting_that_cannot_work_is_rejected_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        override(CONFIG, settings)


def test_settings_that_work_are_accepted() -> None:
    accepted = override(
        CONFIG,
        {
            "run.eval_every": 10,
            "sweep.scheduler": {"use": "asha", "args": {"grace_period": 20, "reduction_factor": 4}},
            "sweep.search": {"use": "optuna", "args": {"startup_trials": 4}},
            "sweep.constraint": {"metric": "kl", "max": 10},
        },
    )
    assert accepted.sweep.constraint is not None
    assert accepted.sweep.constraint.max == 10.0
