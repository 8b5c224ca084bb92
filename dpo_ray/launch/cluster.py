"""Connects to a Ray cluster, or starts one on this machine, and checks that the run fits."""

import contextlib
import logging
import math
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dpo_ray.config.rounds import JudgeConfig
from dpo_ray.config.schema import ClusterConfig
from dpo_ray.warnings_filter import filter_import_warnings

ENVIRONMENT = {
    # Ray Train collects reports at this interval; at the default of 2 s each report costs 2 s.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    # Workers keep the driver's working directory, against which relative paths are resolved.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}

DASHBOARD_MODULES = "StateHead"
"""Modules of the dashboard of a local cluster. A cluster that ``ray start`` has started has all modules."""
SPARE_CPUS = 2
"""Logical CPUs of a local cluster beyond those of the run, for judges, trials and tasks that mostly wait."""

Judges = Mapping[str, JudgeConfig]
"""``OnlineConfig.started_judges``, none offline."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """Resources of the Ray cluster, summed over its nodes."""

    gpus: int
    cpus: int

    @property
    def on_gpus(self) -> bool:
        """True if training and generation use GPUs."""
        return self.gpus > 0


def cpus_needed(config: ClusterConfig, engines: int, *, runs: int = 1, on_gpus: bool = False) -> int:
    """CPUs of ``runs`` concurrent runs with ``engines`` engines each.

    Engines on the GPUs of training workers need none: the workers wait while the engines generate.
    """
    per_engine = 0 if on_gpus and config.colocate else config.cpus_per_engine
    return runs * (config.train_workers * config.cpus_per_worker + engines * per_engine)


def runs_that_fit(config: ClusterConfig, engines: int = 0) -> int:
    """Runs with ``engines`` engines each that fit this machine's cores at once; at least one."""
    return max(1, (os.cpu_count() or 1) // cpus_needed(config, engines))


def gpus_needed(config: ClusterConfig, engines: int, judges: Judges) -> float:
    """GPUs of a run on a cluster with GPUs; processes of judges may share one."""
    return _total(_gpus_by_key(config, engines, judges))


def _gpus_by_key(config: ClusterConfig, engines: int, judges: Judges, *, on_gpus: bool = True) -> dict[str, float]:
    """GPUs that a run asks for, by the keys that ask for them."""
    gpus: dict[str, float] = {}
    if on_gpus:
        gpus[f"cluster.train_workers={config.train_workers}"] = config.train_workers
    if on_gpus and engines and not config.colocate:
        key = f"cluster.rollout_engines={engines} x cluster.gpus_per_engine={config.gpus_per_engine}"
        gpus[key] = engines * config.gpus_per_engine
    for name, judge in judges.items():
        if judge.num_gpus:
            key = f"online.{name}.replicas={judge.replicas} x online.{name}.num_gpus={judge.num_gpus:g}"
            # A process has its fraction on one GPU: of more than a half, only one fits.
            gpus[key] = judge.replicas * (judge.num_gpus if judge.num_gpus <= 0.5 else math.ceil(judge.num_gpus))
    return gpus


def _total(gpus: Mapping[str, float]) -> float:
    """The sum in the precision of Ray, which counts ten-thousandths of a GPU."""
    return round(sum(gpus.values()), 4)


def set_environment(config: ClusterConfig) -> None:
    """Sets the environment variables that Ray reads, some of them on import; existing values are kept."""
    filter_import_warnings()
    timeouts = {
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": f"{config.start_timeout_s:g}",
        "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": f"{config.worker_timeout_s:g}",
    }
    for name, value in {**ENVIRONMENT, **timeouts}.items():
        os.environ.setdefault(name, value)


@contextlib.contextmanager
def ray_cluster(
    config: ClusterConfig, *, engines: int, judges: Judges | None = None, local_runs: int = 1
) -> Iterator[Cluster]:
    """Connects to the running cluster (``RAY_ADDRESS``, a submitted job, ``ray start``) or starts a local one.

    A local cluster gets enough logical CPUs for the run, even on a machine with fewer cores. SIGTERM ends the run like
    Ctrl-C.

    Args:
        judges: ``OnlineConfig.started_judges`` of an online run.
        local_runs: concurrent runs for which a local cluster is sized.

    Raises:
        ValueError: the connection fails, or the run does not fit the cluster.
    """
    set_environment(config)
    import ray

    _connect(max(os.cpu_count() or 1, cpus_needed(config, engines, runs=local_runs)) + SPARE_CPUS)
    try:
        with _sigterm_as_interrupt():
            resources = ray.cluster_resources()
            cluster = Cluster(gpus=int(resources.get("GPU", 0)), cpus=int(resources.get("CPU", 0)))
            validate_capacity(cluster, config, engines, judges or {})
            yield cluster
    finally:
        ray.shutdown()


def _connect(local_cpus: int) -> None:
    import ray

    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        with _lean_services():
            # It serves the State API, which Ray Train needs to free the resources of a killed run.
            ray.init(num_cpus=local_cpus, include_dashboard=True, **quiet)
    except ValueError:  # a running cluster has its own CPUs
        try:
            # Not address="auto", which would also join the private cluster of another run on this machine.
            ray.init(**quiet)
        except (ConnectionError, ray.exceptions.AuthenticationError) as error:
            raise ValueError(_connection_advice(error)) from None
    else:
        # The watcher waits for nodes to be preempted, and takes a core while the workers start.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")


@contextlib.contextmanager
def _lean_services() -> Iterator[None]:
    """Starts the services of a local cluster in process groups of their own, with a smaller dashboard.

    SIGTERM to the group of this process, as ``timeout`` and ``kill -- -PGID`` send it, must reach the run, which saves
    a checkpoint, and not the cluster that it needs for that. Ray shields its services from Ctrl-C only.

    The other modules of the dashboard are a process each, and take both cores of a small machine while workers start.
    """
    from ray._private import services

    if sys.platform != "linux":  # elsewhere Ray kills the services of a dead driver by their common group
        yield
        return

    class OwnGroup(services.ConsolePopen):
        def __init__(self, command: list[str], *args: Any, **named: Any) -> None:
            if any(part.endswith("/dashboard.py") for part in command):
                command = [*command, f"--modules-to-load={DASHBOARD_MODULES}"]
            super().__init__(command, *args, process_group=0, **named)

    before, services.ConsolePopen = services.ConsolePopen, OwnGroup
    try:
        yield
    finally:
        services.ConsolePopen = before


def _connection_advice(error: BaseException) -> str:
    """The error of a failed ``ray.init`` with the setting that is likely to be wrong."""
    if "uthentication" not in f"{type(error)} {error} {error.__cause__}":
        return f"{error}: check RAY_ADDRESS, or unset it to start a cluster on this machine"
    if os.environ.get("RAY_AUTH_MODE") == "token":
        return f"{error}: it rejects the token of this machine; copy ~/.ray/auth_token from the cluster's head node"
    return (
        f"{error}: it requires a token (`ray start` does once a local run has created ~/.ray/auth_token); set "
        "RAY_AUTH_MODE=token for this command, and for `ray job submit`"
    )


def same_node() -> Any:
    """Scheduling strategy that places an actor on this process's node."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def validate_capacity(cluster: Cluster, config: ClusterConfig, engines: int, judges: Judges) -> None:
    """Raises a ValueError if the run does not fit the cluster: otherwise Ray would wait for resources forever."""
    gpus = _gpus_by_key(config, engines, judges, on_gpus=cluster.on_gpus)
    _validate_resource("GPUs", _total(gpus), cluster.gpus, " + ".join(gpus))
    asked = f"cluster.train_workers={config.train_workers} x cluster.cpus_per_worker={config.cpus_per_worker}"
    if engines:
        asked += f" + cluster.rollout_engines={engines} x cluster.cpus_per_engine={config.cpus_per_engine}"
    _validate_resource("CPUs", cpus_needed(config, engines, on_gpus=cluster.on_gpus), cluster.cpus, asked)


def _validate_resource(name: str, needed: float, available: int, asked: str) -> None:
    if needed > available:
        raise ValueError(
            f"{asked} need {needed:g} {name}; the cluster has {available}: lower one of these keys or add nodes"
        )


@contextlib.contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    # Installed after ray.init, which replaces the handler. Only the main thread receives signals.
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
