"""Errors after which the training workers are restarted, errors that end the run, and those that end a trial only."""

import errno
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import ray.train
import torch
from ray.exceptions import GetTimeoutError, RayActorError

from dpo_ray.config import Config
from dpo_ray.launch import workers
from dpo_ray.launch.sweeps import slot_worker
from dpo_ray.launch.sweeps.mailbox import NO_MORE, Task
from dpo_ray.launch.workers import collective_timeout_s, is_retryable
from dpo_ray.types import TrainResult


@pytest.mark.parametrize(
    ("error", "retryable"),
    [
        (ValueError("bad data"), False),
        (torch.OutOfMemoryError("no memory left"), False),
        (OSError(errno.ENOSPC, "no space left"), False),
        (ConnectionError("connection reset by peer"), True),
        (RuntimeError("gloo: connection closed by peer"), True),
    ],
)
def test_broken_connections_are_retried_and_errors_that_would_repeat_are_not(
    monkeypatch: pytest.MonkeyPatch, error: Exception, retryable: bool
) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert is_retryable(error) is retryable


def test_an_error_after_ray_tore_down_the_process_group_is_retried() -> None:
    assert not torch.distributed.is_initialized()
    assert is_retryable(ValueError("Default process group has not been initialized"))


@pytest.mark.parametrize(
    ("timeouts", "waits"),
    [
        ({}, 300 + 1800 + 600),
        ({"generate_timeout_s": 7200}, 300 + 7200 + 600),
        ({"sync_timeout_s": 3000}, 2 * 3000 + 300 + 3000),
    ],
    ids=["default", "start of an update", "end of an update, then the collector"],
)
def test_rank_0_gives_up_waiting_for_the_other_actors_before_the_other_ranks_give_up_on_it(
    timeouts: dict[str, float], waits: float
) -> None:
    config = Config.model_validate({"model": {"path": "m"}, "online": {"prompts": "p.jsonl", **timeouts}})
    assert waits + 120 < collective_timeout_s(config) < waits + 600


@pytest.mark.parametrize("error", [RayActorError(), GetTimeoutError("no answer")], ids=["dead", "hung"])
def test_a_run_outlives_its_status_actor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception) -> None:
    """Workers that are restarted ask it for an error that would repeat, and report such an error to it."""

    def get(ref: Any, *, timeout: float) -> Any:
        raise error

    def fail(*arguments: Any) -> TrainResult:
        raise ValueError("bad data")

    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(ray.train, "get_context", lambda: SimpleNamespace(get_world_rank=lambda: 1))
    monkeypatch.setattr(workers, "log_to_run", lambda run_dir, name: None)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    config = Config.model_validate({"model": {"path": "m"}, "run": {"dir": str(tmp_path)}})
    config.run.path.mkdir()
    (config.run.path / "config.yaml").touch()
    arguments = {"config": config.model_dump(mode="json"), "status_actor": MagicMock(), "on_gpus": False}
    arguments |= {"loop": "loop", "rollouts": None, "trial": None}

    monkeypatch.setattr(workers, "resolve", lambda *_: lambda *_: TrainResult({"loss": 1.0}))
    assert workers._run_worker(arguments)["metrics"] == {"loss": 1.0}
    monkeypatch.setattr(workers, "resolve", lambda *_: fail)
    with pytest.raises(ValueError, match="bad data"):
        workers._run_worker(arguments)


class FakeChannel:
    """Answers ``idle`` with trials ``0``, ``1``, ... and records all other messages."""

    def __init__(self, folder: Path, trials: int) -> None:
        config = Config.model_validate({"model": {"path": "m"}, "run": {"dir": str(folder)}}).model_dump(mode="json")
        self.tasks = [*(Task(str(number), config) for number in range(trials)), NO_MORE]
        self.messages: list[tuple[Any, ...]] = []

    def message(self, kind: str) -> str:
        return kind

    def ask_once(self, message: str) -> Task:
        return self.tasks.pop(0)

    def ask(self, *message: Any) -> str:
        self.messages.append(message)
        return "continue"


class Memory:
    """Stands for a trainer or a batch; modules and their hooks refer to each other."""

    def __init__(self) -> None:
        self.hook = self


@pytest.mark.parametrize("error", [ValueError("no pair is left"), torch.OutOfMemoryError("CUDA out of memory")])
@pytest.mark.usefixtures("one_rank")
def test_a_failed_trial_is_reported_and_its_memory_is_free_when_the_next_one_starts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception
) -> None:
    of_failed: list[weakref.ref[Memory]] = []
    alive_later: list[bool] = []

    def train(config: Config, *, shared: Any, **arguments: Any) -> None:
        if of_failed:
            alive_later.extend(memory() is not None for memory in of_failed)
            return
        shared.trainer = trainer = Memory()
        batch = Memory()
        of_failed.extend(map(weakref.ref, (trainer, batch)))
        raise type(error)(*error.args)

    monkeypatch.setattr(ray.train, "get_context", lambda: SimpleNamespace(get_world_rank=lambda: 0))
    monkeypatch.setattr(slot_worker, "log_to_run", lambda run_dir, name: None)
    monkeypatch.setattr(slot_worker, "open_pairs", lambda config: (None, None))
    monkeypatch.setattr(slot_worker, "train_offline", train)
    channel: Any = FakeChannel(tmp_path, trials=2)
    slot_worker.run_trials(channel, torch.device("cpu"))
    assert channel.messages == [
        ("failed", "0", (f"{type(error).__name__}: {error}", False)),
        ("finished", "1"),
    ]
    assert alive_later == [False, False], "trainer and batch of the failed trial"
