"""Functions called in threads that do not keep the process alive."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import TypeVar

Value = TypeVar("Value")


@contextlib.contextmanager
def in_background(work: Callable[[threading.Event], None], name: str, *, close_timeout_s: float) -> Iterator[None]:
    """Run ``work`` in a thread until the block ends, which sets the event that ``work`` gets.

    Args:
        close_timeout_s: longest wait for ``work`` to return then; the thread does not keep the process alive.
    """
    ended = threading.Event()
    thread = threading.Thread(target=work, args=(ended,), name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(close_timeout_s)


def in_thread(function: Callable[[], Value]) -> "Future[Value]":
    """Call ``function`` in a thread that is never joined, also not at exit: it may wait for a process that died."""
    result: Future[Value] = Future()

    def run() -> None:
        try:
            result.set_result(function())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return result
