"""Reference log-probabilities: data in a content-addressed store, or a frozen sharded copy.

The store's name is a digest of the reference's weights and of the numerics; an entry's is a digest of the prompt and
completion tokens; an entry holds the completion's summed log-probability and its length. It knows nothing of beta,
learning rate, seed or run directory: every trial of a sweep, every epoch and every rerun shares it.
"""

import base64
import contextlib
import hashlib
import logging
import os
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from dpo_ray.data.loader import MicroBatch, PairSource
from dpo_ray.model.scorer import Scorer, pair_logps
from dpo_ray.objective.logps import PairLogps
from dpo_ray.types import TokenPair

logger = logging.getLogger(__name__)

Reference = Callable[[MicroBatch], PairLogps | None]
"""Reference log-probabilities of a micro-batch's pairs; None where the loss needs none."""

ENTRY = np.dtype([("key", "S16"), ("logp", "<f8"), ("tokens", "<i4")])
LOCK_STALE_S = 120.0
"""A builder touches its lock at least this often; an older lock belongs to a process that died."""


def cached_reference(logps: np.ndarray) -> Reference:
    """Look reference log-probabilities up by pair index.

    Args:
        logps: (n, 2) chosen and rejected log-probabilities of all pairs, nats.
    """

    def reference(batch: MicroBatch) -> PairLogps:
        lengths = batch.row.lengths
        held = torch.from_numpy(logps[list(batch.pairs)].astype(np.float32)).to(lengths.device)  # (B, 2)
        return PairLogps(held[:, 0], held[:, 1], lengths[0::2], lengths[1::2])

    return reference


def live_reference(frozen: Scorer) -> Reference:
    """Score each micro-batch with a frozen model, whose layers stay gathered unless it reshards after each forward."""

    @torch.no_grad()
    def reference(batch: MicroBatch) -> PairLogps:
        return pair_logps(frozen, batch.row)

    return reference


def no_reference(batch: MicroBatch) -> None:
    """For losses that need no reference: nothing is loaded and nothing scored."""


def entry_keys(source: PairSource) -> np.ndarray:
    """(n, 2) S16 keys of every pair's chosen and rejected entries."""
    keys = np.empty((len(source), 2), "S16")
    for i in range(len(source)):
        pair = source[i]
        keys[i] = _key(pair, pair.chosen), _key(pair, pair.rejected)
    return keys


def _key(pair: TokenPair, completion: tuple[int, ...]) -> bytes:
    digest = hashlib.blake2b(
        np.array([len(pair.prompt), *pair.prompt, *completion], np.int32).tobytes(), digest_size=12
    )
    # Fixed-width numpy bytes drop trailing NULs, which base64 text never has.
    return base64.b64encode(digest.digest())


def store_digest(weights: str, numerics: str) -> str:
    """The name of the store of one reference model under one way of computing."""
    return hashlib.blake2b(f"{weights}|{numerics}".encode(), digest_size=16).hexdigest()


class ReferenceStore:
    """Entries of one reference model in a folder that runs and machines share.

    Shards are written whole under a unique name and never changed, so that readers need no lock.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder

    def lookup(self, keys: np.ndarray) -> np.ndarray:
        """Log-probabilities of ``keys``, NaN where there is no entry; same shape."""
        entries = self._entries()
        if not entries.size:
            return np.full(keys.shape, np.nan)
        at = np.searchsorted(entries["key"], keys).clip(max=entries.size - 1)
        return np.where(entries["key"][at] == keys, entries["logp"][at], np.nan)

    def add(self, keys: np.ndarray, logps: np.ndarray, tokens: np.ndarray) -> None:
        """Write entries as one new shard."""
        entries = np.empty(keys.size, ENTRY)
        entries["key"], entries["logp"], entries["tokens"] = keys.ravel(), logps.ravel(), tokens.ravel()
        unfinished = self.folder / f".{uuid.uuid4().hex}.npy"
        np.save(unfinished, entries)
        unfinished.rename(self.folder / f"shard-{uuid.uuid4().hex}.npy")

    def clear(self) -> None:
        """Forget every entry."""
        for shard in self.folder.glob("shard-*.npy"):
            shard.unlink(missing_ok=True)

    def _entries(self) -> np.ndarray:
        shards = []
        for path in sorted(self.folder.glob("shard-*.npy")):
            try:
                shards.append(np.load(path))
            except (OSError, ValueError) as error:
                logger.warning("reference cache: %s is damaged and left out: %s", path, error)
        entries = np.concatenate(shards) if shards else np.empty(0, ENTRY)
        entries.sort(order="key")
        return entries

    def acquire(self) -> bool:
        """Become the one builder, if there is none; the lock of a builder that died is taken over."""
        with contextlib.suppress(FileNotFoundError):
            if time.time() - self._lock.stat().st_mtime > LOCK_STALE_S:
                logger.warning(
                    "reference cache: taking over from a builder that has been silent for %.0f s", LOCK_STALE_S
                )
                self._lock.unlink()
        try:
            os.close(os.open(self._lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            return False
        return True

    def beat(self) -> None:
        """Tell waiting builders that this one is alive; to be called more often than every LOCK_STALE_S."""
        with contextlib.suppress(FileNotFoundError):
            os.utime(self._lock)

    def release(self) -> None:
        """Let the next builder in."""
        self._lock.unlink(missing_ok=True)

    @property
    def _lock(self) -> Path:
        return self.folder / "building.lock"
