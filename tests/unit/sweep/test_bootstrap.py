"""Intervals against enumeration by hand and against known distributions."""

from itertools import product

import numpy as np
import pytest

from dpo_ray.sweep.bootstrap import bootstrap_interval, pooled_deviation, seed_margin


def by_enumeration(differences: list[float]) -> tuple[float, float]:
    """2.5 % from either end of the means of all n ** n equally likely resamples."""
    means = sorted(sum(draw) / len(draw) for draw in product(differences, repeat=len(differences)))
    place = int(np.ceil(0.025 * len(means))) - 1
    return means[place], means[-1 - place]


@pytest.mark.parametrize("differences", [[1.0], [1.0, 0.0], [1.0, 0.0, -1.0, 1.0], [0.1, -0.2, 0.3, 0.4, 0.05, 0.7]])
def test_few_differences_have_the_exact_interval_of_all_resamples(differences: list[float]) -> None:
    assert bootstrap_interval(np.array(differences)) == pytest.approx(by_enumeration(differences), abs=1e-12)


def test_one_pair_of_two_in_favor_has_means_from_none_to_all() -> None:
    # Resamples of (1, 0): 0, 1/2, 1/2 and 1 with a quarter each.
    assert bootstrap_interval(np.array([1.0, 0.0])) == (0.0, 1.0)


def test_drawn_resamples_agree_with_the_binomial_distribution() -> None:
    # 40 of 100 pairs in favor: the resampled mean is Binomial(100, 0.4) / 100, whose 2.5 % quantile is 31.
    differences = np.repeat([1.0, 0.0], [40, 60])
    low, high = bootstrap_interval(differences)
    assert low == pytest.approx(0.31, abs=0.011)
    assert high == pytest.approx(0.50, abs=0.011)
    assert bootstrap_interval(differences) == (low, high), "the seed decides"
    assert bootstrap_interval(differences, seed=1) == pytest.approx((low, high), abs=0.02)


def test_many_different_values_have_the_interval_of_the_normal_distribution() -> None:
    differences = np.random.default_rng(0).normal(0.3, 1.0, 3000)
    low, high = bootstrap_interval(differences)
    assert (high - low) / 2 == pytest.approx(1.96 * differences.std() / 3000**0.5, rel=0.05)
    assert (high + low) / 2 == pytest.approx(differences.mean(), abs=0.002)


def test_the_drawn_and_the_exact_interval_of_nine_and_eight_equal_shares_meet() -> None:
    exact = bootstrap_interval(np.array([1.0, 1.0, 1.0, 0.0] * 2))
    drawn = bootstrap_interval(np.array([1.0, 1.0, 1.0, 0.0] * 3))
    assert exact == (0.375, 1.0)  # Binomial(8, 3/4): P(X <= 3) = 0.0273, P(X <= 2) = 0.0042
    assert drawn == pytest.approx((0.5, 1.0), abs=1e-9)  # Binomial(12, 3/4): P(X <= 6) = 0.0544, P(X <= 5) = 0.0143


def test_identical_results_have_an_interval_of_zero() -> None:
    assert bootstrap_interval(np.zeros(32)) == (0.0, 0.0)


def test_the_noise_of_seeds_is_pooled_over_configurations_and_applies_to_single_runs() -> None:
    # Variances 0.02 (one degree of freedom) and 0.01 (two): pooled 0.04 / 3.
    repeats = [[0.5, 0.7], [0.3, 0.4, 0.5], [0.2]]
    deviation = (0.04 / 3) ** 0.5
    assert pooled_deviation(repeats) == (pytest.approx(deviation), 3)
    assert seed_margin(repeats, 0, 1) == pytest.approx(3.182 * deviation * (1 / 2 + 1 / 3) ** 0.5)
    assert seed_margin(repeats, 0, 2) == pytest.approx(3.182 * deviation * (1 / 2 + 1) ** 0.5)
    assert seed_margin([[0.5], [0.3]], 0, 1) is None
