"""``jobs.offline`` and ``jobs.sweep`` as commands."""

import csv
import json
import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from dpo_ray.config.schema import ClusterConfig
from dpo_ray.data.store import PART_RECORDS
from dpo_ray.launch.cluster import Cluster, validate_capacity
from dpo_ray.objective.logps import PairLogps
from dpo_ray.objective.losses import sigmoid
from dpo_ray.storage import folder_at
from dpo_ray.train.checkpoint_files import damaged_files
from tests.conftest import ragged_texts
from tests.distributed.processes import run_ranks
from tests.distributed.runs import offline
from tests.object_store import BUCKET, environment, free_port, port_of, served
from tests.ray.commands import TIMEOUT_S, Commands, SharedCluster, lines, pick, wait_until, write_yaml


def messages(prompt: str, chosen: str, rejected: str) -> str:
    return json.dumps(
        {
            "prompt": [{"role": "user", "content": prompt}],
            "chosen": [{"role": "assistant", "content": chosen}],
            "rejected": [{"role": "assistant", "content": rejected}],
        }
    )


def short_run(folder: Path, model: Path) -> dict[str, Any]:
    """A short run of two workers on the tiny model, with held-out pairs."""
    texts = [messages(*text) for text in ragged_texts(24)]
    (folder / "train.jsonl").write_text("\n".join(texts[:16]) + "\n")
    (folder / "eval.jsonl").write_text("\n".join(texts[16:]) + "\n")
    return {
        "run": {"dir": str(folder / "runs"), "name": "first", "save_every": 2},
        "model": {"path": str(model), "dtype": "float32"},
        "reference": {"cache_dir": str(folder / "cache")},
        "data": {"train": str(folder / "train.jsonl"), "eval": str(folder / "eval.jsonl")},
        "optim": {"lr": 1e-3, "pairs_per_step": 4},
        "cluster": {"train_workers": 2},
    }


@pytest.fixture
def config(tmp_path: Path, tiny_model: Path) -> dict[str, Any]:
    """A short run in the test's own folder."""
    return short_run(tmp_path, tiny_model)


DAMAGED = {
    "not valid JSON": '{"prompt": "cut off',
    "empty": messages("nothing chosen", "", "something"),
    "chosen equal to rejected": messages("the same twice", "one answer", "one answer"),
    "prompt too long": messages("long " * 4000, "an answer", "another answer"),
}


@dataclass(frozen=True)
class Finished:
    """A finished run."""

    folder: Path
    stdout: str
    commands: Commands


@pytest.fixture(scope="module")
def finished(
    shared_cluster: SharedCluster, tmp_path_factory: pytest.TempPathFactory, tiny_model: Path
) -> Iterator[Finished]:
    """Two steps in an object store, over a hundredth of a set of two parts and all of a small one, each with damage."""
    folder, commands = tmp_path_factory.mktemp("finished"), Commands(shared_cluster)
    config = short_run(folder, tiny_model)
    large = [messages(*text) for text in ragged_texts(PART_RECORDS + 4)]
    large[PART_RECORDS + 2] = '{"prompt": "broken'
    (folder / "large.jsonl").write_text("\n".join(large) + "\n")
    with (folder / "train.jsonl").open("a") as file:
        file.write("\n".join(DAMAGED.values()) + "\n")
    config["run"] |= {"dir": f"{BUCKET}/runs", "steps": 2}
    config["data"] |= {"train": [str(folder / "large.jsonl"), config["data"]["train"]], "weights": [0.01, 1]}
    config["data"] |= {"shuffle": False}
    config["loss"] = {"use": "simpo", "beta": 2.0}
    config["optim"] |= {"pairs_per_step": 48}
    with pytest.MonkeyPatch.context() as patch:
        for key, value in shared_cluster.store.items():
            patch.setenv(key, value)
        with served(port_of(shared_cluster.store)):
            done = commands.run("offline", write_yaml(folder / "run.yaml", config))
            assert done.returncode == 0, done.stdout + done.stderr
            yield Finished(folder, done.stdout, commands)


def test_damaged_records_are_counted_and_the_rest_is_trained_on(finished: Finished) -> None:
    named, reason = {}, ""
    for line in finished.stdout.splitlines():
        # Each reason precedes the records that it applies to.
        reason = next((known for known in DAMAGED if known in line), reason)
        if record := re.search(r"train\.jsonl:(\d+)", line):
            named[int(record[1])] = reason
    assert named == dict(enumerate(DAMAGED, 17)), finished.stdout
    assert f"large.jsonl:{PART_RECORDS + 3} (" in finished.stdout
    read = PART_RECORDS + 4 + 20
    assert f"data.train: {read:,} records read, {read - 5:,} kept, 5 dropped" in finished.stdout


def test_a_large_set_is_tokenized_on_the_cluster_and_a_mixture_of_it_is_trained_on(finished: Finished) -> None:
    metas = [json.loads(path.read_text()) for path in (finished.folder / "cache/data").glob("*/meta.json")]
    (meta,) = [meta for meta in metas if len(meta["sizes"]) == 2]
    assert meta["sizes"] == [PART_RECORDS + 3, 16]
    assert [part["pairs"] for part in meta["parts"]] == [PART_RECORDS, 3, 16]
    metrics = (folder_at(BUCKET) / "runs/first/metrics.jsonl").read_text().splitlines()
    # An epoch is a hundredth of the large set, 41 pairs, and the small one: 48 pairs of 57, then the rest.
    assert pick([json.loads(line) for line in metrics if "loss" in line], "epoch") == pytest.approx([48 / 57, 1.0])


def test_a_run_in_an_object_store_puts_every_file_there_and_leaves_no_process(finished: Finished) -> None:
    run = folder_at(BUCKET) / "runs/first"
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert pick([line for line in metrics if "loss" in line], "step") == [1, 2]
    assert pick(metrics, "eval/rewards/accuracies")
    for name in (
        "config.yaml",
        "data.json",
        "report.html",
        "logs/worker-1.log",
        "policy/config.json",
        "policy/model.safetensors",
        "checkpoints/000002/complete.json",
    ):
        assert (run / name).exists(), name
    assert not finished.commands.left_over()


def test_the_error_names_an_unreachable_store(finished: Finished, joining: Commands) -> None:
    port = free_port()
    joining.environment.update(environment(port))
    failed = joining.run("offline", finished.folder / "run.yaml")
    assert failed.returncode == 2
    message = rf"error: run\.dir: {BUCKET}/runs cannot be used: .*127\.0\.0\.1:{port}"
    assert re.search(message, failed.stderr), failed.stderr
    assert "Traceback" not in failed.stderr


def slow_sigmoid(policy: PairLogps, reference: PairLogps, *, beta: float) -> torch.Tensor:
    """DPO with time for a signal to fall into a step."""
    time.sleep(0.4)
    return sigmoid(policy, reference, beta=beta)


COMPARED = ("step", "epoch", "loss", "rewards/margins", "logps/chosen", "optim/grad_norm", "optim/lr")


def steps_of(run: Path) -> list[dict[str, Any]]:
    return [{key: line[key] for key in COMPARED} for line in lines(run / "metrics.jsonl") if "loss" in line]


def slow_run(folder: Path, model: Path) -> Path:
    """Twenty steps of half a second, and no evaluation."""
    config = short_run(folder, model)
    config["run"] |= {"epochs": 5, "export": False, "save_every": 3}
    config["data"] |= {"eval": []}
    config["loss"] = {"use": "tests.ray.test_offline_job:slow_sigmoid"}
    return write_yaml(folder / "slow.yaml", config)


@pytest.fixture
def undisturbed(tmp_path: Path, tiny_model: Path) -> list[dict[str, Any]]:
    """Steps of the slow run without interruptions, on two processes without Ray."""
    folder = tmp_path / "undisturbed"
    folder.mkdir()
    config = yaml.safe_load(slow_run(folder, tiny_model).read_text()) | {"loss": {"use": "sigmoid"}}
    reported, _ = run_ranks(2, offline, config)
    return [{key: line[key] for key in COMPARED} for line in reported]


def test_a_run_stopped_killed_and_robbed_of_a_worker_has_the_metrics_of_an_undisturbed_one(
    joining: Commands, starting: Commands, tmp_path: Path, tiny_model: Path, undisturbed: list[dict[str, Any]]
) -> None:
    slow, run = slow_run(tmp_path, tiny_model), tmp_path / "runs/first"

    def steps_done() -> int:
        return len(steps_of(run)) if (run / "metrics.jsonl").exists() else 0

    with starting.start("offline", slow, "run.save_every=100", stderr=subprocess.PIPE) as process:
        wait_until(lambda: steps_done() >= 2, process)
        os.killpg(process.pid, signal.SIGTERM)
        stderr = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 130
    stopped = steps_done()
    assert f"stopped after step {stopped} of 20; rerun the same command to resume" in stderr, stderr
    newest = max((run / "checkpoints").iterdir())
    assert int(newest.name) == stopped
    assert not damaged_files(newest)
    assert not starting.left_over()

    last = random.randrange(stopped + 1, stopped + 7)
    starting.kill_when("offline", slow, ready=lambda: steps_done() >= last)
    survived = steps_done()

    with joining.start("offline", slow) as process:
        wait_until(lambda: steps_done() >= survived + 2, process)
        # The kill may have come before or after the checkpoint of that moment was complete.
        assert resumed_after(run) in range(max(2, survived - 5), survived + 1), (survived, resumed_after(run))
        pid = int(re.findall(r"pid (\d+)", (run / "logs/worker-1.log").read_text())[-1])
        starts = len(re.findall(r"pid \d+", (run / "logs/worker-0.log").read_text()))
        os.kill(pid, signal.SIGKILL)
        assert process.wait(timeout=TIMEOUT_S) == 0
    assert len(re.findall(r"pid \d+", (run / "logs/worker-0.log").read_text())) == starts + 1, "restarted once"
    assert not joining.left_over()
    assert steps_of(run) == undisturbed, f"to the last digit; everything was killed in step {survived + 1}"


def resumed_after(run: Path) -> int:
    """The step from which the workers last resumed."""
    return int(re.findall(r"resuming after step (\d+) of 20", (run / "logs/worker-0.log").read_text())[-1])


@pytest.mark.slow
def test_a_sweep_computes_the_reference_once_and_its_best_config_runs_as_it_is(
    joining: Commands, config: dict[str, Any], tmp_path: Path
) -> None:
    config = config | {
        "cluster": {"train_workers": 1},
        "sweep": {"samples": 2, "concurrent": 1},
        "optim": {"pairs_per_step": 8},
    }
    done = joining.run("sweep", write_yaml(tmp_path / "run.yaml", config), "beta_lr")
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "runs/first"
    with (run / "sweep.csv").open() as file:
        trials = list(csv.DictReader(file))
    assert len(trials) == 2
    assert all(trial["eval/rewards/accuracies"] for trial in trials)
    assert len({trial["loss.beta"] for trial in trials}) == 2
    computed = [log for log in (run / "trials").rglob("worker-0.log") if " 16 computed" in log.read_text()]
    assert len(computed) == 1, "one trial computes the reference, the other loads it"
    spans = sorted(
        ((trial / "config.yaml").stat().st_mtime, (trial / "metrics.jsonl").stat().st_mtime)
        for trial in (run / "trials").iterdir()
    )
    assert spans[0][1] <= spans[1][0], "sweep.concurrent=1"
    assert not joining.left_over()

    best = yaml.safe_load((run / "best.yaml").read_text())
    assert str(best["loss"]["beta"]) in {trial["loss.beta"] for trial in trials}
    trained = joining.run("offline", run / "best.yaml")
    assert trained.returncode == 0, trained.stdout + trained.stderr
    assert "16 pairs cached, 0 computed" in trained.stdout, trained.stdout
    assert (tmp_path / "runs" / best["run"]["name"] / "policy/config.json").exists()
    assert (tmp_path / "runs" / best["run"]["name"] / "report.html").exists()
    assert not joining.left_over()


def test_more_workers_than_the_cluster_can_hold_fail_at_once() -> None:
    with pytest.raises(ValueError, match=r"cluster\.train_workers=8.*need 8 GPUs; the cluster has 4"):
        validate_capacity(Cluster(gpus=4, cpus=64), ClusterConfig(train_workers=8), engines=0, judges={})
    with pytest.raises(ValueError, match=r"rollout_engines=2.*need 6 CPUs; the cluster has 5"):
        validate_capacity(Cluster(gpus=0, cpus=5), ClusterConfig(train_workers=4), engines=2, judges={})
