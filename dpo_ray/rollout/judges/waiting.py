"""Requests that are in flight at the same time."""

import asyncio
from collections.abc import Awaitable, Iterable
from typing import TypeVar

from dpo_ray.types import JudgeUnavailable

T = TypeVar("T")


async def wait_for_all(awaitables: Iterable[Awaitable[T]]) -> list[T]:
    """Results in order, or an error after all are done: no request remains in flight, to be sent again.

    The error is the first one, or one that ends the run.
    """
    results = await asyncio.gather(*awaitables, return_exceptions=True)
    errors = [result for result in results if isinstance(result, BaseException)]
    if errors:
        raise next((error for error in errors if isinstance(error, JudgeUnavailable)), errors[0])
    return [result for result in results if not isinstance(result, BaseException)]
