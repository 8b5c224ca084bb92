"""One optimizer step of preference optimization, and the same forward pass without the step for evaluation."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from dpo_ray.data.loader import StepBatch
from dpo_ray.data.packing import PackedRow
from dpo_ray.model.scorer import pair_logps
from dpo_ray.objective.logps import PairLogps
from dpo_ray.objective.losses import STEP_VALUES
from dpo_ray.objective.metrics import REWARDS, pair_metric_sums, pair_results
from dpo_ray.parallel.collectives import full_tensor, gather_values
from dpo_ray.parallel.fsdp import gradient_sync, hand_over_gradients, reshard, set_last_micro_batch
from dpo_ray.reference.reference import Reference
from dpo_ray.train.optim import set_learning_rate
from dpo_ray.train.trainer import Trainer
from dpo_ray.types import PAIR_METRICS, PAIR_RESULTS, Metrics


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
    sync = gradient_sync(config.shard, trainer.mesh)
    sums = _zero_sums(trainer.device)
    pairs_and_losses: list[tuple[tuple[int, ...], Tensor]] = []
    for i, (pairs, row, reference_logps) in enumerate(_rows(trainer, batch, reference)):
        last = i == len(batch.micro_batches) - 1
        set_last_micro_batch(policy, last, sync)
        losses = trainer.pair_losses(policy, row, reference=reference_logps)
        (losses.total * (trainer.grad_divide_factor / len(batch.pairs))).backward()
        sums += pair_metric_sums(losses.each, losses.policy, reference_logps, config.loss.beta)
        pairs_and_losses.append((pairs, losses.each))
    if sync == "hand_over":
        hand_over_gradients(policy)
    dist.all_reduce(sums, group=trainer.dp_group)
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), config.optim.max_grad_norm)
    # Reading the numbers waits for a GPU to finish the backward pass, before a step that cannot be undone.
    means, grad_norm = _means(sums), full_tensor(norm).item()
    finite = math.isfinite(means["loss"]) and math.isfinite(grad_norm)
    if finite:
        set_learning_rate(trainer.optimizer, lr)
        trainer.optimizer.step()
        rewards, completions = sums[:, REWARDS].sum(1).tolist()
        trainer.log_ratio_totals.add_(torch.tensor([rewards / config.loss.beta, completions], dtype=torch.float64))
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
def evaluate_pairs(
    trainer: Trainer, batches: Iterable[StepBatch], reference: Reference, *, pairs: int
) -> tuple[Metrics, np.ndarray]:
    """Evaluates the policy on held-out pairs.

    Args:
        pairs: number of held-out pairs n; the batches have each of them once.

    Returns:
        Loss, rewards and accuracy under ``eval/``; and (n, 4) float64, the PAIR_RESULTS of each pair by its index.
        Both are the same on every rank.
    """
    beta, sums = trainer.config.loss.beta, _zero_sums(trainer.device)
    results = torch.zeros(pairs, len(PAIR_RESULTS), dtype=torch.float64, device=trainer.device)
    for batch in batches:
        for numbers, row, reference_logps in _rows(trainer, batch, reference):
            losses = trainer.pair_losses(trainer.policy, row, reference=reference_logps)
            sums += pair_metric_sums(losses.each, losses.policy, reference_logps, beta)
            results[list(numbers)] = pair_results(losses.each, losses.policy, reference_logps, beta)
    reshard(trainer.policy)
    dist.all_reduce(sums, group=trainer.dp_group)
    dist.all_reduce(results, group=trainer.dp_group)  # a pair is on one rank; the others have zeros
    return {f"eval/{name}": value for name, value in _means(sums).items()}, results.cpu().numpy()


Row = tuple[tuple[int, ...], PackedRow, PairLogps | None]
"""Pairs of a micro-batch, their row on the device, and their reference log-probabilities."""


def _rows(trainer: Trainer, batch: StepBatch, reference: Reference) -> Iterator[Row]:
    """This rank's micro-batches; for losses that depend on all pairs of a step, after a forward pass over these."""
    rows = ((micro.pairs, micro.row.to(trainer.device)) for micro in batch.micro_batches)
    with_reference = ((pairs, row, reference(pairs, row)) for pairs, row in rows)
    loss = trainer.config.loss.of_step
    return iter(with_reference if loss is None else _with_step_values(trainer, list(with_reference), STEP_VALUES[loss]))


def _with_step_values(
    trainer: Trainer, rows: list[Row], step_values: Callable[[PairLogps, PairLogps], Tensor]
) -> Iterator[Row]:
    """Adds ``step_values`` of all pairs of the global step to the reference of each."""
    of_rows = []
    for _, row, of_reference in rows:
        assert of_reference is not None
        of_policy = pair_logps(trainer.policy, row)
        logps = (of_policy.chosen, of_policy.rejected, of_reference.chosen, of_reference.rejected)
        of_rows.append(torch.stack((*logps, row.unpaired), 1))
    local = torch.cat(of_rows).tolist()  # waits for a GPU once
    # The number of pairs differs between ranks.
    gathered = gather_values(local, trainer.dp_group)
    *columns, unpaired = torch.tensor([pair for of_rank in gathered for pair in of_rank]).unbind(1)
    lengths = torch.ones_like(unpaired)  # margins and log-ratios are sums over tokens
    policy = PairLogps(columns[0], columns[1], lengths, lengths, unpaired=unpaired)
    reference = replace(policy, chosen=columns[2], rejected=columns[3])
    first = sum(map(len, gathered[: trainer.dp_rank]))
    of_step = step_values(policy, reference)[first : first + len(local)].to(trainer.device)
    splits = of_step.split([len(pairs) for pairs, *_ in rows])
    for (pairs, row, of_reference), of_row in zip(rows, splits, strict=True):
        assert of_reference is not None
        yield pairs, row, replace(of_reference, of_step=of_row)


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


def _zero_sums(device: torch.device) -> Tensor:
    return torch.zeros(2, len(PAIR_METRICS), dtype=torch.float64, device=device)


def _means(sums: Tensor) -> dict[str, Any]:
    """Means of the metrics that have terms; ``rewards/rejected`` has none without a rejected completion."""
    return {name: total / terms for name, total, terms in zip(PAIR_METRICS, *sums.tolist(), strict=True) if terms}
