"""Metrics of a round from the scores of its completions."""

import random

import pytest

from dpo_ray.rollout.tally import win_rate_over


def test_the_win_rate_over_others_counts_every_pair_of_scores_and_half_a_tie():
    draw = random.Random(0)
    scores, others = ([float(draw.randrange(10)) for _ in range(size)] for size in (30, 17))
    wins = sum(0.5 if score == other else float(score > other) for score in scores for other in others)
    assert win_rate_over(others, scores) == pytest.approx(wins / (30 * 17))
    assert win_rate_over([], scores) is None
    assert win_rate_over(others, []) is None
