"""The process that compares mathematical expressions, seen from the judge: one at a time, replaced when it hangs."""

import logging
import math
import subprocess
import sys
import weakref
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Lock
from typing import Any

START_TIMEOUT_S = 60.0
WALL_TIME = 10.0
"""Longest wait for a comparison, as a multiple of its processor time: the machine's cores may be busy."""
WORKER = Path(__file__).with_name("math_worker.py")

logger = logging.getLogger(__name__)


class MathClient:
    """Compares expressions in a process of its own, which starts with the first comparison.

    Args:
        timeout_s: longest processor time of one comparison; then the process ends, and the next comparison starts
            another.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._lock = Lock()
        self._connection: Connection | None = None
        self._stop: Callable[[], Any] = lambda: None
        self.pid: int | None = None
        """Process id; None if no process runs."""

    def compare(self, answer: str, completion: str) -> float:
        """Compare the final expression of a completion with the answer.

        Returns:
            1 if they are equal, 0 if not or if the completion has none, NaN if the answer is no expression or the
            comparison did not end.

        Raises:
            RuntimeError: the process does not start.
        """
        with self._lock:
            connection = self._connected()
            try:
                connection.send((answer, completion))
                if connection.poll(WALL_TIME * self._timeout_s):
                    return connection.recv()
            except (EOFError, OSError):
                pass  # the process has ended
            self.close()
        logger.warning(
            "comparing %.100r with a completion that ends in %.100r took more than %g s or all memory",
            answer,
            completion[-100:],
            self._timeout_s,
        )
        return math.nan

    def close(self) -> None:
        """Kill the process; another comparison starts a new one."""
        self._stop()
        self._connection, self.pid = None, None

    def _connected(self) -> Connection:
        if self._connection is None:
            connection, remote = Pipe()
            with remote:
                # -P: the folder of this file does not become a place to import from.
                command = [sys.executable, "-P", str(WORKER), str(remote.fileno()), str(self._timeout_s)]
                process = subprocess.Popen(command, pass_fds=[remote.fileno()])
            self._stop = weakref.finalize(self, _stop, process, connection)
            try:
                _wait_until_ready(connection)
            except RuntimeError:
                self._stop()
                raise
            self._connection, self.pid = connection, process.pid
        return self._connection


def _wait_until_ready(connection: Connection) -> None:
    try:
        ready = connection.poll(START_TIMEOUT_S) and connection.recv()
    except (EOFError, OSError):
        ready = False
    if not ready:
        raise RuntimeError(f"judge 'math': its process did not start in {START_TIMEOUT_S:g} s; its error is above")


def _stop(process: subprocess.Popen[bytes], connection: Connection) -> None:
    connection.close()
    process.kill()
    process.wait()
