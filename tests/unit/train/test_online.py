"""The implicit reward as judge of a round."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dpo_ray.config.losses import LossConfig
from dpo_ray.config.rounds import JudgeConfig
from dpo_ray.train import online
from dpo_ray.train.logps import SampleList
from dpo_ray.types import TokenSample

LOGPS = {"policy": np.array([-10.0, -30.0]), "reference": np.array([-14.0, -28.0])}


class Rounds:
    """One round with two completions, of one and of three tokens."""

    def samples(self, round: int) -> SampleList:
        """Both completions."""
        return SampleList([TokenSample((1,), (2,)), TokenSample((1,), (2, 3, 4))])

    def judge(self, round: int, scores: list[float]) -> list[float]:
        """The scores."""
        return scores


@pytest.mark.parametrize(("beta", "penalty", "expected"), [(0.1, 0.0, [0.4, -0.2]), (0.5, 0.01, [1.99, -1.03])])
def test_a_score_is_beta_times_the_log_ratio_minus_the_penalty_of_all_tokens(
    monkeypatch: pytest.MonkeyPatch, beta: float, penalty: float, expected: list[float]
):
    monkeypatch.setattr(online, "compute_sample_logps", lambda trainer, model, samples: LOGPS[model])
    trainer: Any = SimpleNamespace(policy="policy", config=SimpleNamespace(loss=LossConfig(beta=beta)))
    rounds, data, frozen = Rounds(), SimpleNamespace(judged=False, index=1), "reference"
    judge = JudgeConfig(use="implicit", args={"length_penalty": penalty})
    scores: Any = online.judge_by_policy(trainer, rounds, data, frozen, judge)  # pyrefly: ignore [bad-argument-type]
    assert scores == pytest.approx(expected)
