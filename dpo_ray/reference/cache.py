"""Reference log-probabilities of a fixed set of pairs: read from the store, or computed if missing.

Independent of the model: log-probabilities come from a function. Every rank calls with the same arguments. One run
computes at a time, others wait and then read its entries.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch.distributed as dist

from dpo_ray.data.store import PairStore
from dpo_ray.parallel.collectives import any_rank, broadcast_from_rank0, gather_values
from dpo_ray.reference.store import ReferenceStore, entry_keys

logger = logging.getLogger(__name__)

PAIRS_PER_SHARD = 2**17
"""Pairs per shard of the store; a killed run keeps the shards that it completed."""
WAIT_S = 6 * 3600.0
"""Longest wait for another run that computes the same reference."""
POLL_S = 0.5
SPOT_CHECKS = 4
"""Maximum number of cached entries that are recomputed to check them."""
SPOT_TOKENS = 1024
"""Maximum tokens of these entries in total, unless a single entry has more: keeps the check fast."""
SPOT_TOLERANCE = 0.05
"""Largest mean difference of a cached entry from its recomputation, nats per token: far above the effect of the
micro-batch composition in bfloat16, far below the difference between two models."""
SPOT_FLOOR = 0.5
"""Nats added to the tolerance for the sum over the checked entries: over few tokens, errors do not average out."""

Progress = Callable[[int, int], None]
"""(done, total) of a long pass."""
ComputeLogps = Callable[[Sequence[int], Progress], np.ndarray]
"""(pair indices, progress) -> (len(pairs), 2) float64 log-probabilities, chosen and rejected, nats; a collective."""


def cached_logps(
    store: ReferenceStore, source: PairStore, compute_logps: ComputeLogps, progress: Progress
) -> tuple[np.ndarray, str]:
    """Reference log-probabilities of all pairs of ``source``.

    A few entries found in the store are computed again; if they differ, the store is cleared and computed anew.

    Returns:
        (n, 2) float64 memory-mapped, chosen and rejected, nats; and a summary of cache hits and misses.

    Raises:
        TimeoutError: another run has been computing for WAIT_S.
        ValueError: a log-probability is not finite; names the pair.
    """
    started = time.perf_counter()
    view, computed = _find_or_build(store, source, compute_logps, progress)
    if computed < len(source) and not _spot_check(source, view, compute_logps):
        logger.warning("reference cache: %s does not hold this model's log-probabilities; recomputing", store.folder)
        with _sole_builder(store):
            if dist.get_rank() == 0:
                store.clear()
            dist.barrier()
        view, computed = _find_or_build(store, source, compute_logps, progress)
    seconds = time.perf_counter() - started
    summary = f"{len(source) - computed} pairs cached, {computed} computed in {seconds:.1f} s"
    return np.load(view, mmap_mode="r"), f"{summary} ({store.folder.name[:12]})"


def _find_or_build(
    store: ReferenceStore, source: PairStore, compute_logps: ComputeLogps, progress: Progress
) -> tuple[Path, int]:
    """The view of the pairs, and the number of pairs that had to be computed for it."""
    find_view = partial(store.find_view, source.digest)
    if (view := broadcast_from_rank0(find_view)) is not None:
        return view, 0
    with _sole_builder(store):
        # Another run, here or on another cluster, may have built it while this one waited for the lock.
        broadcast_from_rank0(partial(store.fetch, source.digest))
        if (view := broadcast_from_rank0(find_view)) is not None:
            return view, 0
        return _build(store, source, compute_logps, progress)


def _build(
    store: ReferenceStore, source: PairStore, compute_logps: ComputeLogps, progress: Progress
) -> tuple[Path, int]:
    """Looks up a slice of the pairs on every rank, computes the missing ones, writes all in the order of the pairs."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    slice_of_rank = range(*(len(source) * n // ranks for n in (rank, rank + 1)))
    # All ranks use the same result: if they saw different gaps, they would compute different pairs and deadlock.
    logps = np.concatenate(gather_values(store.lookup(entry_keys(source, slice_of_rank))))
    missing = np.flatnonzero(np.isnan(logps).any(1)).tolist()

    for start in range(0, len(missing), PAIRS_PER_SHARD):
        pairs = missing[start : start + PAIRS_PER_SHARD]

        def report(done: int, _: int, before: int = start) -> None:
            store.heartbeat()
            progress(before + done, len(missing))

        logps[pairs] = compute_logps(pairs, report)
        if not np.isfinite(logps[pairs]).all():
            bad = pairs[int(np.flatnonzero(~np.isfinite(logps[pairs]).all(1))[0])]
            raise ValueError(f"model.path: the reference log-probability of {source.name_of(bad)} is not finite")
        if rank == 0:
            store.add(entry_keys(source, pairs), logps[pairs], source.lengths[pairs, 1:])
    return broadcast_from_rank0(lambda: store.add_view(source.digest, logps)), len(missing)


def _spot_check(source: PairStore, view: Path, compute_logps: ComputeLogps) -> bool:
    """True if a few short entries of a view agree with their recomputation."""
    evenly = np.linspace(0, len(source) - 1, min(len(source), 16 * SPOT_CHECKS), dtype=np.int64)
    tokens = source.lengths[evenly].sum(1)
    shortest = np.argsort(tokens, kind="stable")[:SPOT_CHECKS]
    within = np.count_nonzero(np.cumsum(tokens[shortest]) <= SPOT_TOKENS)
    pairs = evenly[shortest[: max(1, within)]].tolist()
    recomputed = compute_logps(pairs, lambda done, total: None)
    difference = np.abs(recomputed - np.load(view, mmap_mode="r")[pairs]).sum()
    tolerance = SPOT_TOLERANCE * int(source.lengths[pairs, 1:].sum()) + SPOT_FLOOR
    return not any_rank(bool(difference > tolerance))


@contextlib.contextmanager
def _sole_builder(store: ReferenceStore) -> Iterator[None]:
    """Holds the store's lock for all ranks. They poll together, so that no collective waits longer than one poll."""
    deadline = time.monotonic() + WAIT_S
    while not broadcast_from_rank0(store.acquire):
        if time.monotonic() > deadline:
            raise TimeoutError(
                f"waited {WAIT_S / 3600:.0f} h for another run to compute the reference into {store.folder}"
            )
        time.sleep(POLL_S)
    try:
        yield
    finally:
        if dist.get_rank() == 0:
            store.release()
