"""The sentence on a sweep: for a clear lead, ties, repeats, failures, a constraint and distances."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dpo_ray.report.sweep_text import verdict_text
from dpo_ray.sweep.held_out import write_pair_results
from dpo_ray.sweep.trials import Constraint, Objective, Trial
from dpo_ray.sweep.verdict import build_verdict
from tests.unit.sweep.runs import ACCURACY, trial

BEST, WORSE = "1" * 30, "1" * 20 + "0" * 10


def text(trials: list[Trial], folder: Path, objective: Objective = ACCURACY) -> str:
    return verdict_text(build_verdict(trials, objective, folder))


def test_a_clear_lead_is_stated_with_its_interval(tmp_path: Path) -> None:
    trials = [trial("a", tmp_path, WORSE, loss__beta=0.5), trial("b", tmp_path, BEST, loss__beta=0.1)]
    assert text(trials, tmp_path) == (
        "Pick loss.beta = 0.1: its eval/rewards/accuracies is 1. Its lead of 0.333 over the next, loss.beta = 0.5, is "
        "larger than the noise of the 30 held-out pairs (95 % interval 0.167 to 0.500); seeds were not repeated."
    )


def test_a_lead_within_the_noise_is_called_a_tie(tmp_path: Path) -> None:
    trials = [trial("a", tmp_path, "1" * 29 + "0", loss__beta=0.5), trial("b", tmp_path, BEST, loss__beta=0.1)]
    assert "A tie: its lead of 0.0333 over the next, loss.beta = 0.5, is within the noise of" in text(trials, tmp_path)
    more = [*trials, trial("c", tmp_path, "1" * 28 + "00", loss__beta=0.9)]
    assert "All 3 configurations tie: the lead of 0.0333 over the next, loss.beta = 0.5, is within" in text(
        more, tmp_path
    )


def test_identical_trials_are_indistinguishable(tmp_path: Path) -> None:
    trials = [trial("a", tmp_path, BEST, loss__beta=0.5), trial("b", tmp_path, BEST, loss__beta=0.1)]
    assert text(trials, tmp_path).endswith(
        "A tie: loss.beta = 0.1 has the same result on each of the 30 held-out pairs; the two are indistinguishable."
    )
    twice = [replace(t, values={"loss.beta": 0.1}) for t in trials]
    assert "Pick loss.beta = 0.1 (trial a): " in text(twice, tmp_path)
    assert "A tie: loss.beta = 0.1 (trial b) has the same result on each" in text(twice, tmp_path)


def test_neighbors_that_are_as_good_are_named_with_their_values(tmp_path: Path) -> None:
    right = {(0.05, 1e-5): 35, (0.1, 1e-5): 36, (0.2, 1e-5): 34, (0.1, 1e-4): 20, (0.5, 1e-5): 20}
    trials = [
        trial(f"{beta}-{lr}", tmp_path, "1" * n + "0" * (40 - n), loss__beta=beta, optim__lr=lr)
        for (beta, lr), n in right.items()
    ]
    assert text(trials, tmp_path).endswith("As good within the noise: loss.beta 0.05 to 0.2 at optim.lr = 1e-5.")


def test_repeated_configurations_are_compared_by_mean_and_spread_over_seeds(tmp_path: Path) -> None:
    bits = {"a0": (30, 0, 0.1), "a1": (27, 1, 0.1), "b0": (15, 0, 0.2), "b1": (12, 1, 0.2)}
    trials = [
        trial(name, tmp_path, "1" * n + "0" * (30 - n), loss__beta=beta, run__seed=seed)
        for name, (n, seed, beta) in bits.items()
    ]
    # Deviation 0.1 / sqrt(2) of both, pooled with 2 degrees of freedom: 4.303 * 0.0707 * 1 = 0.304 < 0.5.
    assert text(trials, tmp_path).startswith(
        "Pick loss.beta = 0.1: its eval/rewards/accuracies is 0.95 on average over 2 seeds, with a standard deviation "
        "of 0.07 (0.90 to 1.00). Its lead of 0.500 over the next, loss.beta = 0.2, is larger than the noise of the "
        "30 held-out pairs (95 % interval "
    )
    assert text(trials, tmp_path).endswith(") and that of seeds (± 0.30).")
    assert text(trials[:2], tmp_path).endswith("(0.90 to 1.00)."), "a single configuration has no rival"


def test_repeats_that_were_stopped_are_counted_and_left_out_of_mean_and_noise(tmp_path: Path) -> None:
    bits = {"a0": (30, 0, 0.1), "a1": (27, 1, 0.1), "a2": (3, 2, 0.1), "b0": (12, 0, 0.2), "b1": (15, 1, 0.2)}
    trials = [
        trial(name, tmp_path, "1" * n + "0" * (30 - n), loss__beta=beta, run__seed=seed)
        for name, (n, seed, beta) in bits.items()
    ]
    for place in (2, 3):
        trials[place] = replace(trials[place], status="stopped", metrics=trials[place].metrics | {"step": 1})
    # One degree of freedom: 12.706 * 0.1 / sqrt(2) * sqrt(1 / 2 + 1) = 1.10.
    sentences = text(trials, tmp_path)
    assert sentences.startswith(
        "Pick loss.beta = 0.1: its eval/rewards/accuracies is 0.95 on average over 2 seeds, with a standard deviation "
        "of 0.07 (0.90 to 1.00). 1 of its 3 seeds is left out: 1 stopped early by the scheduler. A tie: its lead of "
        "0.450 over the next, loss.beta = 0.2, is within the noise of seeds (± 1.1). 1 of the 2 seeds of loss.beta = "
        "0.2 is left out: 1 stopped early by the scheduler."
    )


@pytest.mark.parametrize(
    ("pairs", "sentence"),
    [
        (5, "Its lead over the next, loss.beta = 0.5, is 1.00; how much of that is noise is not known: 5 held-out "
         "pairs are too few to tell."),
        (6, "Its lead of 1.00 over the next, loss.beta = 0.5, is larger than the noise of the 6 held-out pairs (the "
         "same on each); seeds were not repeated."),
    ],
)  # fmt: skip
def test_a_lead_on_all_of_very_few_pairs_is_not_clear(pairs: int, sentence: str, tmp_path: Path) -> None:
    trials = [trial("a", tmp_path, "0" * pairs, loss__beta=0.5), trial("b", tmp_path, "1" * pairs, loss__beta=0.1)]
    assert text(trials, tmp_path) == f"Pick loss.beta = 0.1: its eval/rewards/accuracies is 1. {sentence}"


def test_a_lead_beyond_the_noise_of_seeds_says_that_the_pairs_are_too_few(tmp_path: Path) -> None:
    bits = {f"a{seed}": ("11111", seed, 0.1) for seed in range(3)} | {"a3": ("11110", 3, 0.1), "b0": ("00000", 0, 0.2)}
    trials = [trial(name, tmp_path, b, loss__beta=beta, run__seed=seed) for name, (b, seed, beta) in bits.items()]
    # Deviation 0.1 with 3 degrees of freedom: 3.182 * 0.1 * sqrt(1 / 4 + 1).
    assert text(trials, tmp_path).endswith(
        "Its lead of 0.950 over the next, loss.beta = 0.2, is larger than the noise of seeds (± 0.36); 5 held-out "
        "pairs are too few to estimate theirs."
    )


def test_trials_without_a_result_are_counted_by_reason(tmp_path: Path) -> None:
    trials = [
        trial("a", tmp_path, BEST, loss__beta=0.1),
        replace(trial("b", tmp_path, BEST, loss__beta=0.2), status="failed", metrics={}, error="out of memory"),
        replace(trial("c", tmp_path, BEST, loss__beta=0.3), metrics={"step": 8}),
        replace(trial("d", tmp_path, BEST, loss__beta=0.4), metrics={"step": 8}),
        replace(trial("e", tmp_path, BEST, loss__beta=0.5), metrics={"eval/rewards/accuracies": math.nan}),
        replace(trial("f", tmp_path, WORSE, loss__beta=0.6), status="stopped"),
    ]
    assert text(trials, tmp_path) == (
        "Pick loss.beta = 0.1: its eval/rewards/accuracies is 1. It alone ran to the end. At step 8 its lead over "
        "loss.beta = 0.6, which was stopped there, was 0.333, larger than the noise of the 30 held-out pairs (95 % "
        "interval 0.167 to 0.500). Not compared: 1 stopped early by the scheduler. Excluded: 1 trial failed, 2 trials "
        "have no eval/rewards/accuracies and 1 trial has a non-finite eval/rewards/accuracies."
    )
    assert text(trials[1:2], tmp_path) == "No trial has a result to pick. Excluded: 1 trial failed."


def test_the_only_trial_that_ran_to_the_end_is_compared_where_the_last_other_one_was_stopped(tmp_path: Path) -> None:
    def evaluated(name: str, step: int, correct: str) -> Trial:
        """Keeps the results of step 4 and of the last step."""
        for position, bits in ((4, WORSE), (step, correct)):
            margins = np.array([float(bit) - 0.5 for bit in bits])
            results = np.column_stack((margins, margins, margins, -margins))
            write_pair_results(tmp_path / name, results, step=position, pairs="set", keep=True)
        metrics = {"step": step, ACCURACY.metric: correct.count("1") / len(correct)}
        return Trial(name, {"loss.beta": float(step)}, "done" if step == 36 else "stopped", metrics)

    trials = [evaluated("a", 36, BEST), evaluated("b", 12, BEST), evaluated("c", 4, "0" * 30)]
    write_pair_results(tmp_path / "a", np.full((30, 4), 0.5), step=12, pairs="set", keep=True)
    assert (
        "It alone ran to the end. At step 12 loss.beta = 12, which was stopped there, had the same result on each of"
        in (text(trials, tmp_path))
    )
    assert (
        "At step 4 its lead over loss.beta = 4, which was stopped there, was 0.667, larger than the noise of"
        in text([trials[0], trials[2]], tmp_path)
    )
    for position, bits in ((4, "0" * 30), (36, BEST)):
        margins = np.array([float(bit) - 0.5 for bit in bits])
        results = np.column_stack((margins, margins, margins, -margins))
        write_pair_results(tmp_path / "late", results, step=position, pairs="set", keep=True)
    late = replace(trials[0], name="late")
    stopped = evaluated("d", 4, BEST)
    assert "At step 4 it was behind loss.beta = 4, which was stopped there, by 1.00." in text([late, stopped], tmp_path)
    nearly = [replace(evaluated(f"n{k}", 4, "1" * (30 - k) + "0" * k), values={"loss.beta": k / 10}) for k in (1, 2)]
    three = [stopped, *nearly]
    earlier = replace(stopped, values={"loss.beta": 3.0}, metrics=stopped.metrics | {"step": 2})
    assert "All 3 configurations that came as far tie: " in text([*three, earlier], tmp_path)
    only_stopped = text(trials[1:], tmp_path)
    assert only_stopped.startswith(
        "Pick loss.beta = 12: its eval/rewards/accuracies is 1. No trial ran to the end: it "
    )
    assert "lead" not in only_stopped, "metrics of different steps are not compared"


def test_a_trial_beyond_the_constraint_does_not_win(tmp_path: Path) -> None:
    near, far = trial("near", tmp_path, WORSE, optim__lr=1e-6), trial("far", tmp_path, BEST, optim__lr=1e-4)
    trials = [replace(t, metrics=t.metrics | {"kl": kl}) for t, kl in ((near, 3.0), (far, 30.0))]
    assert text(trials, tmp_path, Objective(ACCURACY.metric, constraint=Constraint("kl", 10.0))) == (
        "Pick optim.lr = 1e-6: its eval/rewards/accuracies is 0.6667, at a KL to the reference of 3 nats per "
        "completion. Excluded: 1 trial exceeds kl ≤ 10."
    )


def test_if_all_trials_exceed_the_constraint_the_nearest_is_named(tmp_path: Path) -> None:
    trials = [
        Trial(f"at{kl:g}", {"optim.lr": kl}, "done", {"step": 8, ACCURACY.metric: 0.5, "kl": kl})
        for kl in (30.0, 12.3, 11.0)
    ]
    trials[2] = replace(trials[2], status="failed")
    assert text(trials, tmp_path, Objective(ACCURACY.metric, constraint=Constraint("kl", 10.0))) == (
        "No trial meets kl ≤ 10; the smallest is 12.3 (trial at12.3). Excluded: 2 trials exceed kl ≤ 10 and 1 trial "
        "failed."
    )


def test_online_trials_are_paired_by_prompt(tmp_path: Path) -> None:
    trials = []
    for name, score, kl in (("a", 1.0, 4.0), ("b", 0.0, 2.0)):
        folder = tmp_path / name / "evaluations"
        folder.mkdir(parents=True)
        lines = [{"prompt_index": i, "prompt": [{"content": str(i)}], "score": score} for i in range(16)]
        (folder / "000004.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        trials.append(Trial(name, {"loss.beta": kl}, "done", {"round": 4, "heldout/score": score, "kl": kl}))
    assert text(trials, tmp_path, Objective("heldout/score")) == (
        "Pick loss.beta = 4: its heldout/score is 1, at a KL to the reference of 4 nats per completion. Its lead of "
        "1.00 over the next, loss.beta = 2, is larger than the noise of the 16 held-out prompts (the same on each); "
        "seeds were not repeated."
    )


@pytest.mark.parametrize(
    ("metric", "key", "warns"),
    [("eval/loss", "loss__beta", True), ("eval/loss", "optim__lr", False), (ACCURACY.metric, "loss__beta", False)],
)
def test_losses_of_different_beta_are_said_to_be_on_other_scales(
    metric: str, key: str, warns: bool, tmp_path: Path
) -> None:
    trials = [trial(str(value), tmp_path, BEST, loss=value, **{key: value}) for value in (0.1, 0.2)]
    assert ("is on another scale for each loss.beta" in text(trials, tmp_path, Objective(metric, "min"))) == warns


def test_without_results_by_pair_the_noise_is_said_to_be_unknown(tmp_path: Path) -> None:
    trials = [Trial(str(x), {"optim.lr": x}, "done", {"eval/rewards/accuracies": x}) for x in (0.5, 0.75)]
    assert "Its lead over the next, optim.lr = 0.5, is 0.250; how much of that is noise is not known" in text(
        trials, tmp_path
    )
