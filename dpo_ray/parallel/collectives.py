"""Small collectives: over Python values, for decisions on which all ranks must agree, and over one tensor."""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import _StridedShard

Value = TypeVar("Value")


def any_rank(flag: bool) -> bool:
    """True on every rank if ``flag`` is true on any: all ranks act on a signal at the same step."""
    flags = torch.tensor(int(flag))
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return bool(flags)


def broadcast_from_rank0(compute: Callable[[], Value]) -> Value:
    """Returns rank 0's ``compute()`` on every rank, since ranks may briefly see different states of shared storage."""
    values: list[Any] = [compute() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def broadcast_or_raise(compute: Callable[[], Value]) -> Value:
    """Every rank calls ``compute``; rank 0's result is returned, or its exception raised, on all of them."""
    outcome: Any = _outcome(compute)
    value, error = broadcast_from_rank0(lambda: outcome)
    if error is not None:
        raise error
    return value


def gather_values(value: Value, group: dist.ProcessGroup | None = None) -> list[Value]:
    """Returns the values of all ranks of ``group``, by rank, on each of them."""
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def gather_or_raise(compute: Callable[[], Value], group: dist.ProcessGroup | None = None) -> list[Value]:
    """``gather_values`` of ``compute()``; an exception on any rank is raised on all of them."""
    outcomes: list[Any] = gather_values(_outcome(compute), group)
    if failures := [error for _, error in outcomes if error is not None]:
        raise failures[0]
    return [value for value, _ in outcomes]


def _outcome(compute: Callable[[], Value]) -> tuple[Value | None, Exception | None]:
    try:
        return compute(), None
    except Exception as error:
        return None, error


def full_tensor(tensor: Tensor) -> Tensor:
    """Returns the whole of a sharded tensor, and any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_tensor(tensor: Tensor) -> Tensor:
    """Returns this rank's shard of a sharded tensor, and any other tensor as it is; both without a copy."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def is_sharded(tensor: Tensor) -> bool:
    """True if ranks hold different parts of the tensor."""
    return isinstance(tensor, DTensor) and bool(_sharded_dims(tensor))


def gather_to_rank0(tensor: Tensor) -> Tensor | None:
    """Returns the whole of a sharded tensor on rank 0 and None on other ranks, which allocate no more than a shard.

    A collective. Of several replicas only rank 0's takes part. A tensor that is sharded over several dimensions of the
    mesh, such as tensor parallelism with FSDP, is gathered along one after the other: the first rank along a dimension
    holds the shards of the others, and only first ranks take part in the next dimension.
    """
    if not isinstance(tensor, DTensor):
        return tensor if not dist.is_initialized() or dist.get_rank() == 0 else None
    mesh, dims = tensor.device_mesh, _sharded_dims(tensor)
    if any(mesh.get_local_rank(dim) > 0 for dim in range(mesh.ndim) if dim not in dims):
        return None
    whole: Tensor | None = tensor.to_local()
    while dims and whole is not None:
        inner = dims.pop()
        placement: Any = tensor.placements[inner]
        size = tensor.shape[placement.dim]
        for outer in dims:
            if cast("Any", tensor.placements[outer]).dim == placement.dim:
                size = _chunk_size(size, mesh.size(outer), mesh.get_local_rank(outer))
        whole = _gather_to_first(whole, mesh.get_group(inner), placement.dim, size)
    return whole


def _gather_to_first(shard: Tensor, group: dist.ProcessGroup, dim: int, size: int) -> Tensor | None:
    """Returns the group's shards, joined to ``size`` along ``dim``, on its first rank and None on its other ranks."""
    ranks = dist.get_world_size(group)
    rows = _chunk_size(size, ranks, 0)
    shard = shard.movedim(dim, 0)
    if len(shard) < rows:
        shard = torch.cat((shard, shard.new_zeros(rows - len(shard), *shard.shape[1:])))
    whole = shard.new_empty(ranks * rows, *shard.shape[1:]) if dist.get_rank(group) == 0 else None
    parts = None if whole is None else list(whole.chunk(ranks))
    dist.gather(shard.contiguous(), parts, group=group, group_dst=0)
    return None if whole is None else whole[:size].movedim(0, dim)


def _chunk_size(size: int, chunks: int, index: int) -> int:
    """Size of a shard by torch.chunk: the last shards may be smaller, or empty."""
    rows = -(-size // chunks)
    return min(rows, max(0, size - index * rows))


def _sharded_dims(tensor: DTensor) -> list[int]:
    """Dimensions of the mesh along which ranks hold different parts, in the order in which the tensor is sharded."""
    mesh, placements = tensor.device_mesh, tensor.placements
    dims = [dim for dim, placement in enumerate(placements) if mesh.size(dim) > 1 and not placement.is_replicate()]
    # FSDP shards what tensor parallelism has sharded along the same dimension of the tensor.
    return sorted(dims, key=lambda dim: isinstance(placements[dim], _StridedShard))
