"""Runs in an object store: the same numbers and checkpoints as on a disk."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from s3fs import S3FileSystem
from safetensors.torch import load_file

from dpo_ray.reference import shared as shared_entries
from dpo_ray.reference.shared import RemoteEntries
from dpo_ray.reference.store import ReferenceStore
from dpo_ray.storage import folder_at
from dpo_ray.train.checkpoint_files import MARKER, damaged_files
from dpo_ray.train.export import export_checkpoint, find_checkpoint
from tests.conftest import WritePairs, ragged_texts
from tests.distributed.conftest import COMPARED
from tests.distributed.processes import run_ranks
from tests.distributed.runs import offline, offline_in_store
from tests.object_store import BUCKET, environment, free_port, port_of, served


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """The environment of a server with one bucket."""
    settings = environment(free_port())
    for key, value in settings.items():
        monkeypatch.setenv(key, value)
    with served(port_of(settings)):
        yield settings
        S3FileSystem().rm(BUCKET, recursive=True)


@pytest.fixture
def config(tmp_path: Path, tiny_model: Path, write_pairs: WritePairs) -> dict[str, Any]:
    """Four steps in float32, saved every second step."""
    return {
        "run": {"dir": f"{BUCKET}/{tmp_path.name}", "name": "run", "steps": 4, "save_every": 2, "export": False},
        "model": {"path": str(tiny_model), "dtype": "float32"},
        "reference": {"cache_dir": str(tmp_path / "cache")},
        "data": {"train": str(write_pairs(ragged_texts(13)))},
        "optim": {"lr": 1e-3, "pairs_per_step": 5, "tokens_per_micro_batch": 256, "schedule": "constant"},
        "cluster": {"train_workers": 2},
    }


def checkpoints(config: dict[str, Any]) -> Path:
    return folder_at(config["run"]["dir"]) / config["run"]["name"] / "checkpoints"


def numbers(lines: list[dict[str, Any]]) -> list[dict[str, float]]:
    return [{key: line[key] for key in ("step", *COMPARED)} for line in lines]


def test_a_run_in_a_store_resumes_to_the_last_digit_and_exports(
    store: dict[str, str], config: dict[str, Any], tmp_path: Path
) -> None:
    local = config | {"run": config["run"] | {"dir": str(tmp_path / "runs"), "save_every": 100}}
    undisturbed, _ = run_ranks(2, offline, local)
    stopped, _ = run_ranks(2, offline_in_store, store, config, 2)
    resumed, _ = run_ranks(2, offline_in_store, store, config | {"run": config["run"] | {"export": True}})
    assert numbers(stopped + resumed) == numbers(undisturbed)
    assert [path.name for path in sorted(checkpoints(config).iterdir())] == ["000002", "000004"]

    export_checkpoint(find_checkpoint(checkpoints(config).parent), tmp_path / "exported")
    found = load_file(tmp_path / "exported/model.safetensors")
    (tmp_path / "policy.safetensors").write_bytes(
        (checkpoints(config).parent / "policy/model.safetensors").read_bytes()
    )
    policy = load_file(tmp_path / "policy.safetensors")
    assert policy.keys() == found.keys()
    assert all(torch.equal(found[name], policy[name]) for name in policy)
    assert (checkpoints(config).parent / "policy/config.json").exists()


def test_a_damaged_object_is_detected_and_the_previous_checkpoint_loaded(
    store: dict[str, str], config: dict[str, Any]
) -> None:
    run_ranks(2, offline_in_store, store, config)
    shard = checkpoints(config) / "000004/__1_0.distcp"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(bytes(content))
    assert damaged_files(shard.parent) == ["__1_0.distcp"]
    resumed, _ = run_ranks(2, offline_in_store, store, config)
    assert [line["step"] for line in resumed] == [3, 4]


def test_the_newest_and_the_best_checkpoints_are_kept(store: dict[str, str], config: dict[str, Any]) -> None:
    name = "eval/rewards/rejected"
    config["run"] |= {"save_every": 1, "eval_every": 1, "keep_checkpoints": 1, "best_metric": name}
    config |= {"data": config["data"] | {"eval": config["data"]["train"]}, "cluster": {"train_workers": 1}}
    (lines,) = run_ranks(1, offline_in_store, store, config)
    rejected = {line["step"]: line[name] for line in lines if name in line and line["step"]}
    best = max(rejected, key=lambda step: rejected[step])
    assert sorted(int(path.name) for path in checkpoints(config).iterdir()) == sorted({best, 4})


def test_a_server_that_dies_ends_the_run_and_names_the_last_good_checkpoint(
    monkeypatch: pytest.MonkeyPatch, config: dict[str, Any]
) -> None:
    settings = environment(free_port())
    for key, value in settings.items():
        monkeypatch.setenv(key, value)
    config |= {"run": config["run"] | {"steps": 2000}, "cluster": {"train_workers": 1}}
    with served(port_of(settings)) as server:
        marker = checkpoints(config) / "000002" / MARKER
        ended: list[float] = []

        def stop() -> None:
            while not marker.exists():
                time.sleep(0.05)
            server.stop()
            ended.append(time.monotonic())

        thread = threading.Thread(target=stop, daemon=True)
        thread.start()
        with pytest.raises(
            Exception, match=r"s3://.*could not be written \(.*127\.0\.0\.1.*last good checkpoint is s3://"
        ):
            run_ranks(1, offline_in_store, settings, config)
        thread.join()
        assert time.monotonic() - ended[0] < 30


def sharing(config: dict[str, Any], cluster: Path) -> dict[str, Any]:
    """The run on a cluster of its own, that shares its reference cache through the bucket."""
    return config | {
        "run": {"dir": str(cluster / "runs"), "steps": 2, "export": False, "save_every": None},
        "reference": {"cache_dir": str(cluster / "cache"), "object_store": f"{BUCKET}/reference"},
    }


def cached(config: dict[str, Any], pattern: str) -> list[Path]:
    return sorted((Path(config["reference"]["cache_dir"]) / "reference").rglob(pattern))


def test_a_cluster_loads_references_that_another_computed_and_adds_missing_ones(
    store: dict[str, str], config: dict[str, Any], tmp_path: Path, write_pairs: WritePairs
) -> None:
    here, there = sharing(config, tmp_path / "here"), sharing(config, tmp_path / "there")
    run_ranks(1, offline_in_store, store, here)
    run_ranks(2, offline_in_store, store, there)
    assert [file.name for file in cached(there, "*.npy")] == [
        file.name for file in cached(here, "*.npy") if file.name.startswith("view")
    ], "the view sufficed, and nothing was computed"
    assert not list((folder_at(BUCKET) / "reference").rglob("*.lock"))

    more = {"data": {"train": str(write_pairs(ragged_texts(17)))}}
    run_ranks(1, offline_in_store, store, there | more)
    assert sorted(len(np.load(shard)) for shard in cached(there, "shard-*.npy")) == [2 * 4, 2 * 13]
    shared = {file.name for file in (folder_at(BUCKET) / "reference").rglob("shard-*.npy")}
    assert shared == {file.name for file in cached(there, "shard-*.npy")}


def test_a_damaged_view_in_the_store_is_detected_and_rebuilt(
    store: dict[str, str], config: dict[str, Any], tmp_path: Path
) -> None:
    here, there = sharing(config, tmp_path / "here"), sharing(config, tmp_path / "there")
    run_ranks(1, offline_in_store, store, here)
    (view,) = (folder_at(BUCKET) / "reference").rglob("view-*.npy")
    intact = view.read_bytes()
    view.write_bytes(intact[:-3] + b"###")
    (lines,) = run_ranks(1, offline_in_store, store, there)
    assert lines[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert view.read_bytes() == intact, "rebuilt from the entries, which are equal"


def test_clusters_build_one_at_a_time_and_take_over_from_one_that_died(
    store: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_entries, "LOCK_POLL_S", 0.0)
    monkeypatch.setattr(shared_entries, "HEARTBEAT_S", 0.0)
    folder = folder_at(BUCKET) / "reference"
    first, second = (RemoteEntries(folder, stale_s=0.5) for _ in range(2))
    assert first.acquire()
    for _ in range(4):
        assert not second.acquire()
        time.sleep(0.2)
        first.heartbeat()
    time.sleep(0.6)
    assert not second.acquire(), "the first look at the last heartbeat"
    time.sleep(0.6)
    assert [second.acquire(), second.acquire()] == [False, True], "silent for 0.6 s: removed, then free"
    first.release()
    assert not RemoteEntries(folder, stale_s=0.5).acquire(), "the first builder woke up and must not free another's"
    second.release()
    assert RemoteEntries(folder, stale_s=0.5).acquire()


def test_without_the_store_a_run_keeps_its_own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in environment(free_port()).items():
        monkeypatch.setenv(key, value)
    S3FileSystem.clear_instance_cache()
    lost = ReferenceStore(tmp_path, folder_at(BUCKET) / "reference")
    lost.fetch("pairs")
    assert lost.acquire()
    view = lost.add_view("pairs", np.zeros((1, 2)))
    assert lost.find_view("pairs") == view
    lost.release()
    assert lost.acquire()
