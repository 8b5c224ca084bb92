"""``jobs.offline``: prepare the data, say what became of it, train on Ray, report."""

import time
from typing import Any

import ray
from rich.console import Console

from dpo_ray import storage
from dpo_ray.config import Config, with_absolute_paths
from dpo_ray.launch.cluster import Cluster
from dpo_ray.launch.display import shown
from dpo_ray.launch.ending import tell_end
from dpo_ray.launch.preparation import tell_data
from dpo_ray.launch.reporting import start_board
from dpo_ray.launch.workers import train_on_workers
from dpo_ray.model.architecture import read_model_config
from dpo_ray.objective.losses import build_loss
from dpo_ray.train.optim import bind_optimizer
from dpo_ray.types import Metrics

LOOP = "dpo_ray.launch.loops:offline"


def run_offline(config: Config, cluster: Cluster) -> None:
    """Train on a fixed preference set, from a configuration to a report.

    Raises:
        ValueError: the configuration, the data or the cluster cannot be used.
        TrainingFailed: the workers failed.
    """
    console = Console()
    config = with_absolute_paths(config)
    refuse_unusable(config)
    started = time.monotonic()
    tell_data(config, cluster, console)
    board = start_board()
    with shown(lambda: ray.get(board.read.remote(), timeout=5), title=config.run.name, rounds=None, console=console):
        train(config, cluster, board)
    tell_end(config, console, seconds=time.monotonic() - started)


def refuse_unusable(config: Config) -> None:
    """Check what can be checked before anything is loaded or started."""
    refuse_untrainable(config)
    storage.refuse_unusable(storage.folder_at(config.run.dir), "run.dir")
    if config.reference.object_store:
        storage.refuse_unusable(storage.folder_at(config.reference.object_store), "reference.object_store")


def refuse_untrainable(config: Config) -> None:
    """Check what every kind of run needs: model, loss and optimizer."""
    build_loss(config.loss)
    bind_optimizer(config.optim)
    read_model_config(config.model.path)
    if config.shard.tensor_parallel > 1:
        from dpo_ray.model.load import refuse_unsplittable  # takes seconds to import

        refuse_unsplittable(config.model, config.shard.tensor_parallel)


def train(config: Config, cluster: Cluster, board: Any, callbacks: list[Any] | None = None) -> Metrics:
    """One offline training run on a joined cluster: what ``jobs.offline`` and each trial of a sweep do."""
    return train_on_workers(config, cluster, LOOP, board=board, handles={}, callbacks=callbacks)
