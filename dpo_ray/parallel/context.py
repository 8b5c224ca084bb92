"""Context parallelism: the tokens of each row are split over ranks, and with them the activations of a long pair.

Outside attention, a model treats tokens independently. In attention, keys and values are all-gathered (cheap with
grouped-query attention) and local queries attend to the whole row, under any mask (arXiv:2407.21783, section 3.3.2).
Losses need all completion tokens of a pair: log-probabilities are all-gathered, so every rank computes the same losses
and backpropagates through its own tokens. The gradient of a weight is the sum over the ranks.

T = tokens of the row, t = T / ranks local tokens, N = completion tokens of the row, n = number predicted locally
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from dpo_ray.data.assignment import shard_row
from dpo_ray.data.packing import PackedRow
from dpo_ray.ops.attention import GatherKV


def _identity(values: Tensor) -> Tensor:
    return values


@dataclass(frozen=True, slots=True)
class RowShard:
    """One rank's tokens of a row; all of them by default."""

    row: PackedRow
    """Local tokens and labels; ``spans`` and ``lengths`` describe the whole row."""
    positions: np.ndarray | None = None
    """(t,) positions of the local tokens in the row, ascending."""
    slices: Sequence[slice] | None = None
    """``positions`` as slices of the row."""
    gather_kv: GatherKV | None = None
    """All-gathers the local keys and values; backward reduce-scatters their gradients."""
    gather_values: Callable[[Tensor], Tensor] = _identity
    """All-gathers values of the local labels, (n,) -> (N,). Backward takes the local part of the gradient: every rank
    computes the same from the gathered values."""

    @property
    def is_partial(self) -> bool:
        """True if other ranks have the remaining tokens."""
        return self.gather_kv is not None


@dataclass(frozen=True, slots=True)
class ContextParallel:
    """This rank's position in the context-parallel group, which shards the tokens of each row."""

    rank: int = 0
    ranks: int = 1
    group: dist.ProcessGroup | None = None

    def shard(self, row: PackedRow) -> RowShard:
        """This rank's part of a row; all ranks of the group pass the same row."""
        if self.ranks == 1:
            return RowShard(row)
        split, device = shard_row(row.spans, self.ranks), row.input_ids.device
        positions, labels = split.positions[self.rank], split.labels(self.rank, row.scored)
        rank_order = split.positions.ravel()
        local_positions, local_labels, order, inverse = (
            torch.from_numpy(index).to(device, non_blocking=True)
            for index in (positions, labels, rank_order, np.argsort(rank_order))
        )
        source = np.searchsorted(positions, split.sources(row.scored)[labels])
        local = replace(
            row,
            input_ids=F.pad(row.input_ids, (0, split.padding))[:, local_positions],
            position_ids=F.pad(row.position_ids, (0, split.padding))[:, local_positions],
            spans=split.spans,
            source=torch.from_numpy(source).to(device, non_blocking=True),
            labels=row.labels[local_labels],
            sequence=row.sequence[local_labels],
        )
        return RowShard(
            local,
            positions,
            split.stretches(self.rank),
            partial(_gather_kv, order=order, inverse=inverse, group=self.group),
            lambda values: _GatherValues.apply(values, local_labels, row.labels.numel(), self.group),
        )


NO_CONTEXT_PARALLEL = ContextParallel()
"""Every rank has whole rows."""


def _gather_kv(key: Tensor, value: Tensor, *, order: Tensor, inverse: Tensor, group: Any) -> tuple[Tensor, Tensor]:
    """(1, K, t, D) local -> (1, K, T, D) of the row, for keys and values in one collective."""
    sizes = [key.shape[-1], value.shape[-1]]
    local = torch.cat((key, value), -1)[0].transpose(0, 1)  # (t, K, D of key + D of value)
    key, value = _GatherTokens.apply(local, order, inverse, group).transpose(0, 1)[None].split(sizes, -1)
    return key, value


class _GatherTokens(torch.autograd.Function):
    """All-gathers (t, ...) to (T, ...) in the order of the row; backward reduce-scatters gradients in float32."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, order: Tensor, inverse: Tensor, group: Any) -> Tensor:
        """``order``: (T,) positions in the row, concatenated over the ranks; ``inverse``: its inverse permutation."""
        ctx.order, ctx.group, ctx.tokens = order, group, len(tokens)
        rank_ordered = tokens.new_empty(len(order), *tokens.shape[1:])
        dist.all_gather_into_tensor(rank_ordered, tokens.contiguous(), group=group)
        return rank_ordered[inverse]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rank_ordered = grads[0].float()[ctx.order]
        local = rank_ordered.new_empty(ctx.tokens, *rank_ordered.shape[1:])
        dist.reduce_scatter_tensor(local, rank_ordered, group=ctx.group)
        return local.to(grads[0].dtype), None, None, None


class _GatherValues(torch.autograd.Function):
    """All-gathers (n,) to (N,); backward takes the local part, as all ranks compute the same gradient."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, index: Tensor, count: int, group: Any) -> Tensor:
        """``index``: (n,) positions of the local values among all ``count``."""
        ctx.index = index
        gathered = values.new_zeros(count).index_copy(0, index, values)
        dist.all_reduce(gathered, group=group)
        return gathered

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0][ctx.index], None, None, None
