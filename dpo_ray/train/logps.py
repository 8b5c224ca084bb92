"""Log-probabilities of many pairs: passes over a set with the work shared by all ranks, and the reference cache.

The policy scores its own reference while it is untrained, so that no second model is loaded; what it finds is kept in a
ReferenceStore and never scored again.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from dpo_ray.data.assignment import balance_micro_batches
from dpo_ray.data.loader import PairSource, micro_batches
from dpo_ray.data.packing import build_sample_row
from dpo_ray.data.store import PairStore
from dpo_ray.model.adapters import WithoutAdapters
from dpo_ray.model.architecture import model_digest
from dpo_ray.model.scorer import LogpsModel, pair_logps, sequence_logps
from dpo_ray.parallel.fsdp import reshard
from dpo_ray.reference.reference import Reference, cached_reference, live_reference, no_reference
from dpo_ray.reference.store import ReferenceStore, entry_keys, store_digest
from dpo_ray.storage import folder_at
from dpo_ray.train.trainer import Trainer, any_rank, load_reference_model
from dpo_ray.types import TokenSample

logger = logging.getLogger(__name__)

BLOCK = 512
"""Pairs that are shared out together."""
SEGMENT = 2**17
"""Pairs whose entries are written together; what a killed run has scored is kept in such pieces."""
CACHE_WAIT_S = 6 * 3600.0
"""Longest wait for another run that scores the same reference."""
CACHE_POLL_S = 0.5
SPOT_CHECKS = 4
"""Entries found in the cache that are scored again, at most."""
SPOT_TOKENS = 1024
"""Tokens of these, unless one alone has more: a check should not be felt."""
SPOT_TOLERANCE = 0.05
"""Largest mean difference of a found entry from one scored again, in nats a token: far above what the composition of a
micro-batch changes in bfloat16, far below what another model gives."""
SPOT_FLOOR = 0.5
"""Difference in nats that is allowed to all checked entries together: a handful of tokens average nothing out."""

Progress = Callable[[int, int], None]
"""(done, total) of a long pass."""


def fixed_references(t: Trainer, sources: Sequence[PairStore], progress: Progress) -> list[tuple[Reference, str]]:
    """The reference for each fixed set of pairs, and one line saying what was found and what was scored.

    Must run before a checkpoint is restored: the policy is the reference only while it is untrained.
    """
    if t.config.reference_kind == "none":
        return [(no_reference, "reference: none")] * len(sources)
    if (frozen := frozen_reference(t)) is not None:
        return [
            (
                live_reference(partial(pair_logps, frozen)),
                f"reference: {t.config.reference_kind}, scored with each step",
            )
        ] * len(sources)
    found = [cached_logps(t, source, progress) for source in sources]
    return [(cached_reference(logps), line) for logps, line in found]


def frozen_reference(t: Trainer) -> LogpsModel | None:
    """What scores a reference that is there beside the policy for the whole run; None where there is none."""
    match t.config.reference_kind:
        case "live":
            return load_reference_model(t)
        case "adapters_off":
            return WithoutAdapters(t.policy)
    return None


def no_progress(done: int, total: int) -> None:
    """For passes too short to report on."""


def score(t: Trainer, source: PairSource, pairs: Sequence[int], progress: Progress = no_progress) -> np.ndarray:
    """Log-probabilities of pairs under the policy as it is, the work shared by all ranks.

    Args:
        pairs: indices into ``source``.

    Returns:
        (len(pairs), 2) float64, chosen and rejected, nats; the same on every rank.
    """
    position = {pair: at for at, pair in enumerate(pairs)}
    logps = torch.zeros(len(pairs), 2, dtype=torch.float64)
    done = 0
    progress(0, len(pairs))
    for start in range(0, len(pairs), BLOCK):
        batches, *_ = micro_batches(source, pairs[start : start + BLOCK], t.batch_shape)
        found: list[Tensor] = []
        for batch in batches:
            with torch.no_grad():
                scored = pair_logps(t.policy, batch.row.to(t.device))
            found.append(torch.stack((scored.chosen, scored.rejected), 1))
            done = min(len(pairs), done + t.shares * len(batch.pairs))
            progress(done, len(pairs))
        if found:
            # Read once a block: each reading waits for a GPU to come to its end.
            at = [position[pair] for batch in batches for pair in batch.pairs]
            logps[at] = torch.cat(found).double().cpu()
    reshard(t.policy)
    shared = logps.to(t.device)
    dist.all_reduce(shared, group=t.data_group)
    return shared.cpu().numpy()


def compute_sample_logps(t: Trainer, scorer: LogpsModel, samples: Sequence[TokenSample]) -> np.ndarray:
    """(len(samples),) log-probabilities of single completions under ``scorer``, nats; the same on every rank."""
    logps = torch.zeros(len(samples), dtype=torch.float64)
    tokens = np.array([len(s.prompt) + len(s.completion) for s in samples], np.int64)
    costs = tokens + t.batch_shape.attention_cost * tokens**2 / 2
    dealt = balance_micro_batches(
        tokens, costs, ranks=t.shares, tokens_per_micro_batch=t.batch_shape.tokens_per_micro_batch
    )
    mine = dealt.shares[t.share]
    found = [
        sequence_logps(scorer, build_sample_row([samples[i] for i in batch]).to(t.device)).double() for batch in mine
    ]
    if found:
        logps[[i for batch in mine for i in batch]] = torch.cat(found).cpu()
    reshard(t.policy)
    shared = logps.to(t.device)
    dist.all_reduce(shared, group=t.data_group)
    return shared.cpu().numpy()


def cached_logps(t: Trainer, source: PairStore, progress: Progress) -> tuple[np.ndarray, str]:
    """Reference log-probabilities of all pairs, from the cache as far as it has them.

    Returns:
        (n, 2) float64 memory-mapped, chosen and rejected, nats; and one line saying what was found and what was scored.

    Raises:
        TimeoutError: another run has been scoring for CACHE_WAIT_S.
    """
    digest = broadcast_from_rank0(
        t, lambda: model_digest(t.config.model.path, t.config.reference.cache_path / "models")
    )
    numerics = f"{t.config.model.dtype}-{t.device.type}-{t.policy.model.config._attn_implementation}"
    if t.config.model.lora is not None and t.config.model.lora.quantize:
        numerics += f"-{t.config.model.lora.quantize}-{t.config.model.lora.targets}"
    if t.config.model.fp8:
        numerics += "-fp8"
    name = store_digest(digest, numerics)
    shared = t.config.reference.object_store
    store = ReferenceStore(
        t.config.reference.cache_path / "reference" / name, folder_at(shared) / name if shared else None
    )
    started = time.perf_counter()
    view, scored = _find_or_build(t, store, source, progress)
    if scored < len(source) and not _spot_check(t, source, view):
        logger.warning("reference cache: %s does not hold this model's log-probabilities; scoring again", store.folder)
        with _building(t, store):
            if t.rank == 0:
                store.clear()
            dist.barrier()
        view, scored = _find_or_build(t, store, source, progress)
    seconds = time.perf_counter() - started
    found = f"{len(source) - scored} pairs found, {scored} scored in {seconds:.1f} s"
    return np.load(view, mmap_mode="r"), f"reference cache: {found} ({store.folder.name[:12]})"


def _find_or_build(t: Trainer, store: ReferenceStore, source: PairStore, progress: Progress) -> tuple[Path, int]:
    """The view of the pairs, and how many had to be scored for it."""
    view, scored = broadcast_from_rank0(t, lambda: store.find_view(source.digest)), 0
    if view is None:
        with _building(t, store):
            # Another run may have built it while this one waited for its turn, here or on another cluster.
            broadcast_from_rank0(t, lambda: store.fetch(source.digest))
            view = broadcast_from_rank0(t, lambda: store.find_view(source.digest))
            if view is None:
                view, scored = _build(t, store, source, progress)
    return view, scored


def _build(t: Trainer, store: ReferenceStore, source: PairStore, progress: Progress) -> tuple[Path, int]:
    """Look up a slice of the pairs on every rank, score what the store lacks, keep all in the order of the pairs."""
    # What one rank found, all take: with other gaps they would score other pairs, and wait for each other for ever.
    mine = range(*(len(source) * n // t.ranks for n in (t.rank, t.rank + 1)))
    slices: list[Any] = [None] * t.ranks
    dist.all_gather_object(slices, store.lookup(entry_keys(source, mine)))
    known = np.concatenate(slices)
    missing = np.flatnonzero(np.isnan(known).any(1)).tolist()

    for start in range(0, len(missing), SEGMENT):
        segment = missing[start : start + SEGMENT]

        def alive(done: int, _: int, before: int = start) -> None:
            store.heartbeat()
            progress(before + done, len(missing))

        known[segment] = score(t, source, segment, alive)
        if not np.isfinite(known[segment]).all():
            bad = segment[int(np.flatnonzero(~np.isfinite(known[segment]).all(1))[0])]
            raise ValueError(
                f"model.path: the reference gives {source.name_of(bad)} a log-probability that is not finite"
            )
        if t.rank == 0:
            store.add(entry_keys(source, segment), known[segment], source.lengths[segment, 1:])
    return broadcast_from_rank0(t, lambda: store.add_view(source.digest, known)), len(missing)


def _spot_check(t: Trainer, source: PairStore, view: Path) -> bool:
    """Whether a few entries of a view are what the policy gives; short ones, to be quick."""
    spread = np.linspace(0, len(source) - 1, min(len(source), 16 * SPOT_CHECKS), dtype=np.int64)
    tokens = source.lengths[spread].sum(1)
    shortest = np.argsort(tokens, kind="stable")[:SPOT_CHECKS]
    within = np.count_nonzero(np.cumsum(tokens[shortest]) <= SPOT_TOKENS)
    pairs = spread[shortest[: max(1, within)]].tolist()
    again, found = score(t, source, pairs), np.load(view, mmap_mode="r")[pairs]
    scored = int(source.lengths[pairs, 1:].sum())
    return not any_rank(bool(np.abs(again - found).sum() > SPOT_TOLERANCE * scored + SPOT_FLOOR))


@contextlib.contextmanager
def _building(t: Trainer, store: ReferenceStore) -> Iterator[None]:
    """Hold the store's lock on behalf of all ranks: one run scores, others wait for what it finds.

    The ranks poll together, so that none of them waits in a collective for longer than the poll.
    """
    deadline = time.monotonic() + CACHE_WAIT_S
    while not broadcast_from_rank0(t, store.acquire):
        if time.monotonic() > deadline:
            raise TimeoutError(
                f"waited {CACHE_WAIT_S / 3600:.0f} h for another run to score the reference into {store.folder}"
            )
        time.sleep(CACHE_POLL_S)
    try:
        yield
    finally:
        if t.rank == 0:
            store.release()


def broadcast_from_rank0(t: Trainer, ask: Callable[[], Any]) -> Any:
    """What rank 0 finds, on every rank: shared storage may show the ranks different things for a moment."""
    answer = [ask() if t.rank == 0 else None]
    dist.broadcast_object_list(answer, src=0)
    return answer[0]
