"""The losses against numbers a reader can recompute."""

import math

import pytest
import torch

from dpo_ray.objective.logps import PairLogps
from dpo_ray.objective.losses import build_loss, sigmoid
from dpo_ray.objective.metrics import PAIR_METRICS, pair_metric_sums


def pairs(chosen: list[float], rejected: list[float]) -> PairLogps:
    lengths = torch.ones(len(chosen), dtype=torch.int64)
    return PairLogps(torch.tensor(chosen), torch.tensor(rejected), lengths, lengths)


def test_sigmoid_is_ln_2_where_policy_and_reference_agree() -> None:
    same = pairs([-5.0, -80.0], [-7.0, -3.0])
    assert sigmoid(same, same, beta=0.1).tolist() == pytest.approx([math.log(2)] * 2)


def test_sigmoid_is_the_softplus_of_the_negative_margin() -> None:
    # log-ratios: chosen -10 - -12 = 2, rejected -20 - -15 = -5; margin 0.5 * 7 = 3.5; loss ln(1 + e^-3.5) = 0.029750
    loss = sigmoid(pairs([-10.0], [-20.0]), pairs([-12.0], [-15.0]), beta=0.5)
    assert loss.item() == pytest.approx(0.029750, abs=1e-6)


def test_label_smoothing_mixes_in_the_flipped_preference() -> None:
    policy, reference = pairs([-10.0], [-20.0]), pairs([-12.0], [-15.0])
    kept, flipped = math.log1p(math.exp(-3.5)), math.log1p(math.exp(3.5))
    loss = sigmoid(policy, reference, beta=0.5, label_smoothing=0.2)
    assert loss.item() == pytest.approx(0.8 * kept + 0.2 * flipped, rel=1e-6)


@pytest.mark.parametrize("smoothing", [-0.1, 0.5, 1.0])
def test_label_smoothing_outside_its_range_is_refused(smoothing: float) -> None:
    with pytest.raises(ValueError, match=r"label_smoothing.*\[0, 0\.5\)"):
        sigmoid(pairs([0.0], [0.0]), pairs([0.0], [0.0]), beta=0.1, label_smoothing=smoothing)


def test_an_unknown_loss_or_argument_is_refused_with_what_is_accepted() -> None:
    with pytest.raises(ValueError, match="sigmoid"):
        build_loss("sigmod", 0.1, {})
    with pytest.raises(ValueError, match="label_smoothing"):
        build_loss("sigmoid", 0.1, {"smoothing": 0.1})


def test_metrics_are_sums_over_the_pairs() -> None:
    policy, reference = pairs([-10.0, -4.0], [-20.0, -1.0]), pairs([-12.0, -4.0], [-15.0, -2.0])
    sums = pair_metric_sums(torch.tensor([0.25, 0.75]), policy, reference, beta=0.5)
    assert dict(zip(PAIR_METRICS, sums.tolist(), strict=True)) == {
        "loss": 1.0,
        "rewards/chosen": 1.0,  # 0.5 * 2 and 0.5 * 0
        "rewards/rejected": -2.0,  # 0.5 * -5 and 0.5 * 1
        "rewards/margins": 3.0,  # 3.5 and -0.5
        "rewards/accuracies": 1.0,  # the first pair only
        "logps/chosen": -14.0,
        "logps/rejected": -21.0,
    }
