"""Checkpoints: sharded (DCP), written beside training, complete or ignored.

A checkpoint is a folder ``checkpoints/000120/`` whose last file is ``complete.json``, with a digest of the index that
DCP writes after all shards. A folder without it, or with another digest, is skipped and the one before is used.
"""

import functools
import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, cast

import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from dpo_ray.config import Config, first_difference
from dpo_ray.train.state import TrainState

logger = logging.getLogger(__name__)

MARKER = "complete.json"


def _then(marked: "Future[None]", finish: Callable[[], None], written: "Future[Any]") -> None:
    """Settle ``marked`` with what became of the shards and of marking them complete."""
    try:
        written.result()
        finish()
    except BaseException as error:
        marked.set_exception(error)
    else:
        marked.set_result(None)


class CheckpointMismatch(ValueError):
    """A checkpoint belongs to another run than the one that wants to resume from it."""


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
        self.pending: Future[Any] | None = None

    def save(self, state: TrainState, position: int) -> None:
        """Start writing a checkpoint; returns when the state has been copied.

        Args:
            position: steps offline, rounds online; names the folder.
        """
        self.wait()
        path = self.folder / f"{position:06d}"
        if dist.get_rank() == 0:
            shutil.rmtree(path, ignore_errors=True)
            self.folder.mkdir(parents=True, exist_ok=True)
        dist.barrier(self.group)
        # A response other than a future is for stagers that copy asynchronously.
        future = cast("Future[Any]", dcp.async_save(state.state_dict(), checkpoint_id=path, process_group=self.group))
        self.pending = future
        if dist.get_rank() == 0:
            # DCP writes its index on rank 0 after every rank has written its shards: done here is done everywhere.
            self.pending = Future()
            future.add_done_callback(functools.partial(_then, self.pending, functools.partial(self._finish, path)))

    def wait(self) -> None:
        """Wait for the checkpoint being written; raises what went wrong with it."""
        if self.pending is not None:
            self.pending.result()
            self.pending = None

    def _finish(self, path: Path) -> None:
        """Mark a checkpoint complete and delete those that are too old."""
        marker = {"digest": _digest(path), "config": self.config.model_dump(mode="json")}
        unfinished = path / f".{MARKER}"
        unfinished.write_text(json.dumps(marker))
        unfinished.rename(path / MARKER)
        for old in complete_checkpoints(self.folder)[: -self.config.run.keep_checkpoints]:
            shutil.rmtree(old)

    def resume(self, state: TrainState) -> Path | None:
        """Load the newest usable checkpoint into ``state``; None when there is none.

        Raises:
            CheckpointMismatch: it was written under another model, reference, data or loss.
        """
        found = [next(reversed(complete_checkpoints(self.folder)), None)] if dist.get_rank() == 0 else [None]
        dist.broadcast_object_list(found, src=0)
        path = found[0]
        if path is None:
            return None
        refuse_mismatch(path, self.config)
        saved = state.state_dict()
        written = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
        # A checkpoint of fewer ranks holds no random state for the others.
        saved = {key: value for key, value in saved.items() if not key.startswith("rng_") or key in written}
        dcp.load(saved, checkpoint_id=path, process_group=self.group)
        state.load_state_dict(saved)
        return path


def complete_checkpoints(folder: Path) -> list[Path]:
    """Usable checkpoints, oldest first; damaged ones are named in the log."""
    usable = []
    for path in sorted(folder.glob("[0-9]*")):
        try:
            marker = json.loads((path / MARKER).read_text())
            if marker["digest"] != _digest(path):
                raise ValueError("its index has another digest than when it was written")
        except FileNotFoundError:
            logger.warning("checkpoint %s was not finished and is left out", path)
        except (ValueError, KeyError) as error:
            logger.warning("checkpoint %s is damaged and is left out: %s", path, error)
        else:
            usable.append(path)
    return usable


def refuse_mismatch(path: Path, config: Config) -> None:
    """Raise CheckpointMismatch, naming the first key in which ``config`` differs from the checkpoint's."""
    written = json.loads((path / MARKER).read_text())["config"]
    if difference := first_difference(written, config):
        raise CheckpointMismatch(f"{path.parent.parent} was begun with {difference}")


def _digest(path: Path) -> str:
    """Digest of the index and of every shard's name and size: a cut or missing shard shows without reading the data."""
    digest = hashlib.blake2b((path / ".metadata").read_bytes(), digest_size=16)
    for shard in sorted(path.glob("*.distcp")):
        digest.update(f"{shard.name}:{shard.stat().st_size}".encode())
    return digest.hexdigest()
