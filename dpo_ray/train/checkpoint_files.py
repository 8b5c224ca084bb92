"""The files of a checkpoint: writing them with digests, finding finished ones, noticing damage.

A checkpoint is a folder ``checkpoints/000120/`` whose last file is the marker ``complete.json``, with the digest of
every other file. A folder without a marker is unfinished; one whose files have other digests is damaged.
"""

import contextlib
import functools
import json
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch.distributed.checkpoint as dcp
import xxhash
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter

from dpo_ray.config.schema import RunConfig
from dpo_ray.storage import file_digest, is_remote, upload_appendable, write_atomically
from dpo_ray.types import is_finite

logger = logging.getLogger(__name__)

MARKER = "complete.json"
INDEX = ".metadata"
NICENESS = 10
"""Niceness of the thread that writes; below the highest, since it may hold the GIL while it waits for a core."""


def write_marker(path: Path, digests: Mapping[str, str], metrics: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Marks a checkpoint complete, once the metrics up to it are in the run directory too."""
    upload_appendable()
    files = {**digests, INDEX: file_digest(path / INDEX)}
    write_atomically(path / MARKER, json.dumps({"files": files, "metrics": metrics, "config": config}))


def add_to_marker(path: Path, metrics: Mapping[str, Any]) -> None:
    """Add metrics to the marker of a finished checkpoint."""
    marker = read_marker(path)
    write_atomically(path / MARKER, json.dumps(marker | {"metrics": {**marker["metrics"], **metrics}}))


def read_marker(path: Path) -> dict[str, Any]:
    """The marker of a finished checkpoint: ``files`` with their digests, ``metrics`` and ``config``.

    Raises:
        FileNotFoundError: the checkpoint is unfinished.
        ValueError: the marker is damaged.
    """
    marker = json.loads((path / MARKER).read_text())
    if not isinstance(marker, dict) or not {"files", "metrics", "config"} <= marker.keys():
        raise ValueError(f"{path / MARKER} lacks files, metrics or config")
    return marker


def finished_checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints, oldest first; others are named in the log."""
    finished = []
    for path in sorted(folder.glob("[0-9]*")):
        try:
            read_marker(path)
        except FileNotFoundError:
            logger.warning("skipping checkpoint %s: it is unfinished", path)
        except ValueError as error:
            logger.warning("skipping checkpoint %s: it is damaged: %s", path, error)
        else:
            finished.append(path)
    return finished


def best_checkpoint(finished: list[Path], run: RunConfig) -> Path | None:
    """The checkpoint with the best ``run.best_metric``; None without the setting or any checkpoint with it."""
    values = {path: read_marker(path)["metrics"].get(run.best_metric) for path in finished}
    known = {path: value for path, value in values.items() if is_finite(value)}
    if not known:
        return None
    return (max if run.best_mode == "max" else min)(known, key=lambda path: known[path])


def superseded(newest: Path, run: RunConfig) -> list[Path]:
    """Checkpoints that need not be kept beside one just written: neither recent nor the best.

    Later checkpoints are ignored: they are damaged, otherwise the run would have resumed from them.
    """
    finished = [path for path in finished_checkpoints(newest.parent) if path <= newest]
    best = best_checkpoint(finished, run)
    return [path for path in finished[: -run.keep_checkpoints] if path != best]


def damaged_files(path: Path, *, part: int = 0, parts: int = 1) -> list[str]:
    """Files of a finished checkpoint that are missing or changed.

    Args:
        part, parts: check only every ``parts``-th file, starting at number ``part``.
    """
    files = sorted(read_marker(path)["files"].items())[part::parts]
    return [name for name, digest in files if not (path / name).is_file() or file_digest(path / name) != digest]


def open_reader(path: Path) -> dcp.FileSystemReader:
    """DCP's reader for a local or remote checkpoint."""
    if is_remote(path):
        return FsspecReader(str(path), **cast("Any", path).storage_options)
    return dcp.FileSystemReader(path)


def open_writer(path: Path) -> tuple[dcp.FileSystemWriter, dict[str, str]]:
    """DCP's writer for a local or remote checkpoint, and the digests of its files, taken while they are written."""
    if is_remote(path):
        # To sync a stream that is not a file, DCP would sync every disk of the machine.
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
    """A stream that is digested while a low-priority thread writes it."""
    lower_thread_priority()
    with create(path, mode) as stream:
        hashed = _HashedStream(stream)
        yield hashed
    name = str(path).rpartition("/")[2]
    if name.endswith(".distcp"):
        digests[name] = hashed.hash.hexdigest()


def lower_thread_priority() -> None:
    """Lowers the priority of this thread (Linux only), so that training keeps the cores."""
    if sys.platform == "linux":
        thread = threading.get_native_id()
        with contextlib.suppress(OSError):  # not permitted
            os.setpriority(os.PRIO_PROCESS, thread, max(NICENESS, os.getpriority(os.PRIO_PROCESS, thread)))


class _HashedStream:
    """A binary stream, written from start to end, with a running digest."""

    def __init__(self, stream: Any) -> None:
        self.stream, self.hash = stream, xxhash.xxh3_128()

    def write(self, data: Any) -> int:
        self.hash.update(data)
        return self.stream.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)
