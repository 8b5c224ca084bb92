"""Joining a Ray cluster, or starting one on this machine, and refusing what it cannot hold."""

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from dpo_ray.config.schema import ClusterConfig
from dpo_ray.warnings_filter import filter_import_warnings

ENVIRONMENT = {
    # Ray Train drains what workers report at this interval; at the default of 2 s each report costs 2 s.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    # Relative paths of the configuration mean the same in every process.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}

SPARE_CPUS = 2
"""Logical CPUs a local cluster has beyond what the run asks for: judges, sweeps and helpers, which mostly wait."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """What the run has joined."""

    gpus: int
    """GPUs of all nodes."""
    cpus: int
    nodes: int

    @property
    def on_gpus(self) -> bool:
        """Whether training and generation use GPUs."""
        return self.gpus > 0


def cpus_needed(config: ClusterConfig, engines: int, *, runs: int = 1, on_gpus: bool = False) -> int:
    """CPUs that ``runs`` runs with ``engines`` engines each ask for.

    Engines on the GPUs of training workers ask for none: the workers wait while they write.
    """
    per_engine = 0 if on_gpus and config.colocate else config.cpus_per_engine
    return runs * (config.train_workers * config.cpus_per_worker + engines * per_engine)


def runs_that_fit(config: ClusterConfig) -> int:
    """Offline runs that this machine's cores hold at a time; one at least."""
    return max(1, (os.cpu_count() or 1) // cpus_needed(config, 0))


def gpus_needed(config: ClusterConfig, engines: int) -> int:
    """GPUs that a run on a cluster with GPUs asks for."""
    return config.train_workers + (0 if config.colocate else engines * config.gpus_per_engine)


def set_environment(config: ClusterConfig) -> None:
    """Set what Ray reads from the environment, some of it as it is imported, where nobody else has."""
    filter_import_warnings()
    waits = {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": f"{config.start_timeout_s:g}"}
    for name, value in {**ENVIRONMENT, **waits}.items():
        os.environ.setdefault(name, value)


@contextlib.contextmanager
def ray_cluster(config: ClusterConfig, *, engines: int, local_runs: int = 1) -> Iterator[Cluster]:
    """Join a running cluster (``RAY_ADDRESS``, a submitted job, ``ray start``) or start one here; leave it at the end.

    A cluster started here counts logical CPUs, as many as the run needs: a laptop's two cores hold two workers and an
    engine. SIGTERM ends the run as Ctrl-C does.

    Args:
        engines: rollout engines of the run.
        local_runs: runs at a time that a cluster started here should hold.

    Raises:
        ValueError: the cluster is too small for the run; says what is asked and what there is.
    """
    set_environment(config)
    import ray

    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    cpus = max(os.cpu_count() or 1, cpus_needed(config, engines, runs=local_runs)) + SPARE_CPUS
    try:
        # The dashboard serves the State API, without which Ray Train cannot see and free what a killed run held.
        ray.init(num_cpus=cpus, include_dashboard=True, **quiet)
        # An actor that waits for nodes to be taken away, while the workers need the cores to start.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    except ValueError:
        # There is a cluster to join, which has its own CPUs. Not address="auto": it joins any cluster on this machine,
        # also the one that another run started for itself.
        ray.init(**quiet)
    try:
        with _sigterm_as_interrupt():
            resources = ray.cluster_resources()
            nodes = [node for node in ray.nodes() if node["Alive"]]
            cluster = Cluster(int(resources.get("GPU", 0)), int(resources.get("CPU", 0)), len(nodes))
            validate_capacity(cluster, config, engines)
            yield cluster
    finally:
        ray.shutdown()


def same_node() -> Any:
    """The scheduling strategy that keeps an actor on this process's node."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def validate_capacity(cluster: Cluster, config: ClusterConfig, engines: int) -> None:
    """Raise a ValueError when the run could never be placed: waiting would be forever."""
    asked = f"cluster.train_workers={config.train_workers}" + (
        f" and cluster.rollout_engines={engines}" if engines else ""
    )
    if cluster.on_gpus:
        needed = gpus_needed(config, engines)
        if needed > cluster.gpus:
            raise ValueError(
                f"{asked} (cluster.gpus_per_engine={config.gpus_per_engine}) need {needed} GPUs; "
                f"the cluster has {cluster.gpus}"
            )
    needed = cpus_needed(config, engines, on_gpus=cluster.on_gpus)
    if needed > cluster.cpus:
        raise ValueError(
            f"{asked} (cluster.cpus_per_worker={config.cpus_per_worker}, "
            f"cluster.cpus_per_engine={config.cpus_per_engine}) need {needed} CPUs; the cluster has {cluster.cpus}"
        )


@contextlib.contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    # Installed after ray.init, which replaces the handler; signals reach the main thread only.
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(signum: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
