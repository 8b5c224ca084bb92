"""Reference log-probabilities on disk, shared by runs and machines.

A store is a folder named by a digest of the reference weights and of the numerics. Its shards hold entries: the summed
log-probability and the length of one completion, keyed by a digest of prompt and completion tokens. Entries are
independent of beta, learning rate, seed and run directory: all trials of a sweep, epochs and reruns share them. A view
holds the log-probabilities of one set of pairs in its order, so that later runs on that set need no lookup.

Files are immutable, written atomically, and named by a digest of their content: readers need no lock, and damage is
detected.
"""

import base64
import contextlib
import hashlib
import logging
import os
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dpo_ray.data.loader import PairSource
from dpo_ray.reference.shared import RemoteEntries
from dpo_ray.storage import file_digest

logger = logging.getLogger(__name__)

ENTRY = np.dtype([("key", "S16"), ("logp", "<f8"), ("tokens", "<i4")])
LOCK_STALE_S = 120.0
"""A builder touches its lock more often than this; an older lock belongs to a dead process."""


def store_digest(weights: str, numerics: str) -> str:
    """Name of the store of one reference model under one set of numerics."""
    return hashlib.blake2b(f"{weights}|{numerics}".encode(), digest_size=16).hexdigest()


def entry_keys(source: PairSource, pairs: Sequence[int]) -> np.ndarray:
    """Cache keys of the chosen and the rejected completion of each pair: hash of prompt tokens + completion tokens.

    Returns:
        (len(pairs), 2) dtype S16.
    """
    keys = np.empty((len(pairs), 2), "S16")
    for row, pair in enumerate(pairs):
        prompt, chosen, _ = source.lengths[pair].tolist()
        tokens = np.ascontiguousarray(source.tokens(pair), "<i4")
        head = hashlib.blake2b(np.array([prompt], "<i4").tobytes(), digest_size=12)
        head.update(tokens[:prompt].tobytes())
        for side, completion in enumerate((tokens[prompt : prompt + chosen], tokens[prompt + chosen :])):
            digest = head.copy()
            digest.update(completion.tobytes())
            # Fixed-width numpy bytes drop trailing NULs, which base64 text never has.
            keys[row, side] = base64.b64encode(digest.digest())
    return keys


class ReferenceStore:
    """Entries and views of one reference model.

    Args:
        folder: local, or on a shared mount.
        object_store: remote folder through which clusters without a common mount share the same files.
    """

    def __init__(self, folder: Path, object_store: Path | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.shared = RemoteEntries(object_store, stale_s=LOCK_STALE_S)
        self.token = uuid.uuid4().hex

    def fetch(self, pairs_digest: str) -> None:
        """Downloads files missing here from the object store: the view of a set of pairs, or else all entries."""
        self.shared.fetch(f"view-{pairs_digest}-*.npy", self.folder)
        if self.find_view(pairs_digest) is None:
            self.shared.fetch("shard-*.npy", self.folder)

    def lookup(self, keys: np.ndarray) -> np.ndarray:
        """Log-probabilities by key, in the shape of ``keys``; NaN for missing entries."""
        unique, inverse = np.unique(keys, return_inverse=True)
        logps = np.full(unique.shape, np.nan)
        for path in sorted(self.folder.glob("shard-*.npy")):
            if not unique.size or not self._intact(path):
                continue
            entries = np.load(path, mmap_mode="r")
            index = np.searchsorted(unique, entries["key"]).clip(max=unique.size - 1)
            hit = unique[index] == entries["key"]
            logps[index[hit]] = entries["logp"][hit]
        return logps[inverse].reshape(keys.shape)

    def add(self, keys: np.ndarray, logps: np.ndarray, tokens: np.ndarray) -> None:
        """Writes entries as a new shard."""
        entries = np.empty(keys.size, ENTRY)
        entries["key"], entries["logp"], entries["tokens"] = keys.ravel(), logps.ravel(), tokens.ravel()
        self._write(entries, "shard")

    def add_view(self, pairs_digest: str, logps: np.ndarray) -> Path:
        """Writes the log-probabilities of a set of pairs, (n, 2), in its order."""
        return self._write(logps.astype("<f8"), f"view-{pairs_digest}")

    def find_view(self, pairs_digest: str) -> Path | None:
        """The intact view of a set of pairs; damaged ones are removed."""
        for path in sorted(self.folder.glob(f"view-{pairs_digest}-*.npy")):
            if self._intact(path):
                return path
            self._remove(path)
        return None

    def clear(self) -> None:
        for path in (*self.folder.glob("shard-*.npy"), *self.folder.glob("view-*.npy")):
            self._remove(path)

    def _remove(self, path: Path) -> None:
        path.unlink(missing_ok=True)
        self.shared.remove(path.name)

    def _write(self, array: np.ndarray, name: str) -> Path:
        draft = self.folder / f".{uuid.uuid4().hex}.npy"
        np.save(draft, array)
        path = self.folder / f"{name}-{file_digest(draft)}.npy"
        draft.rename(path)
        self.shared.upload(path)
        return path

    def _intact(self, path: Path) -> bool:
        with contextlib.suppress(FileNotFoundError):
            if file_digest(path) == path.stem.rpartition("-")[2]:
                return True
            logger.warning("reference cache: skipping damaged file %s", path)
        return False

    def acquire(self) -> bool:
        """Takes the builder's lock if it is free or its holder is dead; returns whether it is held."""
        if not self._acquire_local():
            return False
        if not self.shared.acquire():
            self._release_local()
            return False
        return True

    def _acquire_local(self) -> bool:
        with contextlib.suppress(FileNotFoundError):
            if time.time() - self._lock.stat().st_mtime > LOCK_STALE_S:
                logger.warning("reference cache: taking over the lock of a builder silent for %.0f s", LOCK_STALE_S)
                self._lock.unlink()
        try:
            lock = os.open(self._lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            return False
        with os.fdopen(lock, "w") as file:
            file.write(self.token)
        return True

    def heartbeat(self) -> None:
        """Keeps the lock alive; call it more often than every LOCK_STALE_S."""
        with contextlib.suppress(FileNotFoundError):
            os.utime(self._lock)
        self.shared.heartbeat()

    def release(self) -> None:
        """Releases the lock, unless another builder has taken it over."""
        self.shared.release()
        self._release_local()

    def _release_local(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            if self._lock.read_text() == self.token:
                self._lock.unlink()

    @property
    def _lock(self) -> Path:
        return self.folder / "building.lock"
