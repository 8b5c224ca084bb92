"""Files and folders on local disks, shared mounts and object stores, behind the interface of pathlib.

A local folder is a ``pathlib.Path`` and a remote one a ``upath.UPath``: joining, reading, globbing and writing whole
files work the same on both. This module adds atomic writes, appending to remote files, and errors that name the path.
"""

import atexit
import contextlib
import functools
import hashlib
import io
import json
import logging
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, cast
from uuid import uuid4

import xxhash

logger = logging.getLogger(__name__)

UPLOAD_EVERY_S = 10.0
"""Seconds between uploads of an appendable file, while the file is small."""
UPLOAD_BYTES_PER_S = 2**20
"""Upper limit of the average upload rate: each upload sends the whole file, so large files are sent less often."""
OPTIONS: dict[str, dict[str, Any]] = {"s3": {"config_kwargs": {"retries": {"max_attempts": 1}}}}
"""Client settings by scheme. s3fs itself retries five times, with timeouts of 5 s to connect and 15 s to read."""
EXTRAS = {"s3": "s3", "s3a": "s3"}
"""Extra of this package that installs the client of a scheme."""
PRIVATE = ("memory", "local", "data", "http", "https")
"""Schemes that are read-only or visible to a single process."""
_BEFORE_LAST_LINE = re.compile(r"^\s*(Traceback |File \"|actor_id: )", re.MULTILINE)
"""Found in messages of Ray and torch.distributed.checkpoint that end with the cause."""


class StorageFailed(RuntimeError):
    """A remote path could not be reached, read or written."""


def folder_at(location: str) -> Path:
    """The folder at a local path or URI.

    Raises:
        ValueError: the scheme is unknown or not supported, or its client is not installed.
    """
    scheme, separator, rest = location.partition("://")
    if not separator:
        return Path(location)
    if scheme == "file":
        return Path(rest)
    from fsspec.registry import get_filesystem_class

    if scheme in PRIVATE:
        raise ValueError(f"{location!r}: not all processes can write to {scheme}://; give s3://bucket/path")
    try:
        get_filesystem_class(scheme)
        from upath import UPath
    except ImportError as error:
        install = f"pip install 'dpo-ray[{EXTRAS[scheme]}]'" if scheme in EXTRAS else str(error)
        raise ValueError(f"{location!r} needs a client that is not installed: {install}") from None
    except ValueError:
        raise ValueError(f"{location!r}: unknown storage {scheme}://; give a path, or s3://, gs://, abfs://") from None
    # Listings are not cached: other processes change the folder.
    return cast("Path", UPath(location, use_listings_cache=False, **OPTIONS.get(scheme, {})))


def is_remote(path: Path) -> bool:
    """True if ``path`` is in an object store."""
    return not isinstance(path, Path)


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Raise StorageFailed, which names ``path``, for any error of an object store's client; local errors pass."""
    try:
        yield
    except (StorageFailed, ValueError):
        raise
    except Exception as error:
        if not is_remote(path):
            raise
        raise StorageFailed(f"{path} cannot be used: {error_summary(error)}") from error


def error_summary(error: BaseException) -> str:
    """An error on one line: its class and the first line of its message.

    Errors that Ray or torch.distributed.checkpoint raise for another process end with the cause: their last line.
    """
    text, name = str(error), type(error).__name__
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if lines and _BEFORE_LAST_LINE.search(text):
        return lines[-1]
    return f"{name}: {lines[0]}" if lines else name


def validate_writable(folder: Path, key: str) -> None:
    """Write, read and delete a file in a remote folder; raise a ValueError that names ``key`` if that fails."""
    if not is_remote(folder):
        return
    probe = folder / ".probe"
    try:
        probe.write_text("dpo_ray")
        probe.read_text()
        probe.unlink()
    except Exception as error:
        raise ValueError(f"{key}: {folder} cannot be used: {error_summary(error)}") from error


def write_atomically(path: Path, content: str | bytes | Iterable[str]) -> None:
    """Write a file, given whole or in pieces of text: readers see no file, the earlier file or the complete new one."""
    pieces = [content] if isinstance(content, str | bytes) else content
    encoded = (piece if isinstance(piece, bytes) else piece.encode() for piece in pieces)
    if is_remote(path):
        path.write_bytes(b"".join(encoded))  # a single request, which is atomic
        return
    draft = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        with draft.open("wb") as file:
            file.writelines(encoded)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(folder: Path, *, replace: bool) -> Iterator[Path]:
    """A new folder to write to, moved to ``folder`` on success and deleted on failure; local only.

    Args:
        replace: True replaces an existing folder and expects a single writer. False keeps a folder that another
            process has completed in the meantime.
    """
    draft = folder.with_name(f".{folder.name}.{'draft' if replace else uuid4().hex}")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        yield draft
        if replace:
            shutil.rmtree(folder, ignore_errors=True)
        try:
            draft.rename(folder)
        except OSError:
            if replace or not folder.exists():
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file; empty if there is no file.

    An incomplete last line, of a running or killed writer, is ignored. Other invalid lines are skipped with a warning.
    """
    try:
        # Not splitlines, which also splits at line separators inside texts.
        lines = list(io.StringIO(path.read_text(encoding="utf-8", errors="replace"), newline="\n"))
    except FileNotFoundError:
        return []
    objects = []
    for number, line in enumerate(lines, 1):
        try:
            value = json.loads(line)
        except json.JSONDecodeError:
            value = None
        if isinstance(value, dict):
            objects.append(value)
        elif line.strip() and line.endswith("\n"):
            logger.warning("%s:%d: skipped, not a JSON object", path, number)
    return objects


def cached_text(version: str, folder: Path, compute: Callable[[], str]) -> str:
    """Result of ``compute()``, cached in ``folder``. ``version`` changes whenever it may, such as ``file_version``."""
    entry = folder / hashlib.sha256(version.encode()).hexdigest()[:32]
    if entry.exists() and (text := entry.read_text(encoding="utf-8")):
        return text
    text = compute()
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(entry, text)
    return text


def file_version(file: Path) -> str:
    """Path, size and times of a local file: a string that changes whenever the file is written."""
    status = file.stat()
    return f"{file.absolute()} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"


def file_digest(file: Path) -> str:
    """XXH3 digest of a file's content, in hexadecimal."""
    with file.open("rb") as stream:
        new_digest: Any = xxhash.xxh3_128  # its stubs differ from hashlib's in the return type of copy
        return hashlib.file_digest(stream, new_digest).hexdigest()


def remove_folder(folder: Path) -> None:
    """Delete a folder recursively; failures are logged as warnings."""
    if is_remote(folder):
        try:
            cast("Any", folder).fs.rm(cast("Any", folder).path, recursive=True)
        except FileNotFoundError:
            pass
        except Exception as error:
            logger.warning("%s was not deleted: %s", folder, error_summary(error))
    elif folder.exists():
        shutil.rmtree(folder, onerror=lambda _, name, error: logger.warning("%s: %s", name, error[1]))


def upload_folder(source: Path, folder: Path, *, last: tuple[str, ...]) -> None:
    """Replace a remote folder with a copy of a local one. Files named in ``last``, which mark it complete, go last."""
    remove_folder(folder)
    store = cast("Any", folder).fs
    for file in sorted((path for path in source.rglob("*") if path.is_file()), key=lambda path: path.name in last):
        store.put_file(str(file), cast("Any", folder / file.relative_to(source).as_posix()).path)


def open_appendable(path: Path) -> Path:
    """The local file to append to for ``path``: ``path`` itself, or a local copy of a remote file.

    Object stores cannot append. A background thread uploads the copy periodically, ``upload_appendable`` at once.
    """
    if not is_remote(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        return path
    return _UPLOADER.copy_of(path)


def upload_appendable() -> None:
    """Upload the remote files that this process has appended to.

    Raises:
        StorageFailed: an upload failed.
    """
    _UPLOADER.upload()


class _Uploader:
    """Local copies of the remote files that this process appends to, and the thread that uploads them."""

    def __init__(self) -> None:
        self.files: dict[Path, Path] = {}
        """Local copy of each remote file."""
        self.uploaded: dict[Path, tuple[int, int]] = {}
        """Size and time of each local copy at its last upload."""
        self.lock = threading.Lock()

    @functools.cached_property
    def folder(self) -> Path:
        """Folder of the copies. The first file creates it and starts the thread."""
        threading.Thread(target=self._keep_uploading, name="uploads", daemon=True).start()
        folder = Path(tempfile.mkdtemp(prefix="dpo_ray-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        return folder

    def copy_of(self, path: Path) -> Path:
        with self.lock, storage_errors(path):
            if path not in self.files:
                copy = self.folder / f"{len(self.files)}-{path.name}"
                with contextlib.suppress(FileNotFoundError):
                    copy.write_bytes(path.read_bytes())
                    self.uploaded[path] = _version(copy)
                self.files[path] = copy
            return self.files[path]

    def upload(self) -> None:
        with self.lock:
            for path, copy in self.files.items():
                if copy.exists() and self.uploaded.get(path) != (version := _version(copy)):
                    with storage_errors(path):
                        path.write_bytes(copy.read_bytes())
                    self.uploaded[path] = version

    def _keep_uploading(self) -> None:
        while True:
            size = sum(copy.stat().st_size for copy in list(self.files.values()) if copy.exists())
            time.sleep(max(UPLOAD_EVERY_S, size / UPLOAD_BYTES_PER_S))
            try:
                self.upload()
            except Exception as error:
                # The next upload sends the whole file again; if it fails too, the next checkpoint raises.
                logger.warning("%s", error)


_UPLOADER = _Uploader()


def _version(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_size, status.st_mtime_ns
