"""Leads, ties and neighbors on planted held-out results."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dpo_ray.sweep.bootstrap import bootstrap_interval
from dpo_ray.sweep.held_out import FILE, mean_held_out, paired, read_held_out, write_pair_results
from dpo_ray.sweep.trials import Objective, Trial
from dpo_ray.sweep.verdict import as_good_region, build_verdict
from tests.unit.sweep.runs import ACCURACY, trial


def test_the_lead_is_paired_over_the_same_pairs(tmp_path: Path) -> None:
    # Both miss different pairs: paired differences have one +1 more than -1.
    first, second = "1" * 14 + "1110" + "11", "1" * 14 + "0011" + "11"
    verdict = build_verdict([trial("b", tmp_path, second), trial("a", tmp_path, first)], ACCURACY, tmp_path)
    (lead,) = verdict.leads
    assert verdict.pick is not None
    assert verdict.pick.name == "a"
    assert lead.difference == pytest.approx(0.05)
    assert (lead.low, lead.high) == bootstrap_interval(np.array([0.0] * 16 + [1, 1, 0, -1]))
    assert (lead.level, lead.examples, lead.unit) == ("tie", 20, "pairs")


def test_a_lead_on_a_third_of_thirty_pairs_is_clear_and_identical_trials_are_not(tmp_path: Path) -> None:
    best, twin, worse = "1" * 30, "1" * 30, "1" * 20 + "0" * 10
    trials = [trial(name, tmp_path, bits) for name, bits in (("a", best), ("twin", twin), ("worse", worse))]
    verdict = build_verdict(trials, ACCURACY, tmp_path)
    assert [(lead.level, lead.identical) for lead in verdict.leads] == [("tie", True), ("clear", False)]


def test_a_metric_to_minimize_leads_with_the_smaller_value(tmp_path: Path) -> None:
    trials = [trial("a", tmp_path, "1" * 10, loss=0.5), trial("b", tmp_path, "1" * 10, loss=0.7)]
    verdict = build_verdict(trials, Objective("eval/loss", "min"), tmp_path)
    assert verdict.leads[0].difference == pytest.approx(0.2)
    assert (verdict.leads[0].low, verdict.leads[0].level) == (pytest.approx(0.2), "clear")


def test_the_noise_of_seeds_can_hide_a_lead_that_the_held_out_set_shows(tmp_path: Path) -> None:
    bits = {"a0": ("1" * 30, 0, 0.1), "a1": ("1" * 20 + "0" * 10, 1, 0.1), "b0": ("1" * 15 + "0" * 15, 0, 0.2)}
    trials = [
        trial(name, tmp_path, pairs, loss__beta=beta, run__seed=seed) for name, (pairs, seed, beta) in bits.items()
    ]
    (lead,) = build_verdict(trials, ACCURACY, tmp_path).leads
    # a: 1 and 2/3, mean 5/6; deviation sqrt(1/18); b: 1/2. Half interval 12.706 * sqrt(1/18) * sqrt(1/2 + 1).
    assert lead.difference == pytest.approx(1 / 3)
    assert lead.exceeds_examples
    assert lead.seed_margin == pytest.approx(12.706 * (1 / 18) ** 0.5 * 1.5**0.5)
    assert lead.level == "tie"


def test_results_of_another_step_another_set_or_a_damaged_file_are_not_compared(tmp_path: Path) -> None:
    best, other = trial("a", tmp_path, "1111"), trial("b", tmp_path, "1000")
    assert build_verdict([best, other], ACCURACY, tmp_path).leads[0].examples == 4
    later = replace(other, metrics=other.metrics | {"step": 9})
    assert build_verdict([best, later], ACCURACY, tmp_path).leads[0].level == "unknown"
    write_pair_results(tmp_path / "b", np.zeros((4, 4)), step=8, pairs="another set")
    assert build_verdict([best, other], ACCURACY, tmp_path).leads[0].level == "unknown"
    (tmp_path / "b" / FILE).write_bytes(b"PK\3\4")
    assert build_verdict([best, other], ACCURACY, tmp_path).leads[0].level == "unknown"


def grid(folder: Path, rows: dict[float, dict[float, int]]) -> list[Trial]:
    """Trials over beta and lr with so many of 40 pairs right."""
    return [
        trial(f"{beta}-{lr}", folder, "1" * right + "0" * (40 - right), loss__beta=beta, optim__lr=lr)
        for beta, row in rows.items()
        for lr, right in row.items()
    ]


def test_neighbors_as_good_are_spans_of_values_at_fixed_ones(tmp_path: Path) -> None:
    rows = {0.05: {1e-5: 35, 1e-4: 20}, 0.1: {1e-5: 36, 1e-4: 20}, 0.2: {1e-5: 34, 1e-4: 20}, 0.5: {1e-5: 20, 1e-4: 10}}
    region = as_good_region(build_verdict(grid(tmp_path, rows), ACCURACY, tmp_path))
    assert region is not None
    assert (region.spans, region.fixed) == ({"loss.beta": (0.05, 0.2)}, {"optim.lr": 1e-5})
    assert len(region.members) == 2


def test_a_worse_or_failed_trial_within_the_spans_ends_the_region(tmp_path: Path) -> None:
    rows = {0.05: {1e-5: 36}, 0.1: {1e-5: 35}, 0.2: {1e-5: 20}, 0.5: {1e-5: 35}}
    trials = grid(tmp_path, rows)
    region = as_good_region(build_verdict(trials, ACCURACY, tmp_path))
    assert region is not None
    assert region.spans == {"loss.beta": (0.05, 0.1)}, "0.5 is as good, but 0.2 between them is not"
    failed = replace(trials[1], name="failed", values={"loss.beta": 0.07, "optim.lr": 1e-5}, status="failed")
    assert as_good_region(build_verdict([*trials, failed], ACCURACY, tmp_path)) is None


def test_scores_are_paired_by_prompt(tmp_path: Path) -> None:
    scores: dict[str, dict[str, float | None]] = {"a": {"x": 0.9, "y": 0.5, "z": None}, "b": {"y": 0.4, "x": 0.1}}
    for name, of_prompts in scores.items():
        for version, shift in ((0, -1.0), (3, 0.0)):
            file = tmp_path / name / "evaluations" / f"{version:06d}.jsonl"
            file.parent.mkdir(parents=True, exist_ok=True)
            lines = [
                {"prompt_index": ord(p), "prompt": [{"role": "user", "content": p}], "score": s and s + shift}
                for p, s in of_prompts.items()
            ]
            file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    first, second = (read_held_out(tmp_path / name, "heldout/score") for name in ("a", "b"))
    assert first is not None
    assert second is not None
    assert [column.tolist() for column in paired(first, second)] == [[0.9, 0.5], [0.1, 0.4]]
    mean = mean_held_out([first, second])
    assert mean is not None
    assert mean.values.tolist() == [0.5, 0.45]
    assert read_held_out(tmp_path / "a", "heldout/win_rate") is None


def test_a_margin_of_zero_is_not_correct_as_in_the_metric(tmp_path: Path) -> None:
    write_pair_results(tmp_path, np.array([[0.1, 2.0, 1, -1], [0.2, 0.0, 0, 0], [0.3, -1.0, -1, 1]]), step=0, pairs="s")
    accuracy, loss = (read_held_out(tmp_path, f"eval/{name}") for name in ("rewards/accuracies", "loss"))
    assert accuracy is not None
    assert loss is not None
    assert accuracy.values.tolist() == [1.0, 0.0, 0.0]
    assert loss.values.tolist() == [0.1, 0.2, 0.3]
