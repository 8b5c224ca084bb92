"""Checkpoints: sharded (DCP), written beside training, complete or ignored, verified before they are used.

A checkpoint is a folder ``checkpoints/000120/`` whose last file is ``complete.json``, with a digest of each other file.
A folder without it was not finished; one whose files have other digests is damaged: either is named, and the one before
it is used.
"""

import contextlib
import functools
import hashlib
import json
import logging
import math
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import xxhash
from torch import Tensor
from torch.distributed._state_dict_utils import _copy_state_dict, _create_cpu_state_dict
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.utils._pytree import tree_flatten

from dpo_ray.config import Config, first_difference
from dpo_ray.storage import error_summary, is_remote, remove_folder, storage_errors, upload_appendable, write_atomically
from dpo_ray.train.state import TrainState
from dpo_ray.types import Metrics, NonRetryableError

logger = logging.getLogger(__name__)

MARKER = "complete.json"
INDEX = ".metadata"
NICENESS = 10
"""Of the thread that writes. Not the most: it may hold the interpreter's lock when it is not given a core."""


class CheckpointMismatch(ValueError):
    """A checkpoint belongs to another run than the one that wants to resume from it."""


class CheckpointDamaged(ValueError):
    """No finished checkpoint of a run is intact."""


class CheckpointFailed(NonRetryableError):
    """A checkpoint could not be written; those before it are as they were."""


class Checkpointer:
    """Writes and finds the checkpoints of one run. Every rank holds one and calls the same methods.

    Args:
        folder: shared by all ranks.
        config: goes into each checkpoint and is compared on resume.
    """

    def __init__(self, folder: Path, config: Config) -> None:
        self.folder, self.config = folder, config
        # The save thread's collectives must not interleave with those of training.
        self.group = cast("dist.ProcessGroup", dist.new_group(backend="gloo"))  # every rank is a member
        self.stager = CachedStager()
        self.pending: Future[Any] | None = None
        self.writing = folder
        self.last: Path | None = None
        """The newest checkpoint that this process knows to be good."""

    def save(self, state: TrainState, position: int, metrics: Mapping[str, Any] | None = None) -> None:
        """Start writing a checkpoint; returns when the state has been copied.

        Args:
            position: steps offline, rounds online; names the folder.
            metrics: of the policy as it is, among them ``run.best_metric`` if it has been evaluated.
        """
        self.wait()
        path = self.writing = self.folder / f"{position:06d}"
        if dist.get_rank() == 0:
            # Object stores have no folders to make; one that cannot be reached shows when it is written to.
            remove_folder(path)
            if not is_remote(path):
                self.folder.mkdir(parents=True, exist_ok=True)
        dist.barrier(self.group)
        writer, digests = _build_writer(path)
        # A response other than a future is for stagers that copy asynchronously.
        written = cast(
            "Future[Any]",
            dcp.async_save(
                state.state_dict(), storage_writer=writer, process_group=self.group, async_stager=self.stager
            ),
        )
        self.pending = Future()
        finish = functools.partial(self._finish, path, digests, dict(metrics or {}))
        written.add_done_callback(functools.partial(_then, self.pending, finish))

    def wait(self) -> None:
        """Wait for the checkpoint being written.

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
                f"{self.writing} could not be written ({_reason(error)}{_free(self.folder)}); "
                + (f"the last good one is {self.last}" if self.last else "there is no earlier one")
            ) from error

    def _remove_unfinished(self) -> None:
        try:
            if not (self.writing / MARKER).exists():
                remove_folder(self.writing)
        except Exception as error:
            logger.warning("%s is not removed: %s", self.writing, error_summary(error))

    def _finish(self, path: Path, digests: Mapping[str, str], metrics: Metrics) -> None:
        """Mark a checkpoint complete and delete those that are too old; runs in the save thread of every rank."""
        rank = dist.get_rank()
        files = {name: digest for part in self.gather_or_raise(lambda: digests) for name, digest in part.items()}
        self.gather_or_raise(lambda: self._mark(path, files, metrics) if rank == 0 else None)
        self.last = path
        if rank == 0:
            for old in superseded(path, self.config):
                # The new checkpoint is good whether or not the old one can be removed.
                remove_folder(old)

    def _mark(self, path: Path, files: Mapping[str, str], metrics: Metrics) -> None:
        marker = {
            "files": {**files, INDEX: _digest(path / INDEX)},
            "metrics": metrics,
            "config": self.config.model_dump(mode="json"),
        }
        # Whoever goes on from here finds the metrics up to here.
        upload_appendable()
        write_atomically(path / MARKER, json.dumps(marker))

    def gather_or_raise(self, act: Callable[[], Any]) -> list[Any]:
        """What ``act`` returns on each rank; raises on all of them what it raises on any."""
        answer: tuple[Any, BaseException | None]
        try:
            answer = act(), None
        except Exception as error:
            answer = None, error
        answers: list[Any] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(answers, answer, group=self.group)
        for _, error in answers:
            if error is not None:
                raise error
        return [value for value, _ in answers]

    def resume(self, state: TrainState) -> Path | None:
        """Load the newest intact checkpoint into ``state``; None when none was finished.

        Raises:
            CheckpointMismatch: it was written under another model, reference, data or loss.
            CheckpointDamaged: there are finished checkpoints, and none is intact.
        """
        found: list[Any] = [None, None]
        if dist.get_rank() == 0:
            with storage_errors(self.folder):
                found = [finished_checkpoints(self.folder), len(list(self.folder.glob(f"[0-9]*/{MARKER}")))]
        dist.broadcast_object_list(found, src=0)
        finished, marked = found
        for path in reversed(finished):
            validate_resume(path, self.config)
            if self._intact(path):
                self._load(path, state)
                self.last = path
                return path
        if marked:
            raise CheckpointDamaged(
                f"{self.folder}: none of the {marked} finished checkpoints is intact; remove the folder to begin again"
            )
        return None

    def _intact(self, path: Path) -> bool:
        """Whether all files are as they were written; every rank reads its share of them."""
        wrong = damaged_files(path, part=dist.get_rank(), parts=dist.get_world_size())
        for name in wrong:
            logger.warning("checkpoint %s is damaged and is left out: %s is not as it was written", path, name)
        count = torch.tensor(len(wrong))
        dist.all_reduce(count, group=self.group)
        return not count

    def _load(self, path: Path, state: TrainState) -> None:
        saved = state.state_dict()
        written = reader(path).read_metadata().state_dict_metadata
        # A checkpoint of fewer ranks holds no random state for the others.
        saved = {key: value for key, value in saved.items() if not key.startswith("rng_") or key in written}
        dcp.load(saved, storage_reader=reader(path), process_group=self.group)
        state.load_state_dict(saved)


def finished_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints that were written to the end, oldest first; others are named in the log."""
    finished = []
    for path in sorted(folder.glob("[0-9]*")):
        try:
            read_marker(path)
        except FileNotFoundError:
            logger.warning("checkpoint %s was not finished and is left out", path)
        except ValueError as error:
            logger.warning("checkpoint %s is damaged and is left out: %s", path, error)
        else:
            finished.append(path)
    return finished


def read_marker(path: Path) -> dict[str, Any]:
    """What stands in a finished checkpoint: ``files`` with their digests, ``metrics`` and ``config``.

    Raises:
        FileNotFoundError: it was not finished.
        ValueError: the marker is damaged.
    """
    marker = json.loads((path / MARKER).read_text())
    if not isinstance(marker, dict) or not {"files", "metrics", "config"} <= marker.keys():
        raise ValueError(f"{path / MARKER} holds no files, metrics and config")
    return marker


def best_checkpoint(finished: list[Path], config: Config) -> Path | None:
    """The checkpoint with the best ``run.best_metric``; None without that setting or such a checkpoint."""
    name = config.run.best_metric
    values = {path: read_marker(path)["metrics"].get(name) for path in finished}
    known = {path: value for path, value in values.items() if isinstance(value, int | float) and math.isfinite(value)}
    if not known:
        return None
    return (max if config.run.best_mode == "max" else min)(known, key=lambda path: known[path])


def superseded(newest: Path, config: Config) -> list[Path]:
    """Checkpoints that need not be kept beside one just written: neither recent nor the best.

    One that is further on counts for nothing: it is damaged, or the run would have gone on from there.
    """
    finished = [path for path in finished_checkpoints(newest.parent) if path <= newest]
    best = best_checkpoint(finished, config)
    return [path for path in finished[: -config.run.keep_checkpoints] if path != best]


def damaged_files(path: Path, *, part: int = 0, parts: int = 1) -> list[str]:
    """Files of a finished checkpoint that are missing or not as they were written.

    Args:
        part, parts: look at every ``parts``-th file only, from number ``part`` on.
    """
    files = sorted(read_marker(path)["files"].items())[part::parts]
    return [name for name, digest in files if not (path / name).is_file() or _digest(path / name) != digest]


def reader(path: Path) -> dcp.FileSystemReader:
    """What DCP reads a checkpoint with."""
    if is_remote(path):
        return FsspecReader(str(path), **cast("Any", path).storage_options)
    return dcp.FileSystemReader(path)


def read_weights(path: Path, weights: dict[str, Tensor]) -> None:
    """Load the policy's full weights from a checkpoint of any number of ranks, in a process of its own.

    Args:
        path: a finished checkpoint.
        weights: full tensors under the names that the scorer gives its parameters; filled in place.
    """
    dcp.load({"model": weights}, storage_reader=reader(path), no_dist=True)


def validate_resume(path: Path, config: Config) -> None:
    """Raise CheckpointMismatch, naming the first key in which ``config`` differs from the checkpoint's."""
    written, workers = read_marker(path)["config"], config.cluster.train_workers
    if difference := first_difference(written, config):
        raise CheckpointMismatch(f"{path.parent.parent} was begun with {difference}")
    if config.optim.use == "adamw_8bit" and written["cluster"]["train_workers"] != workers:
        # The parameters that share a scale would lie on two workers.
        raise CheckpointMismatch(
            f"{path.parent.parent} was written by {written['cluster']['train_workers']} workers and "
            f"cluster.train_workers is {workers}; optim.use: adamw_8bit resumes on as many as it began with"
        )


def _then(marked: "Future[None]", finish: Callable[[], None], written: "Future[Any]") -> None:
    """Settle ``marked`` with what became of the shards and of marking them complete."""
    try:
        written.result()
        finish()
    except BaseException as error:
        marked.set_exception(error)
    else:
        marked.set_result(None)


class CachedStager(BlockingAsyncStager):
    """Copies the state into memory that is kept for the next save: to take as much anew takes longer than the copy."""

    shape: Any = None

    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """A copy in host memory, which the next call overwrites."""
        leaves, structure = tree_flatten(state_dict)
        shape = structure, [(type(x), getattr(x, "shape", None), getattr(x, "dtype", None)) for x in leaves]
        if self.state_dict_cache is None or shape != self.shape:  # an optimizer may hold more than at the last save
            # torch's own would always pin it, which needs a GPU.
            self.state_dict_cache = _create_cpu_state_dict(state_dict, pin_memory=torch.cuda.is_available())
            self.shape = shape
        return _copy_state_dict(state_dict, self.state_dict_cache, type_check=False)


def _build_writer(path: Path) -> tuple[dcp.FileSystemWriter, dict[str, str]]:
    """DCP's writer for where ``path`` lies, and the digests of the files it has written: none is read back."""
    if is_remote(path):
        # To sync a stream that is no file, DCP would sync every disk of the machine.
        writer: Any = FsspecWriter(
            str(path), sync_files=False, per_thread_copy_ahead=0, **cast("Any", path).storage_options
        )
    else:
        writer = dcp.FileSystemWriter(path, per_thread_copy_ahead=0)
    digests: dict[str, str] = {}
    writer.fs.create_stream = functools.partial(_hashed_stream, writer.fs.create_stream, digests)
    return writer, digests


@contextlib.contextmanager
def _hashed_stream(create: Callable[..., Any], digests: dict[str, str], path: Any, mode: str) -> Iterator[Any]:
    """A stream whose content is digested as it is written, by a thread that lets others go first."""
    lower_thread_priority()
    with create(path, mode) as stream:
        hashed = _HashedStream(stream)
        yield hashed
    name = str(path).rpartition("/")[2]
    if name.endswith(".distcp"):
        digests[name] = hashed.hash.hexdigest()


def lower_thread_priority() -> None:
    """Lower the priority of this thread, where threads have one: where cores are short, training needs them more."""
    if sys.platform == "linux":
        thread = threading.get_native_id()
        with contextlib.suppress(OSError):  # where the system does not let it
            os.setpriority(os.PRIO_PROCESS, thread, max(NICENESS, os.getpriority(os.PRIO_PROCESS, thread)))


class _HashedStream:
    """A binary stream that is written from its beginning to its end."""

    def __init__(self, stream: Any) -> None:
        self.stream, self.hash = stream, xxhash.xxh3_128()

    def write(self, data: Any) -> int:
        """Write and digest."""
        self.hash.update(data)
        return self.stream.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def _free(folder: Path) -> str:
    """What torch says of a full disk does not mention it."""
    return "" if is_remote(folder) else f"; {shutil.disk_usage(folder).free >> 20} MiB are free there"


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, xxhash.xxh3_128).hexdigest()


def _reason(error: BaseException) -> str:
    """The innermost cause's message: DCP wraps what happened on each rank."""
    failures = getattr(error, "failures", None)
    if failures:
        first = next(iter(failures.values()))
        error = first[0] if isinstance(first, tuple) else first
    return error_summary(error)
