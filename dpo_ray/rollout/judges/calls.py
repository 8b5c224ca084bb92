"""The number of a judge's calls that overlap."""

import inspect
from collections.abc import Callable
from typing import Any

ASYNC_CONCURRENCY = 32
"""Calls in progress of a judge that is an async function, and at most."""


def is_async(function: Callable[..., Any]) -> bool:
    """True if calls of the function return coroutines."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def calls_in_progress(judge: Callable[..., Any]) -> int:
    """Default of ``online.judge.concurrency``: the judge's attribute ``concurrency``, else 32 if it is async, else 1.

    A call that waits for others inside the judge uses up its time-out, so a judge that limits its own requests states
    how many calls keep them busy.
    """
    default = ASYNC_CONCURRENCY if is_async(judge) else 1
    return min(ASYNC_CONCURRENCY, getattr(judge, "concurrency", default))
