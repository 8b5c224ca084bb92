"""Small collectives: over Python values, for decisions on which all ranks must agree, and over one tensor."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

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


def gather_values(value: Value, group: dist.ProcessGroup | None = None) -> list[Value]:
    """Returns the values of all ranks of ``group``, by rank, on each of them."""
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def gather_or_raise(compute: Callable[[], Value], group: dist.ProcessGroup | None = None) -> list[Value]:
    """``gather_values`` of ``compute()``; an exception on any rank is raised on all of them."""
    outcome: Any  # (value, error)
    try:
        outcome = (compute(), None)
    except Exception as error:
        outcome = (None, error)
    outcomes: list[Any] = gather_values(outcome, group)
    if failures := [error for _, error in outcomes if error is not None]:
        raise failures[0]
    return [value for value, _ in outcomes]


def full_tensor(tensor: Tensor) -> Tensor:
    """Returns the whole of a sharded tensor, and any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
