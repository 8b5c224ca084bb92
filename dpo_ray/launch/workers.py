"""Training workers: runs a loop on every rank through Ray Train, offline and online."""

import contextlib
import errno
import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent import futures
from dataclasses import asdict
from typing import Any

import ray
import ray.train
import ray.train.torch

from dpo_ray.config import Config
from dpo_ray.launch.cluster import Cluster
from dpo_ray.launch.command import Stopped, TrainingFailed
from dpo_ray.launch.reporter import RunReporter
from dpo_ray.launch.rollouts.weights import longest_wait_s
from dpo_ray.launch.run_dir import log_to_run
from dpo_ray.launch.status import ask_status
from dpo_ray.ops.cpu import cpu_environment
from dpo_ray.plugins import resolve
from dpo_ray.storage import StorageFailed, upload_appendable
from dpo_ray.threads import in_thread
from dpo_ray.types import Metrics, NonRetryableError

START_FAILURES = 3
"""Failed starts of the worker group before the run fails; Ray's default retries without end."""
NON_RETRYABLE = (
    ValueError, TypeError, LookupError, AttributeError, AssertionError, NotImplementedError,
    StorageFailed, NonRetryableError,
)  # fmt: skip
"""Non-retryable errors; crashes and lost connections are retried."""
NON_RETRYABLE_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
MIN_COLLECTIVE_TIMEOUT_S = 1800  # Ray Train's default
COLLECTIVE_MARGIN_S = 300


def train_on_workers(
    config: Config,
    cluster: Cluster,
    loop: str,
    *,
    status_actor: Any,
    rollouts: Any = None,
) -> None:
    """Runs ``loop`` on ``cluster.train_workers`` workers.

    Args:
        loop: import path of a function in ``launch.loops``; imported by the workers only.
        status_actor: actor handle.
        rollouts: the actors of an online run.

    Raises:
        TrainingFailed: names the worker's error and the folder of the logs.
        Stopped: the run stopped early on request.
    """
    # Storage for Ray Train's own records only. Checkpoints are in the run directory, so nodes need not share this one.
    ray_dir = tempfile.mkdtemp(prefix="dpo_ray-") if config.run.remote else str(config.run.path / "ray")
    arguments = {
        "config": config.model_dump(mode="json"),
        "loop": loop,
        "status_actor": status_actor,
        "on_gpus": cluster.on_gpus,
        "rollouts": rollouts,
    }
    trainer = build_torch_trainer(
        _run_worker, arguments, config, cluster, ray_dir, max_failures=config.cluster.max_restarts
    )
    try:
        returned: dict[str, Any] = _fit(trainer, status_actor, config.cluster.stop_timeout_s).return_value or {}
    except ray.train.TrainingFailedError as error:
        # The error that a worker reported is the cause; Ray may name an error of another worker that follows from it.
        returned = {"failed": ask_status(status_actor, "fatal_error") or _first_failure(error)}
    finally:
        if config.run.remote:
            shutil.rmtree(ray_dir, ignore_errors=True)
    if "failed" in returned:
        raise TrainingFailed(f"{returned['failed']}\nThe logs of all processes are in {config.run.path / 'logs'}")
    if returned.get("stopped_at"):
        raise Stopped(f"stopped after {returned['stopped_at']}")


def build_torch_trainer(
    loop: Callable[[dict[str, Any]], Any],
    arguments: dict[str, Any],
    config: Config,
    cluster: Cluster,
    ray_dir: str,
    *,
    max_failures: int,
) -> Any:
    """Ray Train's trainer that runs ``loop(arguments)`` on ``cluster.train_workers`` workers.

    Args:
        ray_dir: folder of Ray Train's own records.
        max_failures: restarts of the workers before ``fit`` raises.
    """
    size = config.cluster
    environment = {} if cluster.on_gpus else cpu_environment(size.cpus_per_worker)
    # On import, ray.train exports one of two versions of these classes, which type checkers cannot see.
    train: Any = ray.train
    return train.torch.TorchTrainer(
        loop,
        train_loop_config=arguments,
        torch_config=train.torch.TorchConfig(
            backend="cpu:gloo,cuda:nccl" if cluster.on_gpus else "gloo", timeout_s=collective_timeout_s(config)
        ),
        scaling_config=train.ScalingConfig(
            num_workers=size.train_workers,
            use_gpu=cluster.on_gpus,
            resources_per_worker={"CPU": size.cpus_per_worker, **({"GPU": 1} if cluster.on_gpus else {})},
        ),
        run_config=train.RunConfig(
            # A new name each time: Ray Train would resume by name, but our checkpoints decide where a run resumes.
            name=f"workers-{os.getpid()}-{os.urandom(4).hex()}",
            storage_path=ray_dir,
            failure_config=train.FailureConfig(max_failures=max_failures, controller_failure_limit=START_FAILURES),
            worker_runtime_env={"env_vars": environment},
        ),
    )


def _fit(trainer: Any, status_actor: Any, stop_timeout_s: float) -> Any:
    """``trainer.fit()``, interruptible: the first Ctrl-C or SIGTERM requests a stop, the second ends the run at once.

    The first ends it at once, too, if no step has been taken: there is nothing to save, and loading may take minutes.
    Runs in a thread, since Ray Train replaces the Ctrl-C handler of the main thread and kills workers within a step.
    """
    result, deadline = in_thread(trainer.fit), float("inf")
    while not result.done():
        try:
            futures.wait([result], timeout=0.5)
        except KeyboardInterrupt:
            # Without the status actor, the request does not reach the workers.
            if deadline < float("inf") or not ask_status(status_actor, "request_stop"):
                raise
            deadline = time.monotonic() + stop_timeout_s
            print("stopping at the next checkpoint (interrupt again to stop at once)", file=sys.stderr)
        if time.monotonic() > deadline:
            raise KeyboardInterrupt
    return result.result()


def collective_timeout_s(config: Config) -> int:
    """Seconds that a worker may wait for the others in a collective.

    The timeouts for which rank 0 may wait alone must expire first: their errors name the cause.
    """
    alone_s = config.cluster.start_timeout_s if config.online is None else longest_wait_s(config)
    return max(MIN_COLLECTIVE_TIMEOUT_S, int(alone_s) + COLLECTIVE_MARGIN_S)


def _run_worker(arguments: dict[str, Any]) -> Metrics:
    config = Config.model_validate(arguments["config"])
    rank, status_actor = ray.train.get_context().get_world_rank(), arguments["status_actor"]
    if fatal_error := ask_status(status_actor, "fatal_error"):
        return {"failed": fatal_error}

    try:
        if not config.run.remote and not (config.run.path / "config.yaml").exists():
            raise ValueError(
                f"run.dir: {config.run.path} does not exist on node {ray.util.get_node_ip_address()}; set run.dir to a "
                "folder that all nodes mount or, for offline runs, an object store"
            )
        log_to_run(config.run.path, f"worker-{rank}")
        logging.getLogger("ray.train").setLevel(logging.WARNING)

        import torch  # after log_to_run, which records its warnings

        device = torch.device("cuda", torch.cuda.current_device()) if arguments["on_gpus"] else torch.device("cpu")
        reporter = RunReporter(config.run.path, status_actor, rank, online=config.online is not None)
        result = resolve(arguments["loop"], {}, "loop")(config, device, reporter, arguments["rollouts"])
        upload_appendable()
        return asdict(result)
    except Exception as error:
        if is_retryable(error):
            raise
        # The other ranks wait in a collective until Ray restarts the group; the restarted workers read this and return.
        ask_status(status_actor, "report_fatal", describe_cause(error))
        raise
    finally:
        # The logs of a failed run, if the storage still accepts them.
        with contextlib.suppress(StorageFailed):
            upload_appendable()


def is_retryable(error: Exception) -> bool:
    """False if restarted workers would fail with the same error."""
    import torch

    if not torch.distributed.is_initialized():
        # Ray has torn the process group down because another worker died: this error is a consequence.
        return True
    if isinstance(error, OSError) and error.errno in NON_RETRYABLE_ERRNOS:
        return False
    return not isinstance(error, (*NON_RETRYABLE, torch.OutOfMemoryError))


def _first_failure(error: BaseException) -> str:
    """The error of the lowest failed rank, without Ray's wrappers."""
    failures = getattr(error, "worker_failures", None)
    if not failures:
        return f"training failed: {error}"
    rank = min(failures)
    return f"training worker {rank} failed: {describe_cause(failures[rank])}"


def describe_cause(error: BaseException) -> str:
    """Class and message of an error, without Ray's wrapper."""
    cause = getattr(error, "cause", None) or error
    return f"{type(cause).__name__}: {cause}"
