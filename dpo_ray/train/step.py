"""One optimizer step of preference optimisation, and the same forward pass without the step for evaluation."""

import math
import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from dpo_ray.data.loader import MicroBatch, StepBatch
from dpo_ray.model.scorer import PairLosses, pair_losses
from dpo_ray.objective.logps import PairLogps
from dpo_ray.objective.metrics import PAIR_METRICS, pair_metric_sums
from dpo_ray.parallel.fsdp import reshard, set_last_micro_batch
from dpo_ray.reference.reference import Reference
from dpo_ray.train.optim import set_learning_rate
from dpo_ray.train.trainer import Trainer
from dpo_ray.types import Metrics


def dpo_step(t: Trainer, batch: StepBatch, reference: Reference, *, lr: float) -> tuple[Metrics, tuple[int, ...]]:
    """Train on one step's pairs.

    The loss is the mean over the pairs of the global step, whatever the split into ranks and micro-batches. A step
    whose loss or gradient is not finite changes nothing.

    Returns:
        The step's metrics, means over all pairs of all ranks, and, of a step that was skipped, the pairs whose loss is
        not finite (all of them where only the gradient is not). The same on every rank.
    """
    started = time.perf_counter()
    sums = torch.zeros(len(PAIR_METRICS), dtype=torch.float64, device=t.device)
    losses_of: list[tuple[tuple[int, ...], Tensor]] = []
    for i, micro in enumerate(batch.micro_batches):
        last = i == len(batch.micro_batches) - 1
        set_last_micro_batch(t.policy, last, keep_gathered=not t.config.shard.reshard_after_forward)
        losses, part = _losses(t, micro, reference)
        # FSDP averages gradients over ranks; the mean is over the pairs of all shares.
        (losses.total * (t.averaged / len(batch.pairs))).backward()
        sums += part
        losses_of.append((micro.pairs, losses.each))
    dist.all_reduce(sums, group=t.data_group)
    grad_norm = _full(torch.nn.utils.clip_grad_norm_(t.policy.parameters(), t.config.optim.max_grad_norm))
    # Reading the numbers waits for a GPU to finish the backward pass, before a step that cannot be taken back.
    means, norm = _means(sums, len(batch.pairs)), grad_norm.item()
    finite = math.isfinite(means["loss"]) and math.isfinite(norm)
    if finite:
        set_learning_rate(t.optimizer, lr)
        t.optimizer.step()
    t.optimizer.zero_grad()
    seconds = time.perf_counter() - started
    metrics = {
        **means,
        "optim/grad_norm": norm,
        "optim/lr": lr,
        "optim/skipped": int(not finite),
        "perf/pairs_per_s": len(batch.pairs) / seconds,
        "perf/tokens_per_s": batch.tokens / seconds,
        "perf/step_s": seconds,
        "perf/idle": batch.idle,
    }
    return metrics, () if finite else _not_finite(t, losses_of) or batch.pairs


@torch.no_grad()
def evaluate_pairs(t: Trainer, batches: Iterable[StepBatch], reference: Reference) -> Metrics:
    """Loss, rewards and accuracy on held-out pairs, under ``eval/``."""
    sums = torch.zeros(len(PAIR_METRICS), dtype=torch.float64, device=t.device)
    pairs = 0
    for batch in batches:
        for micro in batch.micro_batches:
            sums += _losses(t, micro, reference)[1]
        pairs += len(batch.pairs)
    reshard(t.policy)
    dist.all_reduce(sums, group=t.data_group)
    return {f"eval/{name}": value for name, value in _means(sums, pairs).items()}


def _losses(t: Trainer, micro: MicroBatch, reference: Reference) -> tuple[PairLosses, Tensor]:
    micro = MicroBatch(micro.pairs, micro.row.to(t.device))
    held = reference(micro)

    def loss(policy: PairLogps, pairs: slice) -> Tensor:
        return t.pair_loss(policy, None if held is None else held.of(pairs))

    losses = pair_losses(t.policy, micro.row, loss, weighting=t.config.loss.weighting)
    return losses, pair_metric_sums(losses.each, losses.policy, held, t.config.loss.beta)


def _not_finite(t: Trainer, losses_of: Sequence[tuple[tuple[int, ...], Tensor]]) -> tuple[int, ...]:
    """The pairs of all shares whose loss is NaN or infinite."""
    mine = [
        pair
        for pairs, losses in losses_of
        for pair, is_finite in zip(pairs, losses.isfinite().tolist(), strict=True)
        if not is_finite
    ]
    found: list[Any] = [None] * t.shares
    dist.all_gather_object(found, mine, group=t.data_group)
    return tuple(pair for part in found for pair in part)


def _means(sums: Tensor, pairs: int) -> Metrics:
    return dict(zip(PAIR_METRICS, (sums / pairs).tolist(), strict=True))


def _full(norm: Tensor) -> Tensor:
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
