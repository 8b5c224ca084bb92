"""An engine and the trainer must agree on the log-probabilities of a probe text."""

import math
from collections.abc import Sequence

import pytest

from dpo_ray.rollout.updates import check_probe
from dpo_ray.types import Probe, SyncMismatch


def compare(trainer: Sequence[float], engine: Sequence[float], *, tolerance: float = 0.05) -> float:
    return check_probe(Probe(tuple(range(len(trainer) + 1)), tuple(trainer), tolerance), engine)


def test_the_difference_is_the_mean_over_the_tokens():
    assert compare([-1.0, -2.0], [-1.1, -2.3], tolerance=0.5) == pytest.approx(0.2)


def test_differences_of_opposite_sign_do_not_cancel():
    with pytest.raises(SyncMismatch, match=r"differ by 1\.0000 nats per token .* accepted is 0\.05"):
        compare([-1.0, -2.0], [-2.0, -1.0])


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_a_mismatch(broken: float):
    with pytest.raises(SyncMismatch):
        compare([-1.0, -1.0], [-1.0, broken])
    with pytest.raises(SyncMismatch):
        compare([-1.0, broken], [-1.0, -1.0])


def test_a_different_number_of_tokens_and_a_probe_without_tokens_are_rejected():
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        compare([-1.0, -2.0], [-1.0])
    with pytest.raises(ValueError, match="at least two"):
        compare([], [])
