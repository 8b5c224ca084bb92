"""``jobs.offline``: prepare the data, say what became of it, train on Ray, report."""

import time
from typing import Any

import ray
import torch
from rich.console import Console

from dpo_ray import storage
from dpo_ray.config import Config, with_absolute_paths
from dpo_ray.launch.cluster import Cluster, joined
from dpo_ray.launch.display import shown
from dpo_ray.launch.ending import tell_end
from dpo_ray.launch.preparation import open_pairs, tell_data
from dpo_ray.launch.reporting import RunReporter, StatusBoard
from dpo_ray.launch.workers import train_on_workers
from dpo_ray.model.load import refuse_unusable_model
from dpo_ray.objective.losses import build_loss
from dpo_ray.train.offline import train_offline
from dpo_ray.train.optim import bind_optimizer
from dpo_ray.types import Ending, Metrics

LOOP = f"{__name__}:loop"


def run_offline(config: Config) -> None:
    """Train on a fixed preference set, from a configuration to a report.

    Raises:
        ValueError: the configuration, the data or the cluster cannot be used.
        TrainingFailed: the workers failed.
    """
    console = Console()
    config = with_absolute_paths(config)
    refuse_unusable(config)
    started = time.monotonic()
    with joined(config.cluster, engines=0) as cluster:
        tell_data(config, cluster, console)
        board: Any = ray.remote(num_cpus=0)(StatusBoard).remote()
        with shown(
            lambda: ray.get(board.read.remote(), timeout=5), title=config.run.name, rounds=None, console=console
        ):
            train(config, cluster, board)
    tell_end(config, console, seconds=time.monotonic() - started)


def refuse_unusable(config: Config) -> None:
    """Check what can be checked before anything is loaded or started."""
    if not config.data.train:
        raise ValueError("data.train is empty: give files of preference pairs, or a hub dataset")
    build_loss(config.loss)
    bind_optimizer(config.optim)
    refuse_unusable_model(config.model, tensor_parallel=config.shard.tensor_parallel)
    storage.refuse_unusable(storage.folder_at(config.run.dir), "run.dir")
    if config.reference.object_store:
        storage.refuse_unusable(storage.folder_at(config.reference.object_store), "reference.object_store")


def train(config: Config, cluster: Cluster, board: Any, callbacks: list[Any] | None = None) -> Metrics:
    """One offline training run on a joined cluster: what ``jobs.offline`` and each trial of a sweep do."""
    return train_on_workers(config, cluster, LOOP, board=board, handles={}, callbacks=callbacks)


def loop(config: Config, device: torch.device, reporter: RunReporter, handles: dict[str, Any]) -> Ending:
    """What one rank runs."""
    pairs, held_out = open_pairs(config)
    return train_offline(config, pairs=pairs, held_out=held_out, device=device, reporter=reporter)
