"""Reference log-probabilities in an object store: how clusters that mount nothing in common share one cache.

Files of a ``ReferenceStore`` are named by their content and never change, so sharing them is copying what the other
side lacks. A store that cannot be reached is told of once and left alone: what it would have given is scored here.
"""

import logging
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

from dpo_ray.storage import error_summary

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 5.0
"""Time between two looks at another cluster's lock."""
BEAT_EVERY_S = 20.0
"""Time between two signs of life of a builder."""

Found = TypeVar("Found")


class SharedEntries:
    """The files of one reference model in an object store, and the lock of whoever adds to them.

    Args:
        folder: remote.
        stale_s: a lock that has not changed for so long belongs to a builder that died.
    """

    def __init__(self, folder: Path, *, stale_s: float) -> None:
        self.folder, self.stale_s = folder, stale_s
        self.token = uuid.uuid4().hex
        self.beats = 0
        self.due = 0.0
        self.seen: tuple[bytes, float] = (b"", 0.0)
        self.lost = False

    def fetch(self, pattern: str, into: Path) -> None:
        """Copy the files that match into a local folder that lacks them; damage is for its reader to find."""

        def fetch() -> None:
            for remote in self.folder.glob(pattern):
                kept, draft = into / remote.name, into / f".{uuid.uuid4().hex}.npy"
                if not kept.exists():
                    self._client.get_file(_key(remote), str(draft))
                    draft.rename(kept)

        self._attempt(fetch, None)

    def send(self, file: Path) -> None:
        """Copy a local file there."""
        self._attempt(lambda: self._client.put_file(str(file), _key(self.folder / file.name)), None)

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        self._attempt(lambda: (self.folder / name).unlink(missing_ok=True), None)

    def acquire(self) -> bool:
        """Become the one builder among all clusters, if there is none; True also where the store is lost.

        A lock is stale when it looks the same for ``stale_s`` of this process's own time: clocks need not agree.
        """
        if time.monotonic() < self.due:
            return False
        self.due = time.monotonic() + LOOK_EVERY_S
        return self._attempt(self._acquire, True)

    def heartbeat(self) -> None:
        """Tell waiting builders that this one is alive."""
        if time.monotonic() >= self.due:
            self._attempt(self._heartbeat, None)

    def release(self) -> None:
        """Let the next builder in; a lock that another has taken over stays."""
        self.due = 0.0
        self._attempt(lambda: self._lock.unlink() if self._mine() else None, None)

    def _acquire(self) -> bool:
        try:
            # "create" is one request that fails where the object exists.
            self._client.pipe_file(_key(self._lock), f"{self.token} 0".encode(), mode="create")
        except FileExistsError:
            try:
                word = self._lock.read_bytes()
            except FileNotFoundError:  # released between the two requests
                return False
            if word != self.seen[0]:
                self.seen = word, time.monotonic()
            elif time.monotonic() - self.seen[1] > self.stale_s:
                logger.warning("%s: taking over from a builder silent for %.0f s", self.folder, self.stale_s)
                self._lock.unlink(missing_ok=True)
            return False
        return True

    def _heartbeat(self) -> None:
        self.due = time.monotonic() + BEAT_EVERY_S
        if self._mine():
            self.beats += 1
            self._lock.write_bytes(f"{self.token} {self.beats}".encode())

    def _mine(self) -> bool:
        try:
            return self._lock.read_bytes().startswith(self.token.encode())
        except FileNotFoundError:
            return False

    def _attempt(self, action: Callable[[], Found], otherwise: Found) -> Found:
        if self.lost:
            return otherwise
        try:
            return action()
        except Exception as error:
            self.lost = True
            logger.warning(
                "reference.object_store: %s cannot be used any more (%s); going on with reference.cache_dir alone",
                self.folder,
                error_summary(error),
            )
            return otherwise

    @property
    def _client(self) -> Any:
        return cast("Any", self.folder).fs

    @property
    def _lock(self) -> Path:
        return self.folder / "building.lock"


def _key(path: Path) -> str:
    return cast("Any", path).path
