"""Background threads of the driver."""

import contextlib
import threading
from collections.abc import Callable, Iterator


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
