"""Recorded evaluations: their files, and the win rate over the evaluation before."""

import json
import math
from pathlib import Path

import pytest

from dpo_ray.rollout.evaluation import Evaluation, EvaluationStore

Scores = dict[str, float]


@pytest.fixture
def write(tmp_path: Path, group):
    """Writes an evaluation of a version from a score per prompt; returns its metrics."""
    store = EvaluationStore(tmp_path)
    numbers = {name: number for number, name in enumerate("abcdef")}

    def write(version: int, scores: Scores) -> dict[str, float]:
        judged = tuple((group(f"answer {version}", index=numbers[name]), score) for name, score in scores.items())
        return store.write(Evaluation(version, judged), None, None)

    return write


def test_the_win_rate_is_the_share_of_prompts_that_score_higher_than_before_and_ties_count_half(write):
    assert write(0, {"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0}) == {"heldout/score": 2.5, "heldout/unscored": 0}
    metrics = write(2, {"a": 1.5, "b": 2.0, "c": 3.5, "d": 1.0})
    assert metrics == {"heldout/score": 2.0, "heldout/unscored": 0, "heldout/win_rate": (1 + 0.5 + 1 + 0) / 4}


def test_the_evaluation_before_is_the_newest_of_an_earlier_version_also_if_it_arrives_late(write):
    write(0, {"a": 0.0})
    write(4, {"a": 2.0})
    assert write(2, {"a": 1.0})["heldout/win_rate"] == 1.0, "against version 0"
    assert write(6, {"a": 1.5})["heldout/win_rate"] == 0.0, "against version 4"
    assert write(6, {"a": 1.5})["heldout/win_rate"] == 0.0, "not against itself"


def test_prompts_without_a_score_in_both_evaluations_do_not_count(write):
    write(0, {"a": 0.0, "b": math.nan, "c": 5.0})
    assert write(1, {"a": 1.0, "b": 1.0, "c": math.nan, "d": 1.0})["heldout/win_rate"] == 1.0
    assert "heldout/win_rate" not in write(2, {"c": 1.0, "e": 1.0}), "no prompt has a score in both"


def test_other_prompts_at_the_same_positions_are_not_compared(write, tmp_path):
    write(0, {"a": 0.0, "b": 0.0})
    file = tmp_path / "evaluations" / "000000.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["prompt_index"] for line in lines] == [0, 1]
    lines[0]["prompt"][0]["content"] = "a question that online.eval_prompts no longer has"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert write(1, {"a": -1.0, "b": 1.0})["heldout/win_rate"] == 1.0


def test_the_judges_own_metrics_are_logged_and_read_again(tmp_path, group):
    store = EvaluationStore(tmp_path)
    metrics_of_judge = {"cost_usd": 0.25, "retries": 0}
    metrics = store.write(Evaluation(1, ((group("a"), 2.0),), judge_metrics=metrics_of_judge), None, None)
    judged = {"heldout/score": 2.0, "heldout/unscored": 0}
    assert metrics == {**judged, "heldout/judge_cost_usd": 0.25, "heldout/judge_retries": 0}
    assert store.read(1) == metrics


def test_held_out_prompts_without_a_score_are_counted_also_those_without_a_completion(tmp_path, group):
    store = EvaluationStore(tmp_path)
    judged = tuple((group("a", index=index), score) for index, score in enumerate((2.0, math.nan, math.nan)))
    assert store.write(Evaluation(1, judged, failed=4), None, None) == {"heldout/score": 2.0, "heldout/unscored": 6}
    assert store.write(Evaluation(2, judged[1:]), None, None) == {"heldout/unscored": 2}
    assert store.read(1) == {"heldout/score": 2.0, "heldout/unscored": 6}
    none = Evaluation(3, failed=5)
    assert not none.empty, "its prompts failed"
    assert store.write(none, None, None) == store.read(3) == {"heldout/unscored": 5}
    summary = store.folder / "000001.kl.json"
    summary.write_text(json.dumps({k: v for k, v in json.loads(summary.read_text()).items() if k != "failed"}))
    assert store.read(1) == {"heldout/score": 2.0}, "failed prompts were not counted"


def test_without_held_out_prompts_there_is_no_win_rate(write):
    write(0, {})
    assert write(1, {}) == {}
