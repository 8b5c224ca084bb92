"""Training workers: one function on every rank of a Ray Train run, for both loops."""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from dpo_ray.config import Config
from dpo_ray.launch.cluster import Cluster
from dpo_ray.launch.reporting import RunReporter, log_to_run
from dpo_ray.types import Metrics

Loop = Callable[[Config, torch.device, RunReporter, dict[str, Any]], Metrics]
"""A training loop on one rank: (config, device, reporter, handles) -> last metrics."""

START_FAILURES = 3
"""How often a worker group may fail to start before the run fails; Ray's own default retries for ever."""


class TrainingFailed(RuntimeError):
    """The training workers failed more often than ``cluster.max_restarts`` allows."""


def train_on_workers(
    config: Config, cluster: Cluster, loop: Loop, *, board: Any, handles: dict[str, Any], callbacks: list[Any] | None = None
) -> Metrics:
    """Run ``loop`` on ``cluster.train_workers`` workers; returns rank 0's metrics.

    Args:
        board: the StatusBoard actor.
        handles: actor handles and references that the loop needs; every worker gets them.
        callbacks: Ray Train callbacks; given by a sweep, which compares what is reported.

    Raises:
        TrainingFailed: says what the workers' error was and where their logs are.
    """
    size = config.cluster
    threads = {} if cluster.on_gpus else {"OMP_NUM_THREADS": str(size.cpus_per_worker)}
    run_dir = config.run.path.absolute()
    trainer = TorchTrainer(
        _on_each_rank,
        train_loop_config={
            "config": config.model_dump(mode="json"),
            "loop": loop,
            "board": board,
            "to_train": bool(callbacks),
            "handles": handles,
        },
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if cluster.on_gpus else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=size.train_workers,
            use_gpu=cluster.on_gpus,
            resources_per_worker={"CPU": size.cpus_per_worker, **({"GPU": 1} if cluster.on_gpus else {})},
        ),
        run_config=RunConfig(
            # Ray resumes by this name; our checkpoints are found in the run directory, so the name is always new.
            name=f"workers-{os.getpid()}-{os.urandom(4).hex()}",
            storage_path=str(run_dir / "ray"),
            failure_config=FailureConfig(max_failures=size.max_restarts, controller_failure_limit=START_FAILURES),
            callbacks=callbacks,
            worker_runtime_env={"env_vars": threads},
        ),
    )
    try:
        return trainer.fit().return_value or {}
    except ray.train.TrainingFailedError as error:
        raise TrainingFailed(f"{_cause(error)}\nThe workers' logs are in {run_dir / 'logs'}") from error


def _on_each_rank(given: dict[str, Any]) -> Metrics:
    config = Config.model_validate(given["config"])
    context = ray.train.get_context()
    run_dir = config.run.path
    log_to_run(run_dir, f"worker-{context.get_world_rank()}")
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    reporter = RunReporter(run_dir, given["board"], context.get_world_rank(), to_train=given["to_train"])
    return given["loop"](config, device, reporter, given["handles"])


def _cause(error: BaseException) -> str:
    """The innermost message of a chain of wrapped errors, with its class."""
    failures = getattr(error, "worker_failures", None)
    if failures:
        rank, failure = next(iter(sorted(failures.items())))
        inner = getattr(failure, "cause", None) or failure
        return f"training worker {rank} failed: {type(inner).__name__}: {inner}"
    return f"training failed: {error}"


def make_run_dir(config: Config) -> Path:
    """Create the run directory and write the resolved configuration to it."""
    from dpo_ray.config import write_config

    run_dir = config.run.path.absolute()
    run_dir.mkdir(parents=True, exist_ok=True)
    write_config(config, run_dir / "config.yaml")
    return run_dir
