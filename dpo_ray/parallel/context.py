"""Context parallelism: ranks share the tokens of each row, so that the activations of a long pair are spread over them.

All of a model but attention treats tokens one by one. In attention the keys and values of the row, few under grouped
queries, are gathered from the ranks that share it, and the queries of each look at the whole row, whatever its mask
(arXiv:2407.21783, section 3.3.2). The losses, too, are of whole rows: what the head says of each token is gathered, and
every rank computes the same losses, but the gradients of its own tokens only; those of a weight are their sum.

T = tokens of the row, t = T / ranks of them here, N = completion tokens of the row, n of them predicted here
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
from torch.distributed.device_mesh import DeviceMesh

from dpo_ray.data.assignment import shard_row
from dpo_ray.data.packing import PackedRow
from dpo_ray.ops.attention import Gather


def _as_it_is(values: Tensor) -> Tensor:
    return values


@dataclass(frozen=True, slots=True)
class RowShard:
    """What one rank computes of a row; unless more is given, all of it."""

    row: PackedRow
    """Spans and lengths are those of the row, the rest is of the tokens and labels that are here."""
    tokens: np.ndarray | None = None
    """(t,) positions in the row of the tokens here, ascending."""
    pieces: Sequence[slice] | None = None
    """The same as slices of the row."""
    gather: Gather | None = None
    """Makes keys and values of the row of those of the tokens here; a collective, and so is its backward pass."""
    complete: Callable[[Tensor], Tensor] = _as_it_is
    """(n,) values of the labels here -> (N,) of all in the row, on all ranks that share it; a collective. Gradients are
    those by the values here, of what all these ranks compute alike."""

    @property
    def shared(self) -> bool:
        """Whether other ranks have the rest."""
        return self.gather is not None


@dataclass(frozen=True, slots=True)
class Context:
    """The ranks that share each row, as one of them sees it."""

    rank: int = 0
    ranks: int = 1
    group: dist.ProcessGroup | None = None

    def shard(self, row: PackedRow) -> RowShard:
        """This rank's part of a row that all of the group are given."""
        if self.ranks == 1:
            return RowShard(row)
        cut, device = shard_row(row.spans, self.ranks), row.input_ids.device
        tokens, labels = cut.tokens(self.rank), cut.labels(self.rank)
        by_rank = np.concatenate([cut.tokens(rank) for rank in range(self.ranks)])
        here, predicted, order, place = (
            torch.from_numpy(index).to(device, non_blocking=True)
            for index in (tokens, labels, by_rank, np.argsort(by_rank))
        )
        source = np.searchsorted(tokens, cut.sources[labels])
        mine = replace(
            row,
            input_ids=F.pad(row.input_ids, (0, cut.padding))[:, here],
            position_ids=F.pad(row.position_ids, (0, cut.padding))[:, here],
            spans=cut.spans,
            source=torch.from_numpy(source).to(device, non_blocking=True),
            labels=row.labels[predicted],
            sequence=row.sequence[predicted],
        )
        return RowShard(
            mine,
            tokens,
            cut.stretches(self.rank),
            partial(_gather, order=order, place=place, group=self.group),
            partial(_complete, index=predicted, count=row.labels.numel(), group=self.group),
        )


ALONE = Context()
"""A rank that shares no row."""


def build_context(work: DeviceMesh) -> Context:
    """The ranks that share rows with this one."""
    return Context(work.get_local_rank("context"), work["context"].size(), work.get_group("context"))


def _gather(key: Tensor, value: Tensor, *, order: Tensor, place: Tensor, group: Any) -> tuple[Tensor, Tensor]:
    """(1, K, t, D) here -> (1, K, T, D) of the row, for keys and values in one collective."""
    sizes = [key.shape[-1], value.shape[-1]]
    both = torch.cat((key, value), -1)[0].transpose(0, 1)  # (t, K, D of both)
    whole = _GatherTokens.apply(both, order, place, group).transpose(0, 1)[None]
    key, value = whole.split(sizes, -1)
    return key, value


class _GatherTokens(torch.autograd.Function):
    """(t, ...) here -> (T, ...) of the row, in its order; the gradients, summed over ranks in float32, go back."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, order: Tensor, place: Tensor, group: Any) -> Tensor:
        """Gather; ``order``: (T,) positions in the row of the tokens of all ranks, ``place`` its inverse."""
        ctx.order, ctx.group, ctx.tokens = order, group, len(tokens)
        by_rank = tokens.new_empty(len(order), *tokens.shape[1:])
        dist.all_gather_into_tensor(by_rank, tokens.contiguous(), group=group)
        return by_rank[place]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        by_rank = grads[0].float()[ctx.order]
        summed = by_rank.new_empty(ctx.tokens, *by_rank.shape[1:])
        dist.reduce_scatter_tensor(summed, by_rank, group=ctx.group)
        return summed.to(grads[0].dtype), None, None, None


def _complete(values: Tensor, *, index: Tensor, count: int, group: Any) -> Tensor:
    return _Complete.apply(values, index, count, group)


class _Complete(torch.autograd.Function):
    """(n,) values here -> (N,) values of all ranks. Nothing is summed backwards: all compute the same from these."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, index: Tensor, count: int, group: Any) -> Tensor:
        """Gather; ``index``: (n,) where the values belong, of ``count``."""
        ctx.index = index
        whole = values.new_zeros(count).index_copy(0, index, values)
        dist.all_reduce(whole, group=group)
        return whole

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0][ctx.index], None, None, None
