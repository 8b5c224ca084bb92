"""What both loops build before they start: tokenizer, policy, loss, optimizer, and the reference."""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedTokenizerBase

from dpo_ray.config.schema import Config
from dpo_ray.data.loader import BatchShape, PairSource, micro_batches
from dpo_ray.data.packing import build_sample_row, deal
from dpo_ray.data.tokenize import load_tokenizer
from dpo_ray.model.load import weights_digest
from dpo_ray.model.reference import (
    Reference,
    ReferenceStore,
    cached_reference,
    entry_keys,
    live_reference,
    no_reference,
    store_digest,
)
from dpo_ray.model.scorer import Scorer, pair_logps, sample_logps
from dpo_ray.model.shard import build_mesh, load_sharded, release_gathered
from dpo_ray.objective.losses import PairLoss, build_loss
from dpo_ray.train.optim import build_optimizer
from dpo_ray.types import TokenSample

logger = logging.getLogger(__name__)

SCORING_BLOCK = 512
"""Pairs that are shared out together."""
CACHE_WAIT_S = 6 * 3600.0
"""Longest wait for another run that scores the same reference."""
CACHE_POLL_S = 0.5


@dataclass(frozen=True, slots=True)
class Setup:
    """The parts of a run on one rank."""

    config: Config
    tokenizer: PreTrainedTokenizerBase
    policy: Scorer
    pair_loss: PairLoss
    optimizer: torch.optim.Optimizer
    mesh: DeviceMesh
    device: torch.device
    rank: int
    ranks: int

    @property
    def batch_shape(self) -> BatchShape:
        """How steps are cut for this rank."""
        optim = self.config.optim
        # A token meets about 24 h^2 multiplications and additions a layer in matrix products, an attended pair 4 h.
        attention_cost = 1 / (6 * self.policy.model.config.hidden_size)
        return BatchShape(self.rank, self.ranks, optim.tokens_per_micro_batch, attention_cost, optim.layout)


def set_up(config: Config, device: torch.device) -> Setup:
    """Build the parts. Every rank calls it; torch.distributed is initialised."""
    torch.manual_seed(config.run.seed)
    mesh = build_mesh(config.shard, device)
    policy = load_sharded(config.model, config.shard, mesh, device, trainable=True)
    return Setup(
        config,
        load_tokenizer(config.model.path, config.model.chat_template),
        policy,
        build_loss(config.loss),
        build_optimizer(policy, config.optim),
        mesh,
        device,
        dist.get_rank(),
        dist.get_world_size(),
    )


Progress = Callable[[int, int], None]
"""(done, total) of a long pass."""


def fixed_reference(t: Setup, source: PairSource, progress: Progress) -> tuple[Reference, str]:
    """The reference for a fixed set of pairs, and one line saying what was found and what was scored.

    Must run before a checkpoint is restored: the policy is the reference only while it is untrained.
    """
    match t.config.reference_kind:
        case "none":
            return no_reference, "reference: none"
        case "live":
            return live_reference(frozen_copy(t)), "reference: a frozen copy, scored with each step"
        case "cached":
            logps, line = _cached_logps(t, source, progress)
            return cached_reference(logps), line


def frozen_copy(t: Setup) -> Scorer:
    """The untrained policy, sharded like the policy and kept in the compute dtype."""
    return load_sharded(t.config.model, t.config.shard, t.mesh, t.device, trainable=False)


def no_progress(done: int, total: int) -> None:
    """For passes too short to report on."""


def score(t: Setup, source: PairSource, pairs: Sequence[int], progress: Progress = no_progress) -> np.ndarray:
    """Log-probabilities of pairs under the policy as it is, the work shared by all ranks.

    Args:
        pairs: indices into ``source``.

    Returns:
        (len(pairs), 2) float64, chosen and rejected, nats; the same on every rank.
    """
    position = {pair: at for at, pair in enumerate(pairs)}
    logps = torch.zeros(len(pairs), 2, dtype=torch.float64)
    done = 0
    for start in range(0, len(pairs), SCORING_BLOCK):
        batches, *_ = micro_batches(source, pairs[start : start + SCORING_BLOCK], t.batch_shape)
        for batch in batches:
            with torch.no_grad():
                scored = pair_logps(t.policy, batch.row.to(t.device))
            at = [position[pair] for pair in batch.pairs]
            logps[at] = torch.stack((scored.chosen, scored.rejected), 1).double().cpu()
            done = min(len(pairs), done + t.ranks * len(batch.pairs))
            progress(done, len(pairs))
    release_gathered(t.policy)
    shared = logps.to(t.device)
    dist.all_reduce(shared)
    return shared.cpu().numpy()


def score_samples(t: Setup, scorer: Scorer, samples: Sequence[TokenSample]) -> np.ndarray:
    """(len(samples),) log-probabilities of single completions under ``scorer``, nats; the same on every rank."""
    logps = torch.zeros(len(samples), dtype=torch.float64)
    tokens = np.array([len(s.prompt) + len(s.completion) for s in samples], np.int64)
    costs = tokens + t.batch_shape.attention_cost * tokens**2 / 2
    dealt = deal(tokens, costs, ranks=t.ranks, tokens_per_micro_batch=t.config.optim.tokens_per_micro_batch)
    for batch in dealt.shares[t.rank]:
        scored = sample_logps(scorer, build_sample_row([samples[i] for i in batch]).to(t.device))
        logps[list(batch)] = scored.double().cpu()
    if scorer is t.policy:
        release_gathered(scorer)
    shared = logps.to(t.device)
    dist.all_reduce(shared)
    return shared.cpu().numpy()


def _cached_logps(t: Setup, source: PairSource, progress: Progress) -> tuple[np.ndarray, str]:
    digest = _from_first(t, lambda: weights_digest(t.config.model.path))
    numerics = f"{t.config.model.dtype}-{t.device.type}-{t.policy.model.config._attn_implementation}"
    store = ReferenceStore(t.config.reference.cache_path / "reference" / store_digest(digest, numerics))
    keys = entry_keys(source) if t.rank == 0 else np.empty(0)
    known = _from_first(t, lambda: store.lookup(keys))
    scored = 0
    if np.isnan(known).any():
        with _building(t, store):
            # Another run may have scored what was missing while this one waited for its turn.
            known = _from_first(t, lambda: store.lookup(keys))
            missing = np.flatnonzero(np.isnan(known).any(1))
            scored = missing.size
            if scored:

                def alive(done: int, total: int) -> None:
                    store.beat()
                    progress(done, total)

                known[missing] = score(t, source, missing.tolist(), alive)
                if t.rank == 0:
                    lengths = np.array([(len(source[i].chosen), len(source[i].rejected)) for i in missing.tolist()])
                    store.add(keys[missing], known[missing], lengths)
    return known, f"reference cache: {len(source) - scored} pairs found, {scored} scored ({store.folder.name[:12]})"


@contextlib.contextmanager
def _building(t: Setup, store: ReferenceStore) -> Iterator[None]:
    """Hold the store's lock on behalf of all ranks: one run scores, others wait for what it finds.

    The ranks poll together, so that none of them waits in a collective for longer than the poll.
    """
    deadline = time.monotonic() + CACHE_WAIT_S
    while not _from_first(t, store.acquire):
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


def agreed(flag: bool) -> bool:
    """Whether any rank says so: what one rank hears, all do at the same step."""
    said = torch.tensor(int(flag))
    dist.all_reduce(said, op=dist.ReduceOp.MAX)
    return bool(said)


def _from_first(t: Setup, ask: Callable[[], Any]) -> Any:
    """What rank 0 finds, on every rank: shared storage may show the ranks different things for a moment."""
    answer = [ask() if t.rank == 0 else None]
    dist.broadcast_object_list(answer, src=0)
    return answer[0]
