"""Engines and trainer must agree on the log-probabilities of a probe text."""

import math

import pytest

from dpo_ray.sync.base import SyncMismatch, check_probe


def test_probe_gives_the_largest_mean_difference_over_the_engines():
    assert check_probe([-1.0, -2.0], [[-1.0, -2.0], [-1.1, -2.3]], tolerance=0.5) == pytest.approx(0.2)


def test_differences_of_opposite_sign_do_not_cancel():
    with pytest.raises(SyncMismatch, match=r"engine 0 .* differ by 1\.0000 nats per token .* accepted is 0\.05"):
        check_probe([-1.0, -2.0], [[-2.0, -1.0]], tolerance=0.05)


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_a_mismatch(broken: float):
    with pytest.raises(SyncMismatch, match="engine 1"):
        check_probe([-1.0, -1.0], [[-1.0, -1.0], [-1.0, broken]], tolerance=0.05)


def test_a_trainer_that_computes_nan_is_a_mismatch():
    with pytest.raises(SyncMismatch):
        check_probe([math.nan], [[-1.0]], tolerance=0.05)


def test_a_different_number_of_tokens_is_rejected():
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        check_probe([-1.0, -2.0], [[-1.0]], tolerance=0.05)


def test_a_probe_without_tokens_is_rejected():
    with pytest.raises(ValueError, match="at least two"):
        check_probe([], [[]], tolerance=0.05)
