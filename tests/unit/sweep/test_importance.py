"""Importance of keys on planted functions, and the frontier of planted points."""

import numpy as np
import pytest

from dpo_ray.sweep.importance import frontier, importance


def test_a_planted_key_explains_the_variance_and_an_idle_one_none() -> None:
    values = [{"beta": 2.0**i, "lr": 10.0**-j, "loss": "ipo"} for i in range(4) for j in range(8)]
    metric = np.array([float(mapping["beta"] > 2) for mapping in values])
    shares = importance(values, metric, ["beta", "lr", "loss"])
    assert shares is not None
    assert shares["beta"].share == pytest.approx(1.0)
    assert {key: share.exceeds_chance for key, share in shares.items()} == {"beta": True, "lr": False, "loss": False}
    assert shares["lr"].share == shares["loss"].share == 0.0


def test_an_idle_key_exceeds_chance_in_about_one_of_twenty_sweeps() -> None:
    draw, found = np.random.default_rng(0), 0
    for _ in range(200):
        shares = importance([{"lr": value} for value in draw.uniform(size=12)], draw.normal(size=12), ["lr"])
        found += shares is not None and shares["lr"].exceeds_chance
    assert 2 <= found <= 20, "a standard deviation around 10 is 3"


def test_the_share_is_the_adjusted_r_squared_of_group_means() -> None:
    # Groups (0, 1), (2, 3), (4, 5), (6, 7): means 0.5, 2.5, 4.5, 6.5; within 4 * 0.5 = 2, total 42.
    shares = importance([{"n": i // 2} for i in range(8)], np.arange(8.0), ["n"])
    assert shares is not None
    assert shares["n"].share == pytest.approx(1 - (2 / 42) * 7 / 4)


def test_words_and_numbers_of_a_key_that_not_all_trials_have_are_grouped_by_value() -> None:
    values = [{"loss.use": "ipo"}] * 4 + [{"loss.use": "sigmoid"}] * 2 + [{}] * 2
    shares = importance(values, np.array([1.0] * 4 + [2.0] * 2 + [3.0] * 2), ["loss.use"])
    assert shares is not None
    assert shares["loss.use"].share == 1.0


def test_few_trials_and_equal_metrics_have_no_importance() -> None:
    assert importance([{"n": i} for i in range(7)], np.arange(7.0), ["n"]) is None
    assert importance([{"n": i} for i in range(8)], np.ones(8), ["n"]) is None


def test_the_frontier_has_the_points_that_no_other_beats() -> None:
    cost = np.array([1.0, 2.0, 2.0, 3.0, 0.5, 4.0, 2.0])
    gain = np.array([0.5, 0.7, 0.6, 0.7, 0.1, 0.9, 0.7])
    assert frontier(cost, gain) == [4, 0, 1, 5]
    assert frontier(np.zeros(0), np.zeros(0)) == []
