"""One optimizer step of preference optimisation, and the same forward pass without the step for evaluation."""

import math
import time
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dpo_ray.data.loader import StepBatch
from dpo_ray.model.scorer import pair_losses
from dpo_ray.objective.metrics import PAIR_METRICS, pair_metric_sums
from dpo_ray.parallel.collectives import full_tensor, gather_values
from dpo_ray.parallel.fsdp import reshard, set_last_micro_batch
from dpo_ray.reference.reference import Reference
from dpo_ray.train.optim import set_learning_rate
from dpo_ray.train.trainer import Trainer
from dpo_ray.types import Metrics


def dpo_step(trainer: Trainer, batch: StepBatch, reference: Reference, *, lr: float) -> tuple[Metrics, tuple[int, ...]]:
    """Trains on one step's pairs.

    The loss is the mean over the pairs of the global step, whatever the split into ranks and micro-batches. A step
    whose loss or gradient is not finite changes nothing.

    Returns:
        The step's metrics, means over all pairs of all ranks; and the pairs at fault if the step was skipped: those
        with a non-finite loss, or all if only the gradient is not finite. The same on every rank.
    """
    started = time.perf_counter()
    policy, config = trainer.policy, trainer.config
    sums = _zero_sums(trainer)
    pairs_and_losses: list[tuple[tuple[int, ...], Tensor]] = []
    for i, micro_batch in enumerate(batch.micro_batches):
        last = i == len(batch.micro_batches) - 1
        set_last_micro_batch(policy, last, keep_gathered=not config.shard.reshard_after_forward)
        row = micro_batch.row.to(trainer.device)
        reference_logps = reference(micro_batch.pairs, row)
        losses = pair_losses(policy, row, trainer.loss, reference_logps, weighting=config.loss.weighting)
        (losses.total * (trainer.grad_divide_factor / len(batch.pairs))).backward()
        sums += pair_metric_sums(losses.each, losses.policy, reference_logps, config.loss.beta)
        pairs_and_losses.append((micro_batch.pairs, losses.each))
    dist.all_reduce(sums, group=trainer.dp_group)
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), config.optim.max_grad_norm)
    # Reading the numbers waits for a GPU to finish the backward pass, before a step that cannot be undone.
    means, grad_norm = _means(sums, len(batch.pairs)), full_tensor(norm).item()
    finite = math.isfinite(means["loss"]) and math.isfinite(grad_norm)
    if finite:
        set_learning_rate(trainer.optimizer, lr)
        trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    seconds = time.perf_counter() - started
    metrics = {
        **means,
        "optim/grad_norm": grad_norm,
        "optim/lr": lr,
        "optim/skipped": int(not finite),
        "perf/pairs_per_s": len(batch.pairs) / seconds,
        "perf/tokens_per_s": batch.tokens / seconds,
        "perf/step_s": seconds,
        "perf/idle": batch.idle,
    }
    return metrics, () if finite else _nonfinite_pairs(pairs_and_losses, trainer.dp_group) or batch.pairs


@torch.no_grad()
def evaluate_pairs(trainer: Trainer, batches: Iterable[StepBatch], reference: Reference) -> Metrics:
    """Loss, rewards and accuracy on held-out pairs, under ``eval/``."""
    config, sums, pairs = trainer.config.loss, _zero_sums(trainer), 0
    for batch in batches:
        for micro_batch in batch.micro_batches:
            row = micro_batch.row.to(trainer.device)
            reference_logps = reference(micro_batch.pairs, row)
            losses = pair_losses(trainer.policy, row, trainer.loss, reference_logps, weighting=config.weighting)
            sums += pair_metric_sums(losses.each, losses.policy, reference_logps, config.beta)
        pairs += len(batch.pairs)
    reshard(trainer.policy)
    dist.all_reduce(sums, group=trainer.dp_group)
    return {f"eval/{name}": value for name, value in _means(sums, pairs).items()}


def _nonfinite_pairs(
    pairs_and_losses: list[tuple[tuple[int, ...], Tensor]], group: dist.ProcessGroup
) -> tuple[int, ...]:
    """Indices of the pairs, over all ranks, with a NaN or infinite loss."""
    nonfinite = [
        pair
        for pairs, losses in pairs_and_losses
        for pair, is_finite in zip(pairs, losses.isfinite().tolist(), strict=True)
        if not is_finite
    ]
    return tuple(pair for of_rank in gather_values(nonfinite, group) for pair in of_rank)


def _zero_sums(trainer: Trainer) -> Tensor:
    return torch.zeros(len(PAIR_METRICS), dtype=torch.float64, device=trainer.device)


def _means(sums: Tensor, pairs: int) -> dict[str, Any]:
    return dict(zip(PAIR_METRICS, (sums / pairs).tolist(), strict=True))
