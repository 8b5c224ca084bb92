"""``jobs.offline`` and ``jobs.sweep`` as commands, on a Ray cluster of this machine."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import ragged_texts
from tests.ray.commands import left_over, lines, pick, ray_processes, run_command, write_yaml

pytestmark = pytest.mark.ray


def messages(prompt: str, chosen: str, rejected: str) -> str:
    return json.dumps(
        {
            "prompt": [{"role": "user", "content": prompt}],
            "chosen": [{"role": "assistant", "content": chosen}],
            "rejected": [{"role": "assistant", "content": rejected}],
        }
    )


@pytest.fixture
def config(tmp_path: Path, tiny_model: Path) -> dict[str, Any]:
    """A short run of two workers on the tiny model, with held-out pairs."""
    texts = [messages(*text) for text in ragged_texts(24)]
    (tmp_path / "train.jsonl").write_text("\n".join(texts[:16]) + "\n")
    (tmp_path / "eval.jsonl").write_text("\n".join(texts[16:]) + "\n")
    return {
        "run": {"dir": str(tmp_path / "runs"), "name": "first", "save_every": 2},
        "model": {"path": str(tiny_model), "dtype": "float32"},
        "reference": {"cache_dir": str(tmp_path / "cache")},
        "data": {"train": str(tmp_path / "train.jsonl"), "eval": str(tmp_path / "eval.jsonl")},
        "optim": {"lr": 1e-3, "pairs_per_step": 4},
        "cluster": {"train_workers": 2},
    }


def test_a_run_over_damaged_records_names_and_counts_each_and_trains_on_the_rest(
    config: dict[str, Any], tmp_path: Path
) -> None:
    train = Path(config["data"]["train"])
    train.write_text(
        train.read_text()
        + '{"prompt": "cut off\n'
        + messages("nothing chosen", "", "something")
        + "\n"
        + messages("the same twice", "one answer", "one answer")
        + "\n"
        + messages("long " * 4000, "an answer", "another answer")
        + "\n"
    )
    before = ray_processes()
    done = run_command("offline", str(write_yaml(tmp_path / "run.yaml", config)))
    assert done.returncode == 0, done.stdout + done.stderr
    for reason, number in (
        ("not valid JSON", 17),
        ("empty", 18),
        ("chosen equal to rejected", 19),
        ("prompt too long", 20),
    ):
        (line,) = [line for line in done.stdout.splitlines() if f"train.jsonl:{number}" in line]
        assert reason in line, line
    assert "20 records read, 16 kept, 4 dropped" in done.stdout
    run = tmp_path / "runs/first"
    steps = [line for line in lines(run / "metrics.jsonl") if "loss" in line]
    assert pick(steps, "step") == [1, 2, 3, 4]
    assert pick(lines(run / "metrics.jsonl"), "eval/rewards/accuracies")
    assert (run / "policy/model.safetensors").exists()
    assert (run / "report.html").exists()
    assert not left_over(before)

    again = run_command("offline", str(tmp_path / "run.yaml"), "run.name=second", "loss.beta=0.3")
    assert again.returncode == 0, again.stdout + again.stderr
    log = (tmp_path / "runs/second/logs/worker-0.log").read_text()
    assert "16 pairs found, 0 scored" in log, log


def test_a_sweep_scores_the_reference_once_and_its_best_runs_as_it_is(config: dict[str, Any], tmp_path: Path) -> None:
    config = config | {
        "cluster": {"train_workers": 1},
        "sweep": {"samples": 2, "concurrent": 1},
        "optim": {"pairs_per_step": 8},
    }
    before = ray_processes()
    done = run_command("sweep", str(write_yaml(tmp_path / "run.yaml", config)), "beta_lr")
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "runs/first"
    with (run / "sweep.csv").open() as file:
        trials = list(csv.DictReader(file))
    assert len(trials) == 2
    assert all(trial["eval/rewards/accuracies"] for trial in trials)
    assert len({trial["loss.beta"] for trial in trials}) == 2
    scored = [log for log in (run / "trials").rglob("worker-0.log") if " 16 scored" in log.read_text()]
    assert len(scored) == 1, "one trial scores the reference, the other finds it"
    spans = sorted(
        ((trial / "config.yaml").stat().st_mtime, (trial / "metrics.jsonl").stat().st_mtime)
        for trial in (run / "trials").iterdir()
    )
    assert spans[0][1] <= spans[1][0], "one trial at a time was asked for"
    assert not left_over(before)

    best = yaml.safe_load((run / "best.yaml").read_text())
    assert str(best["loss"]["beta"]) in {trial["loss.beta"] for trial in trials}
    trained = run_command("offline", str(run / "best.yaml"))
    assert trained.returncode == 0, trained.stdout + trained.stderr
    assert (tmp_path / "runs" / best["run"]["name"] / "policy/config.json").exists()


def test_more_workers_than_the_cluster_can_hold_are_refused_and_not_waited_for(
    config: dict[str, Any], tmp_path: Path
) -> None:
    from dpo_ray.config.schema import ClusterConfig
    from dpo_ray.launch.cluster import Cluster, refuse_too_small

    with pytest.raises(ValueError, match=r"cluster\.train_workers=8.*need 8 GPUs; the cluster has 4"):
        refuse_too_small(Cluster(gpus=4, cpus=64, nodes=1), ClusterConfig(train_workers=8), engines=0)
    with pytest.raises(ValueError, match=r"rollout_engines=2.*need 6 CPUs; the cluster has 5"):
        refuse_too_small(Cluster(gpus=0, cpus=5, nodes=1), ClusterConfig(train_workers=4), engines=2)
