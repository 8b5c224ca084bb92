"""``jobs.offline``: prepares the data, trains on Ray, prints the result."""

import contextlib
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import ray
from rich.console import Console

from dpo_ray import storage
from dpo_ray.config import Config, with_absolute_paths
from dpo_ray.launch.cluster import Cluster
from dpo_ray.launch.data import prepare_data
from dpo_ray.launch.run_dir import exclusive_run_dir, validate_run_dir_permanent
from dpo_ray.launch.status import start_status_actor
from dpo_ray.launch.workers import train_on_workers
from dpo_ray.model.architecture import read_model_config
from dpo_ray.objective.build import build_loss
from dpo_ray.report.live.display import live_display, text_console
from dpo_ray.report.live.follower import follow_run, validate_trackers
from dpo_ray.report.summary import print_summary
from dpo_ray.train.optim import bind_optimizer

LOOP = "dpo_ray.launch.loops:offline"


def run_offline(config: Config, cluster: Cluster) -> None:
    """Trains on a fixed preference set and writes the report.

    Raises:
        ValueError: the configuration or the data are invalid.
        TrainingFailed: the workers failed.
    """
    console = text_console()
    config = with_absolute_paths(config)
    validate_offline(config)
    started = time.monotonic()
    with exclusive_run_dir(config.run):
        prepare_data(config, cluster, console)
        with monitored(config, console, title=config.run.name, started=started) as status_actor:
            train_on_workers(config, cluster, LOOP, status_actor=status_actor)


@contextlib.contextmanager
def monitored(config: Config, console: Console, *, title: str, started: float) -> Iterator[Any]:
    """Displays the StatusActor that it yields, feeds trackers and report.html, and prints the summary at the end.

    Args:
        started: ``time.monotonic()`` at the start of the run.
    """
    status_actor = start_status_actor()
    rounds = config.online.rounds if config.online else None
    with (
        live_display(
            lambda: ray.get(status_actor.read.remote(), timeout=5), title=title, rounds=rounds, console=console
        ),
        follow_run(config, partial(console.print, soft_wrap=True)),
    ):
        yield status_actor
    print_summary(config, console, seconds=time.monotonic() - started)


def validate_offline(config: Config) -> None:
    """Checks everything that can be checked before data and model are loaded."""
    validate_training(config)
    storage.validate_writable(storage.folder_at(config.run.dir), "run.dir")
    if config.reference.object_store:
        storage.validate_writable(storage.folder_at(config.reference.object_store), "reference.object_store")


def validate_training(config: Config) -> None:
    """Checks the parts that all runs have: run directory, trackers, loss, optimizer and model."""
    validate_run_dir_permanent(config.run)
    validate_trackers(config)
    build_loss(config.loss)
    bind_optimizer(config.optim)
    read_model_config(config.model.path)
    if config.shard.tensor_parallel > 1 or config.shard.context_parallel > 1 or config.model.attention != "auto":
        from dpo_ray.model.load import validate_model  # takes seconds to import

        validate_model(config.model, config.shard)
