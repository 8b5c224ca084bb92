"""Folders on this machine, a mount or an object store, behind the one interface of pathlib.

A local folder is a ``pathlib.Path`` and a remote one a ``upath.UPath``: joining, reading, globbing and writing whole
files are the same on both. What an object store does not have stands here: files that grow, folders that appear whole,
and errors that say which place could not be reached.
"""

import atexit
import contextlib
import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any, cast

logger = logging.getLogger(__name__)

UPLOAD_EVERY_S = 10.0
"""Longest time for which a line of a growing file is on this machine only, while the file is small."""
UPLOAD_BYTES_PER_S = 2**20
"""A growing file is uploaded whole each time; large ones wait longer, to cost no more than this on average."""
OPTIONS: dict[str, dict[str, Any]] = {"s3": {"config_kwargs": {"retries": {"max_attempts": 1}}}}
"""Client settings. s3fs itself tries five times, each with at most 5 s to connect and 15 s without an answer."""
EXTRAS = {"s3": "s3", "s3a": "s3"}
"""Schemes and the extra of this package that brings their client."""
PRIVATE = ("memory", "local", "data", "http", "https")
"""Schemes that several processes cannot share or nobody can write to."""


class StorageFailed(RuntimeError):
    """A remote folder could not be reached, read or written."""


def folder_at(location: str) -> Path:
    """The folder that a local path or a URI names.

    Raises:
        ValueError: the scheme is unknown or unfit, or its client is not installed.
    """
    scheme, separator, rest = location.partition("://")
    if not separator:
        return Path(location)
    if scheme == "file":
        return Path(rest)
    from fsspec.registry import get_filesystem_class

    if scheme in PRIVATE:
        raise ValueError(
            f"{location!r}: {scheme}:// is no place that all processes can write to; give s3://bucket/path"
        )
    try:
        get_filesystem_class(scheme)
        from upath import UPath
    except ImportError as error:
        install = f"pip install 'dpo-ray[{EXTRAS[scheme]}]'" if scheme in EXTRAS else str(error)
        raise ValueError(f"{location!r} needs a client that is not installed: {install}") from None
    except ValueError:
        raise ValueError(
            f"{location!r}: no storage is called {scheme}://; give a path, or s3://, gs://, abfs://"
        ) from None
    # Another process may change a folder at any time: no listing is remembered.
    return cast("Path", UPath(location, use_listings_cache=False, **OPTIONS.get(scheme, {})))


def is_remote(path: Path) -> bool:
    """Whether ``path`` is in an object store."""
    return not isinstance(path, Path)


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn what the client of an object store raises into StorageFailed, which names ``path``; local errors travel."""
    try:
        yield
    except (StorageFailed, ValueError):
        raise
    except Exception as error:
        if not is_remote(path):
            raise
        raise StorageFailed(f"{path} cannot be used: {error_summary(error)}") from error


def error_summary(error: BaseException) -> str:
    """What an object store said, on one line, with the class of error it was."""
    said = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {said[0]}" if said else type(error).__name__


def validate_writable(folder: Path, key: str) -> None:
    """Raise a ValueError naming ``key`` unless a remote folder can be written to and read back; it is tried."""
    if not is_remote(folder):
        return
    probe = folder / ".probe"
    try:
        probe.write_text("dpo_ray")
        probe.read_text()
        probe.unlink()
    except Exception as error:
        raise ValueError(f"{key}: {folder} cannot be used: {error_summary(error)}") from error


def write_atomically(path: Path, text: str) -> None:
    """Write a file in one move: readers see nothing, or the earlier file, or all of ``text``."""
    if is_remote(path):
        path.write_text(text, encoding="utf-8")  # one request, which succeeds as a whole or not at all
        return
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    with unfinished.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


def cached_text(version: str, folder: Path, find: Callable[[], str]) -> str:
    """``find()``, noted in a folder under ``version`` so that it is found only once.

    Args:
        version: what changes whenever the answer may; see ``file_version``.
    """
    note = folder / sha256(version.encode()).hexdigest()[:32]
    if note.exists() and (answer := note.read_text(encoding="utf-8")):
        return answer
    answer = find()
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(note, answer)
    return answer


def file_version(file: Path) -> str:
    """What changes whenever a local file is written: its place, size and times."""
    status = file.stat()
    return f"{file.absolute()} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"


def remove_folder(folder: Path) -> None:
    """Remove a folder with all it holds; what cannot be removed is named in the log."""
    if is_remote(folder):
        try:
            cast("Any", folder).fs.rm(cast("Any", folder).path, recursive=True)
        except FileNotFoundError:
            pass
        except Exception as error:
            logger.warning("%s is not removed: %s", folder, error_summary(error))
    elif folder.exists():
        shutil.rmtree(folder, onerror=lambda _, name, error: logger.warning("%s: %s", name, error[1]))


def upload_folder(source: Path, folder: Path, *, last: tuple[str, ...]) -> None:
    """Copy a local folder of files to a remote one, replacing it.

    Args:
        last: names of files without which readers do not take the folder for finished; copied last.
    """
    remove_folder(folder)
    store = cast("Any", folder).fs
    for file in sorted((path for path in source.rglob("*") if path.is_file()), key=lambda path: path.name in last):
        store.put_file(str(file), cast("Any", folder / file.relative_to(source).as_posix()).path)


def open_appendable(path: Path) -> Path:
    """A local file to append to, for ``path``: itself, or a copy whose growth is uploaded now and then.

    Object stores cannot append. The copy begins with what ``path`` holds; ``upload_appendable`` brings it up to date.
    """
    if not is_remote(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        return path
    return _uploader().copy_of(path)


def upload_appendable() -> None:
    """Upload what this process has added to its growing files.

    Raises:
        StorageFailed: it cannot be.
    """
    if _uploader_or_none is not None:
        _uploader_or_none.upload()


class _Uploader:
    """The growing files of one process, and the thread that uploads them."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="dpo_ray-"))
        self.files: dict[Path, Path] = {}
        """Local copies, by what they are copies of."""
        self.sent: dict[Path, tuple[int, int]] = {}
        self.lock = threading.Lock()
        atexit.register(shutil.rmtree, self.folder, ignore_errors=True)
        threading.Thread(target=self._keep_uploading, name="uploads", daemon=True).start()

    def copy_of(self, path: Path) -> Path:
        with self.lock, storage_errors(path):
            if path not in self.files:
                copy = self.folder / f"{len(self.files)}-{path.name}"
                with contextlib.suppress(FileNotFoundError):
                    copy.write_bytes(path.read_bytes())
                    self.sent[path] = _version(copy)
                self.files[path] = copy
            return self.files[path]

    def upload(self) -> None:
        with self.lock:
            for path, copy in self.files.items():
                if copy.exists() and self.sent.get(path) != (version := _version(copy)):
                    with storage_errors(path):
                        path.write_bytes(copy.read_bytes())
                    self.sent[path] = version

    def _keep_uploading(self) -> None:
        while True:
            size = sum(copy.stat().st_size for copy in list(self.files.values()) if copy.exists())
            time.sleep(max(UPLOAD_EVERY_S, size / UPLOAD_BYTES_PER_S))
            try:
                self.upload()
            except Exception as error:
                # A store that comes back gets everything; one that does not fails the next checkpoint.
                logger.warning("%s", error)


_uploader_or_none: _Uploader | None = None
_uploader_lock = threading.Lock()


def _uploader() -> _Uploader:
    global _uploader_or_none
    with _uploader_lock:
        if _uploader_or_none is None:
            _uploader_or_none = _Uploader()
        return _uploader_or_none


def _version(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_size, status.st_mtime_ns
