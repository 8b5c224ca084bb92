"""Results by held-out pair of real evaluations, on one, two and four workers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dpo_ray.sweep.held_out import FILE, read_held_out
from tests.conftest import ragged_texts, save_pairs
from tests.distributed.conftest import over
from tests.distributed.processes import run_ranks
from tests.distributed.runs import offline

COLUMNS = ("loss", "margin", "correct", "chosen_log_ratio", "rejected_log_ratio")


def evaluated(ranks: int, config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The last evaluation of a run and its file."""
    run = config["run"] | {"name": str(ranks), "epochs": 1}
    lines = run_ranks(ranks, offline, over(ranks, config | {"run": run}))[0]
    folder = Path(run["dir"]) / run["name"]
    with np.load(folder / FILE) as file:
        return [line for line in lines if "eval/loss" in line][-1], dict(file)


def test_results_of_pairs_are_the_same_on_any_number_of_workers_and_their_means_are_the_metrics(
    config: dict[str, Any], tmp_path: Path
) -> None:
    held_out = save_pairs(tmp_path / "held_out.jsonl", ragged_texts(11))
    config["data"] |= {"eval": str(held_out)}
    config["optim"] |= {"tokens_per_micro_batch": 100}
    metrics, alone = evaluated(1, config)
    assert len(alone["loss"]) == 11
    assert int(alone["step"]) == metrics["step"] == 3
    assert alone["loss"].mean() == pytest.approx(metrics["eval/loss"], abs=1e-12)
    assert alone["margin"].mean() == pytest.approx(metrics["eval/rewards/margins"], abs=1e-9)
    assert alone["correct"].mean() == pytest.approx(metrics["eval/rewards/accuracies"], abs=1e-12)
    log_ratios = np.stack((alone["chosen_log_ratio"], alone["rejected_log_ratio"]))
    assert alone["margin"] == pytest.approx(0.1 * (log_ratios[0] - log_ratios[1]), abs=1e-6)
    assert np.abs(log_ratios).mean() == pytest.approx(metrics["eval/drift"], abs=1e-12)
    assert metrics["eval/drift"] > 0
    for ranks in (2, 4):
        of_ranks, results = evaluated(ranks, config)
        assert of_ranks["eval/drift"] == pytest.approx(metrics["eval/drift"], abs=1e-4)
        for column in COLUMNS:
            assert results[column] == pytest.approx(alone[column], abs=1e-4), (ranks, column)
    first, second = (read_held_out(tmp_path / name, "eval/loss", step=3) for name in "12")
    assert first is not None
    assert second is not None
    assert first.set == second.set, "the same tokenized pairs"


def test_completions_with_a_label_have_one_log_ratio_each(config: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "labeled.jsonl"
    records = [
        {"prompt": prompt, "completion": chosen, "label": i % 2 == 0}
        for i, (prompt, chosen, _) in enumerate(ragged_texts(8))
    ]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    config |= {"data": {"train": str(file), "eval": str(file)}, "loss": {"use": "kto"}}
    metrics, results = evaluated(2, config)
    assert np.isnan(results["rejected_log_ratio"]).tolist() == [i % 2 == 0 for i in range(8)]
    assert np.isnan(results["chosen_log_ratio"]).tolist() == [i % 2 == 1 for i in range(8)]
    assert results["correct"].mean() == pytest.approx(metrics["eval/rewards/accuracies"], abs=1e-12)
    values = read_held_out(tmp_path / "2", "eval/rewards/accuracies")
    assert values is not None
    assert values.examples == "completions"


def test_a_loss_without_a_reference_has_no_drift(config: dict[str, Any]) -> None:
    config["data"] |= {"eval": config["data"]["train"]}
    metrics, results = evaluated(1, config | {"loss": {"use": "simpo", "beta": 2.0}})
    assert "eval/drift" not in metrics
    assert np.isnan(results["chosen_log_ratio"]).all()
    assert results["margin"].mean() == pytest.approx(metrics["eval/rewards/margins"], abs=1e-9)


def test_a_finished_run_that_is_started_again_evaluates_nothing(config: dict[str, Any]) -> None:
    config["data"] |= {"eval": config["data"]["train"]}
    config["run"] |= {"epochs": 1, "save_every": 100}
    assert [line["step"] for line in run_ranks(1, offline, config)[0] if "eval/loss" in line] == [0, 3]
    assert run_ranks(1, offline, config)[0] == []
