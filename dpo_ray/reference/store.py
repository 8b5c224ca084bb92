"""Reference log-probabilities on disk, shared by runs and machines.

A store is a folder named by a digest of the reference's weights and of the numerics. Its shards hold entries: the
summed log-probability and the length of one completion, named by a digest of prompt and completion tokens. It knows
nothing of beta, learning rate, seed or run directory: every trial of a sweep, every epoch and every rerun shares it. A
view holds the log-probabilities of one set of pairs in its order, so that a later run on that set looks nothing up.

Files are written whole under a name with a digest of their content and never changed: readers need no lock, and damage
shows.
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
import xxhash

from dpo_ray.data.loader import PairSource
from dpo_ray.reference.shared import SharedEntries

logger = logging.getLogger(__name__)

ENTRY = np.dtype([("key", "S16"), ("logp", "<f8"), ("tokens", "<i4")])
LOCK_STALE_S = 120.0
"""A builder touches its lock at least this often; an older lock belongs to a process that died."""


def store_digest(weights: str, numerics: str) -> str:
    """The name of the store of one reference model under one way of computing."""
    return hashlib.blake2b(f"{weights}|{numerics}".encode(), digest_size=16).hexdigest()


def entry_keys(source: PairSource, pairs: Sequence[int]) -> np.ndarray:
    """(len(pairs), 2) S16 keys of the chosen and rejected entries of some pairs."""
    keys = np.empty((len(pairs), 2), "S16")
    for at, pair in enumerate(pairs):
        prompt, chosen, _ = source.lengths[pair].tolist()
        tokens = np.ascontiguousarray(source.tokens(pair), "<i4")
        head = hashlib.blake2b(np.array([prompt], "<i4").tobytes(), digest_size=12)
        head.update(tokens[:prompt].tobytes())
        for side, completion in enumerate((tokens[prompt : prompt + chosen], tokens[prompt + chosen :])):
            digest = head.copy()
            digest.update(completion.tobytes())
            # Fixed-width numpy bytes drop trailing NULs, which base64 text never has.
            keys[at, side] = base64.b64encode(digest.digest())
    return keys


class ReferenceStore:
    """Entries and views of one reference model.

    Args:
        folder: local, or on a mount.
        object_store: a remote folder that the same files are shared through with those who do not have that mount.
    """

    def __init__(self, folder: Path, object_store: Path | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.shared = None if object_store is None else SharedEntries(object_store, stale_s=LOCK_STALE_S)
        self.token = uuid.uuid4().hex

    def fetch(self, pairs_digest: str) -> None:
        """Bring what the object store has and the folder lacks: all entries, and the view of a set of pairs."""
        if self.shared is not None:
            self.shared.fetch(f"view-{pairs_digest}-*.npy", self.folder)
            if self.find_view(pairs_digest) is None:
                self.shared.fetch("shard-*.npy", self.folder)

    def lookup(self, keys: np.ndarray) -> np.ndarray:
        """Log-probabilities of ``keys``, NaN where there is no entry; same shape."""
        wanted, where = np.unique(keys, return_inverse=True)
        found = np.full(wanted.shape, np.nan)
        for path in sorted(self.folder.glob("shard-*.npy")):
            entries = self._read(path)
            if entries is None or not wanted.size:
                continue
            at = np.searchsorted(wanted, entries["key"]).clip(max=wanted.size - 1)
            hit = wanted[at] == entries["key"]
            found[at[hit]] = entries["logp"][hit]
        return found[where].reshape(keys.shape)

    def add(self, keys: np.ndarray, logps: np.ndarray, tokens: np.ndarray) -> None:
        """Write entries as one new shard."""
        entries = np.empty(keys.size, ENTRY)
        entries["key"], entries["logp"], entries["tokens"] = keys.ravel(), logps.ravel(), tokens.ravel()
        self._write(entries, "shard")

    def add_view(self, pairs_digest: str, logps: np.ndarray) -> Path:
        """Write the log-probabilities of a set of pairs, (n, 2), in its order."""
        return self._write(logps.astype("<f8"), f"view-{pairs_digest}")

    def find_view(self, pairs_digest: str) -> Path | None:
        """The intact view of a set of pairs; damaged ones are removed."""
        for path in sorted(self.folder.glob(f"view-{pairs_digest}-*.npy")):
            if self._intact(path):
                return path
            self._remove(path)
        return None

    def clear(self) -> None:
        """Forget every entry and view."""
        for path in (*self.folder.glob("shard-*.npy"), *self.folder.glob("view-*.npy")):
            self._remove(path)

    def _remove(self, path: Path) -> None:
        path.unlink(missing_ok=True)
        if self.shared is not None:
            self.shared.remove(path.name)

    def _write(self, array: np.ndarray, name: str) -> Path:
        draft = self.folder / f".{uuid.uuid4().hex}.npy"
        np.save(draft, array)
        kept = self.folder / f"{name}-{_digest(draft)}.npy"
        draft.rename(kept)
        if self.shared is not None:
            self.shared.send(kept)
        return kept

    def _read(self, path: Path) -> np.ndarray | None:
        return np.load(path, mmap_mode="r") if self._intact(path) else None

    def _intact(self, path: Path) -> bool:
        with contextlib.suppress(FileNotFoundError):
            if _digest(path) == path.stem.rpartition("-")[2]:
                return True
            logger.warning("reference cache: %s is damaged and left out", path)
        return False

    def acquire(self) -> bool:
        """Become the one builder, if there is none; the lock of a builder that died is taken over."""
        if not self._acquire_here():
            return False
        if self.shared is not None and not self.shared.acquire():
            self._release_here()
            return False
        return True

    def _acquire_here(self) -> bool:
        with contextlib.suppress(FileNotFoundError):
            if time.time() - self._lock.stat().st_mtime > LOCK_STALE_S:
                logger.warning(
                    "reference cache: taking over from a builder that has been silent for %.0f s", LOCK_STALE_S
                )
                self._lock.unlink()
        try:
            lock = os.open(self._lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            return False
        with os.fdopen(lock, "w") as file:
            file.write(self.token)
        return True

    def heartbeat(self) -> None:
        """Tell waiting builders that this one is alive; to be called more often than every LOCK_STALE_S."""
        with contextlib.suppress(FileNotFoundError):
            os.utime(self._lock)
        if self.shared is not None:
            self.shared.heartbeat()

    def release(self) -> None:
        """Let the next builder in; a lock that another has taken over stays."""
        if self.shared is not None:
            self.shared.release()
        self._release_here()

    def _release_here(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            if self._lock.read_text() == self.token:
                self._lock.unlink()

    @property
    def _lock(self) -> Path:
        return self.folder / "building.lock"


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, xxhash.xxh3_128).hexdigest()
