"""Calls of judges and their requests that overlap: how many, and waiting for them."""

import asyncio
import inspect
import math
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from dpo_ray.types import CompletionGroup, JudgeUnavailable

T = TypeVar("T")

ASYNC_CONCURRENCY = 32
"""Calls in progress of a judge that is an async function."""
MOST_CALLS = 500
"""Calls in progress of any judge, half of those that its actor takes, so that a ping never waits."""


@dataclass(frozen=True, slots=True)
class Capacity:
    """Limit of a judge's requests in progress: a call begins while there are fewer than ``requests``.

    Beyond that limit requests wait, and a call with waiting requests uses up ``online.judge.timeout_s``. By this rule a
    call begins when its first request can be sent, and calls about small groups fill the limit as well as calls about
    large ones.

    Attributes:
        requests: number of requests in progress; of calls, if ``per_group`` is empty.
        per_group: number of requests of a group, by its number of completions from 1 up. Empty: a call is one request.
    """

    requests: int
    per_group: tuple[int, ...] = ()

    def cost(self, groups: Sequence[CompletionGroup]) -> int:
        """Number of requests of a call."""
        if not self.per_group:
            return 1
        sizes = (max(1, min(len(group.completions), len(self.per_group))) for group in groups)
        return sum(self.per_group[size - 1] for size in sizes)


def is_async(function: Callable[..., Any]) -> bool:
    """True if calls of the function return coroutines."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def capacity_of(judge: Callable[..., Any], completions: int) -> Capacity:
    """The judge's ``request_capacity(completions)``; else its attribute ``concurrency``, 32 if it is async, or 1 calls.

    Args:
        completions: of the largest group.
    """
    if (own := getattr(judge, "request_capacity", None)) is not None:
        capacity: Capacity = own(completions)
        return Capacity(min(MOST_CALLS * min(capacity.per_group, default=1), capacity.requests), capacity.per_group)
    return Capacity(min(MOST_CALLS, getattr(judge, "concurrency", ASYNC_CONCURRENCY if is_async(judge) else 1)))


def least_capacity(capacities: Sequence[Capacity], completions: int) -> Capacity:
    """Capacity of a judge whose calls each call several judges: that of the busiest one."""
    requests = min(capacity.requests for capacity in capacities)
    if not any(capacity.per_group for capacity in capacities):
        return Capacity(requests)
    scaled = [
        [math.ceil(count * requests / capacity.requests) for count in capacity.per_group or (1,) * completions]
        for capacity in capacities
    ]
    return Capacity(requests, tuple(map(max, zip(*scaled, strict=True))))


async def wait_for_all(awaitables: Iterable[Awaitable[T]]) -> list[T]:
    """Results in order, or an error after all are done: no request remains in flight, to be sent again.

    The error is the first one, or one that ends the run.
    """
    results = await asyncio.gather(*awaitables, return_exceptions=True)
    errors = [result for result in results if isinstance(result, BaseException)]
    if errors:
        raise next((error for error in errors if isinstance(error, JudgeUnavailable)), errors[0])
    return [result for result in results if not isinstance(result, BaseException)]
