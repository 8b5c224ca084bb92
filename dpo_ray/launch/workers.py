"""Training workers: one function on every rank of a Ray Train run, for both loops."""

import contextlib
import errno
import logging
import os
import shutil
import sys
import tempfile
import threading
import time
from concurrent.futures import Future
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch

from dpo_ray.config import Config
from dpo_ray.launch.cluster import Cluster
from dpo_ray.launch.command import Stopped, TrainingFailed
from dpo_ray.launch.status import RunReporter, log_to_run
from dpo_ray.ops.cpu import cpu_environment
from dpo_ray.plugins import resolve
from dpo_ray.storage import StorageFailed, upload_appendable
from dpo_ray.types import Metrics, NonRetryableError

START_FAILURES = 3
"""How often a worker group may fail to start before the run fails; Ray's own default retries for ever."""


FATAL = (
    ValueError, TypeError, LookupError, AttributeError, AssertionError, NotImplementedError,
    StorageFailed, NonRetryableError,
)  # fmt: skip
"""Errors that would come again: workers are restarted for dead processes and broken connections, not for these."""
BOARD_TIMEOUT_S = 30.0
SHORTEST_COLLECTIVE_S = 1800
"""As long as Ray Train's own limit."""
STORAGE_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
"""Errors of the operating system that would come again as well."""


def train_on_workers(
    config: Config,
    cluster: Cluster,
    loop: str,
    *,
    status_actor: Any,
    handles: dict[str, Any],
    callbacks: list[Any] | None = None,
) -> Metrics:
    """Run ``loop`` on ``cluster.train_workers`` workers; returns rank 0's metrics.

    Args:
        loop: import path of a function of (config, device, reporter, handles) that returns the last metrics. A path, so
            that only the workers import what it needs.
        board: the StatusBoard actor.
        handles: actor handles and references that the loop needs; every worker gets them.
        callbacks: Ray Train callbacks; given by a sweep, which compares what is reported.

    Raises:
        TrainingFailed: says what the workers' error was and where their logs are.
    """
    size = config.cluster
    environment = {} if cluster.on_gpus else cpu_environment(size.cpus_per_worker)
    run_dir = config.run.path if config.run.remote else config.run.path.absolute()
    # Ray's own notes; none of its checkpoints is among them, so that other nodes need not see this folder.
    notes = tempfile.mkdtemp(prefix="dpo_ray-") if config.run.remote else str(run_dir / "ray")
    # ray.train decides at import which of its two versions of these classes it exports, which no type checker sees.
    train: Any = ray.train
    trainer = train.torch.TorchTrainer(
        _on_each_rank,
        train_loop_config={
            "config": config.model_dump(mode="json"),
            "loop": loop,
            "board": status_actor,
            "on_gpus": cluster.on_gpus,
            "to_train": bool(callbacks),
            "handles": handles,
        },
        torch_config=train.torch.TorchConfig(
            backend="cpu:gloo,cuda:nccl" if cluster.on_gpus else "gloo", timeout_s=collective_timeout_s(config)
        ),
        scaling_config=train.ScalingConfig(
            num_workers=size.train_workers,
            use_gpu=cluster.on_gpus,
            resources_per_worker={"CPU": size.cpus_per_worker, **({"GPU": 1} if cluster.on_gpus else {})},
        ),
        run_config=train.RunConfig(
            # Ray resumes by this name; our checkpoints are found in the run directory, so the name is always new.
            name=f"workers-{os.getpid()}-{os.urandom(4).hex()}",
            storage_path=notes,
            failure_config=train.FailureConfig(max_failures=size.max_restarts, controller_failure_limit=START_FAILURES),
            callbacks=callbacks,
            worker_runtime_env={"env_vars": environment},
        ),
    )
    returned: dict[str, Any]
    try:
        returned = _fit(trainer, status_actor, size.stop_timeout_s).return_value or {}
    except ray.train.TrainingFailedError as error:
        # What one worker gave up over, rather than what its end did to the others.
        fatal_error = ray.get(status_actor.fatal_error.remote(), timeout=BOARD_TIMEOUT_S)
        returned = {"failed": fatal_error or _cause(error)}
    finally:
        if config.run.remote:
            shutil.rmtree(notes, ignore_errors=True)
    if "failed" in returned:
        raise TrainingFailed(f"{returned['failed']}\nThe logs of all processes are in {run_dir / 'logs'}")
    if returned.get("stopped_at"):
        raise Stopped(f"stopped after {returned['stopped_at']}")
    return returned.get("metrics", {})


def _fit(trainer: Any, status_actor: Any, stop_timeout_s: float) -> Any:
    """``trainer.fit()``, which the first Ctrl-C or SIGTERM asks to stop and the second ends at once.

    The first does too where no step has been taken yet: nothing would be saved, and loading may take minutes. Ray Train
    takes over Ctrl-C in the main thread, and kills the workers in the middle of a step.
    """
    if threading.current_thread() is not threading.main_thread():
        return trainer.fit()
    result: Future[Any] = Future()

    def fit() -> None:
        try:
            result.set_result(trainer.fit())
        except BaseException as error:
            result.set_exception(error)

    thread = threading.Thread(target=fit, name="fit", daemon=True)
    thread.start()
    deadline = float("inf")
    while thread.is_alive():
        try:
            thread.join(0.5)
        except KeyboardInterrupt:
            if deadline < float("inf"):
                raise
            deadline = time.monotonic() + stop_timeout_s
            if not _asked_with_work_to_save(status_actor):
                raise
            print("stopping where the run can go on from (again to end at once)", file=sys.stderr)
        if time.monotonic() > deadline:
            raise KeyboardInterrupt
    return result.result()


def _asked_with_work_to_save(status_actor: Any) -> bool:
    """Ask the workers to stop; whether that saves anything. Where the board is gone, nobody can ask them."""
    try:
        return ray.get(status_actor.request_stop.remote(), timeout=BOARD_TIMEOUT_S)
    except ray.exceptions.RayError:
        return False


def collective_timeout_s(config: Config) -> int:
    """Longest time that a worker may wait for another in a collective.

    All wait while one waits for engines and judge, whose own limits should be the first to be reached: they say what is
    the matter.
    """
    waits = 0.0
    if (online := config.online) is not None:
        waits = 2 * online.generate_timeout_s + 2 * online.judge_timeout_s + online.sync_timeout_s
    return max(SHORTEST_COLLECTIVE_S, int(waits + config.cluster.start_timeout_s) + 300)


def _on_each_rank(given: dict[str, Any]) -> Metrics:
    config = Config.model_validate(given["config"])
    rank, status_actor = ray.train.get_context().get_world_rank(), given["board"]
    if failed := ray.get(status_actor.fatal_error.remote()):
        return {"failed": failed}

    try:
        if not config.run.remote:
            _validate_run_dir_visible(config.run.path)
        log_to_run(config.run.path, f"worker-{rank}")
        logging.getLogger("ray.train").setLevel(logging.WARNING)

        import torch  # once what it says goes to the log

        device = torch.device("cuda", torch.cuda.current_device()) if given["on_gpus"] else torch.device("cpu")
        reporter = RunReporter(config.run.path, status_actor, rank, to_train=given["to_train"])
        ending = resolve(given["loop"], {}, "loop")(config, device, reporter, given["handles"])
        upload_appendable()
        return asdict(ending)
    except Exception as error:
        if not _would_come_again(error):
            raise
        # The other ranks wait in a collective and can only be ended by ending all; the next start reads this and stops.
        cause = getattr(error, "cause", None) or error
        ray.get(status_actor.report_fatal.remote(f"{type(cause).__name__}: {cause}"))
        raise
    finally:
        # Of a run that failed, what it said of it: as far as the storage takes it.
        with contextlib.suppress(StorageFailed):
            upload_appendable()


def _validate_run_dir_visible(run_dir: Path) -> None:
    """Raise a ValueError where this process does not see what the driver wrote to the run directory."""
    if not (run_dir / "config.yaml").exists():
        raise ValueError(
            f"run.dir: {run_dir} is not there on node {ray.util.get_node_ip_address()}; it must be a folder that all "
            "nodes mount, or for an offline run an object store"
        )


def _would_come_again(error: Exception) -> bool:
    """Whether restarted workers would end with the same error."""
    import torch

    storage_full = isinstance(error, OSError) and error.errno in STORAGE_FULL
    return storage_full or isinstance(error, (*FATAL, torch.OutOfMemoryError))


def _cause(error: BaseException) -> str:
    """The innermost message of a chain of wrapped errors, with its class."""
    failures = getattr(error, "worker_failures", None)
    if failures:
        rank, failure = next(iter(sorted(failures.items())))
        inner = getattr(failure, "cause", None) or failure
        return f"training worker {rank} failed: {type(inner).__name__}: {inner}"
    return f"training failed: {error}"
