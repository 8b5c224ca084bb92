"""``jobs.offline`` and ``jobs.sweep`` as commands, on a Ray cluster of this machine."""

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

from dpo_ray.data.store import PART_RECORDS
from dpo_ray.objective.logps import PairLogps
from dpo_ray.objective.losses import sigmoid
from dpo_ray.storage import folder_at
from dpo_ray.train.checkpoint_files import damaged_files
from tests.conftest import ragged_texts
from tests.distributed.processes import run_ranks
from tests.distributed.runs import offline
from tests.object_store import BUCKET, environment, free_port, served
from tests.ray.commands import (
    kill_when,
    left_over,
    lines,
    pick,
    ray_processes,
    run_command,
    start_command,
    wait_until,
    write_yaml,
)

pytestmark = pytest.mark.ray


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
    """A run that has ended."""

    folder: Path
    said: str
    before: set[int]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Finished]:
    """Two steps in an object store, over a hundredth of a set of two parts and all of a small one, each with damage."""
    folder, port, before = tmp_path_factory.mktemp("finished"), free_port(), ray_processes()
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
        for key, value in environment(port).items():
            patch.setenv(key, value)
        with served(port):
            done = run_command("offline", str(write_yaml(folder / "run.yaml", config)))
            assert done.returncode == 0, done.stdout + done.stderr
            yield Finished(folder, done.stdout, before)


def test_damaged_records_are_named_and_counted_and_the_rest_is_trained_on(finished: Finished) -> None:
    named, reason = {}, ""
    for line in finished.said.splitlines():
        # A reason stands before the first of its records.
        reason = next((known for known in DAMAGED if known in line), reason)
        if record := re.search(r"train\.jsonl:(\d+)", line):
            named[int(record[1])] = reason
    assert named == dict(enumerate(DAMAGED, 17)), finished.said
    assert f"large.jsonl:{PART_RECORDS + 3} (" in finished.said
    read = PART_RECORDS + 4 + 20
    assert f"data.train: {read:,} records read, {read - 5:,} kept, 5 dropped" in finished.said


def test_a_large_set_is_tokenised_on_the_cluster_and_a_mixture_of_it_is_trained_on(finished: Finished) -> None:
    metas = [json.loads(path.read_text()) for path in (finished.folder / "cache/data").glob("*/meta.json")]
    (meta,) = [meta for meta in metas if len(meta["sizes"]) == 2]
    assert meta["sizes"] == [PART_RECORDS + 3, 16]
    assert [part["pairs"] for part in meta["parts"]] == [PART_RECORDS, 3, 16]
    told = (folder_at(BUCKET) / "runs/first/metrics.jsonl").read_text().splitlines()
    # An epoch is a hundredth of the large set, 41 pairs, and the small one: 48 pairs of 57, then the rest.
    assert pick([json.loads(line) for line in told if "loss" in line], "epoch") == pytest.approx([48 / 57, 1.0])


def test_a_run_in_an_object_store_leaves_everything_there_and_no_process_here(finished: Finished) -> None:
    run = folder_at(BUCKET) / "runs/first"
    told = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert pick([line for line in told if "loss" in line], "step") == [1, 2]
    assert pick(told, "eval/rewards/accuracies")
    for left in (
        "config.yaml",
        "data.json",
        "report.html",
        "logs/worker-1.log",
        "policy/config.json",
        "policy/model.safetensors",
        "checkpoints/000002/complete.json",
    ):
        assert (run / left).exists(), left
    assert not left_over(finished.before)


def test_a_store_that_is_not_there_is_named(finished: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    for key, value in environment(port).items():
        monkeypatch.setenv(key, value)
    gone = run_command("offline", str(finished.folder / "run.yaml"))
    assert gone.returncode == 2
    assert re.search(rf"error: run\.dir: {BUCKET}/runs cannot be used: .*127\.0\.0\.1:{port}", gone.stderr), gone.stderr
    assert "Traceback" not in gone.stderr


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
    """The steps of the slow run when nothing happens to it, on two processes that know nothing of Ray."""
    folder = tmp_path / "undisturbed"
    folder.mkdir()
    config = yaml.safe_load(slow_run(folder, tiny_model).read_text()) | {"loss": {"use": "sigmoid"}}
    reported, _ = run_ranks(2, offline, config)
    return [{key: line[key] for key in COMPARED} for line in reported]


def test_a_run_stopped_killed_and_robbed_of_a_worker_has_the_metrics_of_an_undisturbed_one(
    tmp_path: Path, tiny_model: Path, undisturbed: list[dict[str, Any]]
) -> None:
    slow, run, before = str(slow_run(tmp_path, tiny_model)), tmp_path / "runs/first", ray_processes()

    def steps_done() -> int:
        return len(steps_of(run)) if (run / "metrics.jsonl").exists() else 0

    def stop(number: int, step: int) -> int:
        """Send a signal after ``step``: a checkpoint is written first and the end is told; returns the last step."""
        with start_command("offline", slow, "run.save_every=100", stderr=subprocess.PIPE) as process:
            wait_until(lambda: steps_done() >= step, process)
            os.kill(process.pid, number)
            said = process.communicate(timeout=60)[1].decode()
        assert process.returncode == 130
        stopped = steps_done()
        assert f"stopped after step {stopped} of 20; the same command goes on from there" in said, said
        newest = max((run / "checkpoints").iterdir())
        assert int(newest.name) == stopped
        assert not damaged_files(newest)
        assert not left_over(before)
        return stopped

    stopped = stop(signal.SIGINT, 2)

    at = random.randrange(stopped + 1, stopped + 7)
    kill_when("offline", slow, ready=lambda: steps_done() >= at)
    survived = steps_done()

    stopped = stop(signal.SIGTERM, survived + 1)
    # The checkpoint being written when everything was killed may have come to its end; the one before it has.
    assert resumed_after(run) in range(max(2, survived - 5), survived + 1), (survived, resumed_after(run))

    with start_command("offline", slow) as process:
        wait_until(lambda: steps_done() >= stopped + 2, process)
        pid = int(re.findall(r"pid (\d+)", (run / "logs/worker-1.log").read_text())[-1])
        starts = len(re.findall(r"pid \d+", (run / "logs/worker-0.log").read_text()))
        os.kill(pid, signal.SIGKILL)
        assert process.wait(timeout=120) == 0
    assert len(re.findall(r"pid \d+", (run / "logs/worker-0.log").read_text())) == starts + 1, "started once more"
    assert not left_over(before)
    assert steps_of(run) == undisturbed, f"to the last digit; everything was killed in step {survived + 1}"


def resumed_after(run: Path) -> int:
    """The step that the workers last went on from."""
    return int(re.findall(r"resuming after step (\d+) of 20", (run / "logs/worker-0.log").read_text())[-1])


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
    assert "16 pairs found, 0 scored" in trained.stdout, trained.stdout
    assert (tmp_path / "runs" / best["run"]["name"] / "policy/config.json").exists()
    assert (tmp_path / "runs" / best["run"]["name"] / "report.html").exists()
    assert not left_over(before)


def test_more_workers_than_the_cluster_can_hold_are_refused_and_not_waited_for(
    config: dict[str, Any], tmp_path: Path
) -> None:
    from dpo_ray.config.schema import ClusterConfig
    from dpo_ray.launch.cluster import Cluster, validate_capacity

    with pytest.raises(ValueError, match=r"cluster\.train_workers=8.*need 8 GPUs; the cluster has 4"):
        validate_capacity(Cluster(gpus=4, cpus=64, nodes=1), ClusterConfig(train_workers=8), engines=0)
    with pytest.raises(ValueError, match=r"rollout_engines=2.*need 6 CPUs; the cluster has 5"):
        validate_capacity(Cluster(gpus=0, cpus=5, nodes=1), ClusterConfig(train_workers=4), engines=2)
