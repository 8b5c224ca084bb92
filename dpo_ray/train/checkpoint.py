"""Saving and resuming: sharded checkpoints (DCP), written in the background and verified before use.

A damaged or unfinished checkpoint is named in the log, and the previous one is used.
"""

import contextlib
import functools
import logging
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError, Future
from pathlib import Path
from typing import Any, Self, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed._state_dict_utils import _copy_state_dict, _create_cpu_state_dict
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.utils._pytree import tree_flatten

from dpo_ray.config import Config, first_difference
from dpo_ray.config.schema import RunConfig
from dpo_ray.parallel.collectives import broadcast_from_rank0, gather_or_raise
from dpo_ray.storage import error_summary, is_remote, remove_folder, storage_errors
from dpo_ray.train.checkpoint_files import (
    MARKER,
    add_to_marker,
    damaged_files,
    finished_checkpoints,
    open_reader,
    open_writer,
    read_marker,
    superseded,
    write_marker,
)
from dpo_ray.train.state import TrainState
from dpo_ray.types import Metrics, NonRetryableError

logger = logging.getLogger(__name__)

SAVE_AFTER_FAILURE_S = 60.0
"""Longest wait of a failed rank for the checkpoint being written, which others may never finish."""


class CheckpointMismatch(ValueError):
    """A checkpoint belongs to a different run than the one that resumes from it."""


class CheckpointDamaged(ValueError):
    """No finished checkpoint of a run is intact."""


class CheckpointFailed(NonRetryableError):
    """A checkpoint could not be written; earlier ones are unchanged."""


def save_due(run: RunConfig, position: int, total: int, *, stopping: bool = False) -> bool:
    """True if a checkpoint is saved at ``position`` (steps offline, rounds online) of ``total``.

    Every ``run.save_every`` and at the end, unless ``run.save_every`` is None; always if the run stops early. Without
    ``run.save_last``, every ``run.save_every`` only, and not where the loop knows that the run stops early.
    """
    if stopping or run.save_every is None:
        return stopping and run.save_last
    return position % run.save_every == 0 or (position == total and run.save_last)


class Checkpointer:
    """Saves and loads the checkpoints of one run in a shared folder. Every rank calls the same methods.

    A context: at its end, it waits for the checkpoint being written and leaves the process group of the saves.

    Args:
        stager: host memory for the copies of the state, which the next run of a process may reuse.
    """

    def __init__(self, folder: Path, config: Config, stager: "CachedStager | None" = None) -> None:
        self.folder, self.config = folder, config
        # The save thread's collectives must not interleave with those of training.
        self.group = cast("dist.ProcessGroup", dist.new_group(backend="gloo"))  # every rank is a member
        self.stager = stager or CachedStager()
        self.pending: Future[Any] | None = None
        self.writing = folder
        self.last_good: Path | None = None
        """Newest checkpoint that is known to be intact."""
        self.saved_position = 0

    def maybe_save(
        self,
        state: TrainState,
        position: int,
        total: int,
        metrics: Mapping[str, Any] | None = None,
        *,
        stopping: bool = False,
    ) -> None:
        """Saves if ``save_due`` and this position was not saved yet."""
        if position != self.saved_position and save_due(self.config.run, position, total, stopping=stopping):
            self.save(state, position, metrics)

    def save(self, state: TrainState, position: int, metrics: Mapping[str, Any] | None = None) -> None:
        """Starts writing a checkpoint; returns when the state has been copied."""
        self.wait()
        path = self.writing = self.folder / f"{position:06d}"
        if dist.get_rank() == 0:
            # Object stores have no folders to create; an unreachable one fails at the first write.
            remove_folder(path)
            if not is_remote(path):
                self.folder.mkdir(parents=True, exist_ok=True)
        dist.barrier(self.group)
        writer, digests = open_writer(path)
        # The response is a future unless the stager copies asynchronously.
        written = cast(
            "Future[Any]",
            dcp.async_save(
                state.state_dict(), storage_writer=writer, process_group=self.group, async_stager=self.stager
            ),
        )
        self.saved_position, self.pending = position, Future()
        finish = functools.partial(self._finish, path, digests, dict(metrics or {}))
        written.add_done_callback(functools.partial(_chain, self.pending, finish))

    def add_metrics(self, position: int, metrics: Mapping[str, Any]) -> None:
        """Adds the metrics of an evaluation to the checkpoint at a position, if there is one, to rank it by them."""
        self.wait()
        path = self.folder / f"{position:06d}"

        def add() -> None:
            if dist.get_rank() == 0 and (path / MARKER).exists():
                add_to_marker(path, metrics)

        gather_or_raise(add, self.group)

    def wait(self) -> None:
        """Waits for the checkpoint being written.

        Raises:
            CheckpointFailed: it could not be written.
        """
        if self.pending is None:
            return
        pending, self.pending = self.pending, None
        try:
            pending.result()
        except BaseException as error:
            dist.barrier(self.group)
            if dist.get_rank() == 0:
                self._remove_unfinished()
            raise CheckpointFailed(
                f"{self.writing} could not be written ({_first_failure(error)}{_free_space(self.folder)}); "
                + (f"the last good checkpoint is {self.last_good}" if self.last_good else "there is no earlier one")
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, failed: type[BaseException] | None, *_: object) -> None:
        alone = dist.get_world_size() == 1
        try:
            if failed is None:
                self.wait()
            elif self.pending is not None and (alone or issubclass(failed, Exception)):
                # The first failure counts. The checkpoint before it is worth a wait: nothing of it is trained again.
                with contextlib.suppress(TimeoutError, CancelledError):
                    self.pending.exception(None if alone else SAVE_AFTER_FAILURE_S)
        finally:
            if failed is None or alone:  # otherwise the others may have failed elsewhere, and the processes end
                dist.destroy_process_group(self.group)

    def _remove_unfinished(self) -> None:
        try:
            if not (self.writing / MARKER).exists():
                remove_folder(self.writing)
        except Exception as error:
            logger.warning("%s could not be removed: %s", self.writing, error_summary(error))

    def _finish(self, path: Path, digests: Mapping[str, str], metrics: Metrics) -> None:
        """Marks a checkpoint complete and deletes old ones; runs in the save thread of every rank."""
        rank = dist.get_rank()
        files: dict[str, str] = {}
        for of_rank in gather_or_raise(lambda: digests, self.group):
            files |= of_rank
        config = self.config.model_dump(mode="json")
        gather_or_raise(lambda: write_marker(path, files, metrics, config) if rank == 0 else None, self.group)
        self.last_good = path
        if rank == 0:
            self._remove_superseded(path)

    def _remove_superseded(self, newest: Path) -> None:
        """Deletes old checkpoints; a failure is only logged, because the new checkpoint is complete."""
        try:
            for old in superseded(newest, self.config.run):
                remove_folder(old)
        except Exception as error:
            logger.warning("old checkpoints in %s could not be removed: %s", self.folder, error_summary(error))

    def resume(self, state: TrainState) -> Path | None:
        """Loads the newest intact checkpoint into ``state``; None if there is none.

        Raises:
            CheckpointMismatch: it was saved under a different model, reference, data or loss.
            CheckpointDamaged: there are finished checkpoints, and none is intact.
        """
        finished, marked = broadcast_from_rank0(self._find)
        for path in reversed(finished):
            validate_resume(path, self.config)
            if self._intact(path):
                self._load(path, state)
                self.last_good, self.saved_position = path, int(path.name)
                return path
        if marked:
            raise CheckpointDamaged(
                f"{self.folder}: none of the {marked} finished checkpoints is intact; remove the folder to start over"
            )
        return None

    def _find(self) -> tuple[list[Path], int]:
        """Finished checkpoints, oldest first, and the number of markers."""
        with storage_errors(self.folder):
            return finished_checkpoints(self.folder), len(list(self.folder.glob(f"[0-9]*/{MARKER}")))

    def _intact(self, path: Path) -> bool:
        """True if no file has changed; every rank checks its share of the files."""
        damaged = damaged_files(path, part=dist.get_rank(), parts=dist.get_world_size())
        for name in damaged:
            logger.warning("skipping checkpoint %s: %s is damaged", path, name)
        count = torch.tensor(len(damaged))
        dist.all_reduce(count, group=self.group)
        return not count

    def _load(self, path: Path, state: TrainState) -> None:
        saved = state.state_dict()
        written = open_reader(path).read_metadata().state_dict_metadata
        # A checkpoint of fewer ranks has no random state for the others.
        saved = {key: value for key, value in saved.items() if not key.startswith("rng_") or key in written}
        dcp.load(saved, storage_reader=open_reader(path), process_group=self.group)
        state.load_state_dict(saved)


def validate_resume(path: Path, config: Config) -> None:
    """Raises CheckpointMismatch, naming the first key in which ``config`` differs from the checkpoint's."""
    written, workers = read_marker(path)["config"], config.cluster.train_workers
    if difference := first_difference(written, config):
        raise CheckpointMismatch(f"{path.parent.parent} was started with {difference}")
    if config.optim.use == "adamw_8bit" and written["cluster"]["train_workers"] != workers:
        # Parameters that share a scale would be split over two workers.
        raise CheckpointMismatch(
            f"{path.parent.parent} was saved by {written['cluster']['train_workers']} workers and "
            f"cluster.train_workers is {workers}; optim.use: adamw_8bit resumes on the same number of workers only"
        )


def _chain(marked: "Future[None]", finish: Callable[[], None], written: "Future[Any]") -> None:
    """Settles ``marked`` once the shards are written and marked complete."""
    try:
        written.result()
        finish()
    except BaseException as error:
        marked.set_exception(error)
    else:
        marked.set_result(None)


class CachedStager(BlockingAsyncStager):
    """Copies the state into host memory that is reused by the next save: allocating it takes longer than the copy."""

    shape: Any = None

    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Copies ``state_dict``; the next call overwrites the copy."""
        leaves, structure = tree_flatten(state_dict)
        shape = structure, [(type(x), getattr(x, "shape", None), getattr(x, "dtype", None)) for x in leaves]
        if self.state_dict_cache is None or shape != self.shape:  # an optimizer may have gained state
            self.state_dict_cache = None  # freed before the next one is allocated
            # torch's own stager always pins it, which needs a GPU.
            self.state_dict_cache = _create_cpu_state_dict(state_dict, pin_memory=torch.cuda.is_available())
            self.shape = shape
        return _copy_state_dict(state_dict, self.state_dict_cache, type_check=False)


def _free_space(folder: Path) -> str:
    """Free space, because torch's error for a full disk does not mention it."""
    return "" if is_remote(folder) else f"; {shutil.disk_usage(folder).free >> 20} MiB are free"


def _first_failure(error: BaseException) -> str:
    """The message of the innermost cause: DCP wraps the failures of all ranks."""
    failures = getattr(error, "failures", None)
    if failures:
        first = next(iter(failures.values()))
        error = first[0] if isinstance(first, tuple) else first
    return error_summary(error)
