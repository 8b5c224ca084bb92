"""Each check of health, on a record that fails it and on one that passes."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from dpo_ray.report.formatting import same_decimals
from dpo_ray.report.health import (
    Finding,
    chosen_stays_likely,
    clipping_is_rare,
    completions_end,
    diagnose,
    eval_loss_keeps_falling,
    few_dropped,
    few_ties,
    first_loss_is_ln2,
    gradients_have_no_spikes,
    judge_score_rises,
    kl_is_moderate,
    length_is_steady,
    trainers_are_busy,
    training_is_not_saturated,
    values_are_finite,
)
from dpo_ray.report.record import Evaluation, HeldOutSample, RunRecord

SIGMOID = {"loss": {"use": "sigmoid", "beta": 0.1}, "optim": {"max_grad_norm": 1.0}}


def record_of_steps(config: dict[str, Any] | None = None, **series: Sequence[float]) -> RunRecord:
    """A run with these metrics, ``/`` spelled ``__``; all series of one length."""
    keys = [key.replace("__", "/") for key in series]
    lines = [dict(zip(keys, values, strict=True)) for values in zip(*series.values(), strict=True)]
    return RunRecord(
        Path("run"),
        config=SIGMOID if config is None else config,
        steps=tuple({"step": i + 1, **line} for i, line in enumerate(lines)),
    )


def record_of_rounds(**series: Sequence[float]) -> RunRecord:
    keys = [key.replace("__", "/") for key in series]
    lines = [dict(zip(keys, values, strict=True)) for values in zip(*series.values(), strict=True)]
    return RunRecord(Path("run"), rounds=tuple({"step": i + 1, "round": i, **line} for i, line in enumerate(lines)))


def evaluation(version: int, scores: Sequence[float], tokens: int = 40, kl: float = 1.0) -> Evaluation:
    samples = (
        HeldOutSample(({"role": "user", "content": str(i)},), "text", tokens, score) for i, score in enumerate(scores)
    )
    return Evaluation(version, tuple(samples), kl)


def before_and_after(before: Evaluation, after: Evaluation) -> RunRecord:
    return RunRecord(Path("run"), evaluations=(before, after))


def level(finding: Finding | None) -> str | None:
    return finding.level if finding else None


def text(finding: Finding | None) -> str:
    assert finding
    return finding.text


def test_a_nan_is_reported_with_its_step():
    finding = values_are_finite(record_of_steps(loss=[0.69, math.nan, math.nan]))
    assert level(finding) == "warning"
    assert "loss is not finite from step 2; 2 steps of 3" in text(finding)
    assert level(values_are_finite(record_of_steps(loss=[0.69, 0.6]))) == "ok"


@pytest.mark.parametrize(("first", "expected"), [(0.6931, "ok"), (0.70, "ok"), (0.72, "warning"), (0.66, "warning")])
def test_the_first_sigmoid_loss_is_ln2_within_two_hundredths(first, expected):
    assert level(first_loss_is_ln2(record_of_steps(loss=[first, 0.5]))) == expected


def test_the_first_loss_of_other_losses_is_not_checked():
    assert first_loss_is_ln2(record_of_steps({"loss": {"use": "ipo"}}, loss=[25.0])) is None


@pytest.mark.parametrize("weighted", [{"weighting": "wpo"}, {"weights": [0.5]}])
def test_the_first_loss_is_not_checked_where_the_losses_are_weighted(weighted):
    config = {"loss": {"use": "sigmoid", "beta": 0.1, **weighted}}
    assert first_loss_is_ln2(record_of_steps(config, loss=[0.3, 0.2])) is None


def test_chosen_falling_30_nats_while_the_margin_grows_is_a_warning():
    fall = record_of_steps(rewards__chosen=[0.0, -3.0], rewards__margins=[0.0, 2.0])
    assert level(chosen_stays_likely(fall)) == "warning"
    assert "fell by 30.0 nats" in text(chosen_stays_likely(fall))


def test_chosen_falling_a_little_is_a_note_and_rising_is_fine():
    assert (
        level(chosen_stays_likely(record_of_steps(rewards__chosen=[0.0, -1.0], rewards__margins=[0.0, 2.0]))) == "note"
    )
    assert level(chosen_stays_likely(record_of_steps(rewards__chosen=[0.0, 1.0], rewards__margins=[0.0, 2.0]))) == "ok"


def test_chosen_is_measured_by_log_probability_where_beta_is_unknown():
    falling = record_of_steps({}, logps__chosen=[-50.0, -75.0], rewards__margins=[0.0, 2.0])
    assert "fell by 25.0 nats" in text(chosen_stays_likely(falling))


def test_saturated_pairs_need_both_accuracy_and_margin():
    def run(accuracy: float, margin: float) -> RunRecord:
        return record_of_steps(rewards__accuracies=[0.5, accuracy], rewards__margins=[0.0, margin])

    assert level(training_is_not_saturated(run(1.0, 8.0))) == "warning"
    assert level(training_is_not_saturated(run(1.0, 2.0))) == "ok"
    assert level(training_is_not_saturated(run(0.8, 8.0))) == "ok"


def test_a_held_out_loss_that_rises_again_is_reported_with_its_best_step():
    def run(*losses: float) -> RunRecord:
        return RunRecord(Path("run"), evals=tuple({"step": 50 * i, "eval/loss": x} for i, x in enumerate(losses)))

    finding = eval_loss_keeps_falling(run(0.69, 0.60, 0.66))
    assert level(finding) == "warning"
    assert "run.steps=50" in text(finding)
    assert level(eval_loss_keeps_falling(run(0.69, 0.60, 0.61))) == "ok"


@pytest.mark.parametrize(("kl", "expected"), [(5.0, "ok"), (20.0, "note"), (31.0, "warning")])
def test_kl_levels(kl, expected):
    assert level(kl_is_moderate(before_and_after(evaluation(0, [0.0]), evaluation(4, [0.0], kl=kl)))) == expected
    assert level(kl_is_moderate(record_of_rounds(kl=[0.0, kl]))) == expected


@pytest.mark.parametrize(("after", "expected"), [(130, "ok"), (140, "warning"), (70, "ok"), (60, "warning")])
def test_length_may_drift_by_a_third(after, expected):
    run = before_and_after(evaluation(0, [0.0], tokens=100), evaluation(4, [0.0], tokens=after))
    assert level(length_is_steady(run)) == expected


def test_a_gradient_spike_is_reported_with_its_step():
    norms = [1.0] * 20
    assert level(gradients_have_no_spikes(record_of_steps(optim__grad_norm=norms))) == "ok"
    norms[11] = 15.0
    finding = gradients_have_no_spikes(record_of_steps(optim__grad_norm=norms))
    assert level(finding) == "warning"
    assert "at step 12;" in text(finding)


def test_clipping_nearly_every_step_is_a_note():
    assert level(clipping_is_rare(record_of_steps(optim__grad_norm=[3.0] * 20))) == "note"
    assert level(clipping_is_rare(record_of_steps(optim__grad_norm=[0.5] * 10 + [3.0] * 10))) == "ok"


def test_a_held_out_gain_must_exceed_two_standard_errors():
    before = evaluation(0, [0.0, 0.0, 0.0, 0.0])
    assert level(judge_score_rises(before_and_after(before, evaluation(4, [0.5, 0.6, 0.5, 0.6])))) == "ok"
    unclear = judge_score_rises(before_and_after(before, evaluation(4, [0.5, -0.5, 0.6, -0.5])))
    assert unclear
    assert (unclear.level, unclear.title) == ("warning", "The judge score did not clearly rise")
    fell = judge_score_rises(before_and_after(before, evaluation(4, [-0.5, -0.6, -0.5, -0.6])))
    assert fell
    assert (fell.level, fell.title) == ("warning", "The judge score fell")


def test_without_held_out_prompts_the_rounds_are_compared():
    assert level(judge_score_rises(record_of_rounds(judge__mean_score=[0.1, 0.12, 0.3, 0.32]))) == "ok"
    assert level(judge_score_rises(record_of_rounds(judge__mean_score=[0.1, 0.3, 0.3, 0.1]))) == "warning"
    assert judge_score_rises(record_of_rounds(judge__mean_score=[0.1, 0.3])) is None


def test_more_than_three_ties_in_ten_prompts_are_a_warning():
    many = record_of_rounds(rollout__kept=[6, 6], rollout__dropped_tie=[4, 4])
    assert level(few_ties(many)) == "warning"
    assert "40% of 20 prompts" in text(few_ties(many))
    assert level(few_ties(record_of_rounds(rollout__kept=[8, 8], rollout__dropped_tie=[2, 2]))) == "ok"


def test_other_reasons_for_dropped_prompts_are_reported():
    finding = few_dropped(record_of_rounds(rollout__kept=[5], rollout__dropped_prompt_too_long=[5]))
    assert level(finding) == "warning"
    assert "'prompt_too_long' (5 times)" in text(finding)
    assert few_dropped(record_of_rounds(rollout__kept=[5], rollout__dropped_tie=[5])) is None


@pytest.mark.parametrize(("cut", "expected"), [(1, "ok"), (3, "note"), (6, "warning")])
def test_completions_truncated_by_the_token_limit(cut, expected):
    candidates = [{"text": "", "finished": i >= cut} for i in range(10)]
    run = RunRecord(Path("run"), groups=({"candidates": candidates},), groups_round=3)
    finding = completions_end(run)
    assert level(finding) == expected
    assert f"{10 * cut}% of 10 candidates of round 3" in text(finding)


def test_training_that_waits_most_of_the_time_is_a_note():
    waiting = record_of_rounds(perf__train_s=[2.0], perf__sync_s=[1.0], perf__wait_s=[7.0])
    assert level(trainers_are_busy(waiting)) == "note"
    assert "70%" in text(trainers_are_busy(waiting))
    busy = record_of_rounds(perf__train_s=[7.0], perf__sync_s=[1.0], perf__wait_s=[2.0])
    assert level(trainers_are_busy(busy)) == "ok"


def test_warnings_come_first_and_checks_without_data_have_no_finding():
    run = record_of_steps(loss=[0.8, 0.7], rewards__chosen=[0.0, -1.0], rewards__margins=[0.0, 1.0])
    assert [finding.level for finding in diagnose(run)] == ["warning", "note", "ok"]
    assert diagnose(RunRecord(Path("run"))) == []


def test_figures_to_compare_share_their_decimals():
    assert same_decimals(0.0378, 0.415) == ["0.038", "0.415"]
    assert same_decimals(12345.6, -7.0) == ["12,346", "-7"]
    assert same_decimals(-0.0001, 5.0) == ["0.00", "5.00"]
    assert same_decimals(0.0, 0.0) == ["0", "0"]
