"""Log-probabilities of many pairs or completions: forward passes with the work split over all ranks."""

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from dpo_ray.data.assignment import balance_micro_batches
from dpo_ray.data.loader import PairSource, micro_batches
from dpo_ray.data.packing import build_sample_row
from dpo_ray.model.scorer import LogpsModel, pair_logps, sequence_logps
from dpo_ray.parallel.fsdp import reshard
from dpo_ray.train.trainer import Trainer
from dpo_ray.types import TokenSample

PAIRS_PER_BLOCK = 512
"""Pairs per block; each block is split over the ranks."""


class SampleSource(Protocol):
    """Tokenized completions: in memory, or a round's on disk."""

    @property
    def lengths(self) -> np.ndarray:
        """(n, 2) tokens of prompt and completion."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> TokenSample: ...


class SampleList(list[TokenSample]):
    """Completions in memory: a ``SampleSource``."""

    @property
    def lengths(self) -> np.ndarray:
        """(n, 2) tokens of prompt and completion."""
        return np.array([(len(sample.prompt), len(sample.completion)) for sample in self], np.int64).reshape(-1, 2)


def compute_logps(
    trainer: Trainer,
    model: LogpsModel,
    source: PairSource,
    pairs: Sequence[int],
    progress: Callable[[int, int], None],
) -> np.ndarray:
    """Log-probabilities of pairs under ``model``, the policy or a frozen reference.

    Args:
        pairs: indices into ``source``.
        progress: called with the number of finished and of all pairs.

    Returns:
        (len(pairs), 2) float64, chosen and rejected, nats; the same on every rank.
    """
    position = {pair: at for at, pair in enumerate(pairs)}
    logps = torch.zeros(len(pairs), 2, dtype=torch.float64)
    done = 0
    progress(0, len(pairs))
    for start in range(0, len(pairs), PAIRS_PER_BLOCK):
        batches, *_ = micro_batches(source, pairs[start : start + PAIRS_PER_BLOCK], trainer.forward_shape)
        computed: list[Tensor] = []
        for batch in batches:
            with torch.no_grad():
                of_batch = pair_logps(model, batch.row.to(trainer.device))
            computed.append(torch.stack((of_batch.chosen, of_batch.rejected), 1))
            done = min(len(pairs), done + trainer.dp_size * len(batch.pairs))
            progress(done, len(pairs))
        if computed:
            # One copy to the host per block: each copy waits for the GPU to finish.
            positions = [position[pair] for batch in batches for pair in batch.pairs]
            logps[positions] = torch.cat(computed).double().cpu()
    return _sum_over_ranks(trainer, logps)


def compute_sample_logps(trainer: Trainer, model: LogpsModel, samples: SampleSource) -> np.ndarray:
    """Log-probabilities of single completions under ``model``; each rank reads those that it computes.

    Returns:
        (len(samples),) float64, nats; the same on every rank.
    """
    logps = torch.zeros(len(samples), dtype=torch.float64)
    tokens = samples.lengths.sum(1)
    shape = trainer.forward_shape
    assignment = balance_micro_batches(
        tokens,
        tokens + shape.attention_cost * tokens**2 / 2,
        ranks=trainer.dp_size,
        tokens_per_micro_batch=shape.tokens_per_micro_batch,
        rows=np.ones_like(tokens) if shape.layout == "padded" else None,
    )
    batches = assignment.micro_batches[trainer.dp_rank]
    computed = [
        sequence_logps(model, build_sample_row([samples[i] for i in batch]).to(trainer.device)).double()
        for batch in batches
    ]
    if computed:
        logps[[i for batch in batches for i in batch]] = torch.cat(computed).cpu()
    return _sum_over_ranks(trainer, logps)


def _sum_over_ranks(trainer: Trainer, logps: Tensor) -> np.ndarray:
    """Sums rows that are zero on all ranks but the one that computed them."""
    reshard(trainer.policy)
    on_device = logps.to(trainer.device)
    dist.all_reduce(on_device, group=trainer.dp_group)
    return on_device.cpu().numpy()
