"""Reference log-probabilities in an object store, shared by clusters without a common mount.

The files of a ``ReferenceStore`` are immutable and named by their content, so sharing means copying missing files. An
unreachable object store is logged once and not used again; its entries are computed locally instead.
"""

import logging
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from dpo_ray.storage import error_summary

logger = logging.getLogger(__name__)

LOCK_POLL_S = 5.0
"""Interval between checks of another cluster's lock."""
HEARTBEAT_S = 20.0
"""Interval between a builder's heartbeats."""

Result = TypeVar("Result")


class RemoteEntries:
    """The files of one reference model in an object store, and the builder's lock.

    Args:
        folder: remote; None shares nothing.
        stale_s: a lock unchanged for this long belongs to a dead builder.
    """

    def __init__(self, folder: Path | None, *, stale_s: float) -> None:
        self.folder: Any = folder  # a UPath, which is not typed as one
        self.stale_s = stale_s
        self.disabled = folder is None
        self.token = uuid.uuid4().hex
        self.beats = 0
        self.due = 0.0
        self.seen: tuple[bytes, float] = (b"", 0.0)

    def fetch(self, pattern: str, into: Path) -> None:
        """Downloads matching files that ``into`` lacks; readers check them for damage."""

        def fetch() -> None:
            for remote in self.folder.glob(pattern):
                path, draft = into / remote.name, into / f".{uuid.uuid4().hex}.npy"
                if not path.exists():
                    self.folder.fs.get_file(remote.path, str(draft))
                    draft.rename(path)

        self._attempt(fetch, None)

    def upload(self, file: Path) -> None:
        self._attempt(lambda: self.folder.fs.put_file(str(file), (self.folder / file.name).path), None)

    def remove(self, name: str) -> None:
        self._attempt(lambda: (self.folder / name).unlink(missing_ok=True), None)

    def acquire(self) -> bool:
        """Takes the lock if it is free or stale; returns whether it is held. Always true without a reachable store.

        A lock is stale if its content does not change for ``stale_s`` on this process's clock: clocks need not agree.
        """
        if time.monotonic() < self.due and not self.disabled:
            return False
        self.due = time.monotonic() + LOCK_POLL_S
        return self._attempt(self._acquire, True)

    def heartbeat(self) -> None:
        if time.monotonic() >= self.due:
            self._attempt(self._heartbeat, None)

    def release(self) -> None:
        """Releases the lock, unless another builder has taken it over."""
        self.due = 0.0
        self._attempt(lambda: self._lock.unlink() if self._held() else None, None)

    def _acquire(self) -> bool:
        try:
            # "create" is one request that fails if the object exists.
            self.folder.fs.pipe_file(self._lock.path, f"{self.token} 0".encode(), mode="create")
        except FileExistsError:
            try:
                content = self._lock.read_bytes()
            except FileNotFoundError:  # released between the two requests
                return False
            if content != self.seen[0]:
                self.seen = content, time.monotonic()
            elif time.monotonic() - self.seen[1] > self.stale_s:
                logger.warning("%s: taking over the lock of a builder silent for %.0f s", self.folder, self.stale_s)
                self._lock.unlink(missing_ok=True)
            return False
        return True

    def _heartbeat(self) -> None:
        self.due = time.monotonic() + HEARTBEAT_S
        if self._held():
            self.beats += 1
            self._lock.write_bytes(f"{self.token} {self.beats}".encode())

    def _held(self) -> bool:
        try:
            return self._lock.read_bytes().startswith(self.token.encode())
        except FileNotFoundError:
            return False

    def _attempt(self, action: Callable[[], Result], default: Result) -> Result:
        if self.disabled:
            return default
        try:
            return action()
        except Exception as error:
            self.disabled = True
            logger.warning(
                "reference.object_store: %s is unreachable (%s); continuing with reference.cache_dir alone",
                self.folder,
                error_summary(error),
            )
            return default

    @property
    def _lock(self) -> Any:
        return self.folder / "building.lock"
