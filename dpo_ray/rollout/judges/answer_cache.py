"""Replies of a judge's model on disk, so that a resumed round asks nothing twice.

    judge_cache/VERSION/NAME.jsonl     one line per reply about a group of this policy version

Each process appends to a file of its own and reads those of all others, so that replicas share the folder without
locks. A line is a single write: it survives the death of its process, and may be lost with its node. Lines that are
damaged or not complete are skipped.
"""

import contextlib
import hashlib
import json
import os
import shutil
import socket
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

CACHE = "judge_cache"
"""Folder of replies in the run directory."""

OPEN_VERSIONS = 16
"""Policy versions whose index is kept in memory; with a larger ``online.max_lag``, files are read again."""


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer of a model."""

    text: str
    prompt_tokens: int | None = None
    """None if the model does not report it."""
    completion_tokens: int | None = None


def forget_replies(folder: Path, *, before: int) -> None:
    """Delete the replies about groups of the policy versions before ``before``."""
    for version in folder.glob("[0-9]*"):
        if int(version.name) < before:
            shutil.rmtree(version, ignore_errors=True)  # a judge may be reading it


def request_key(request: Mapping[str, Any]) -> str:
    """Digest of a request's content."""
    text = json.dumps(request, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


class AnswerCache:
    """The replies of all processes that judge a run. Not thread-safe.

    Args:
        folder: on a disk that all judges reach; None keeps nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._name = f"{socket.gethostname()}-{os.getpid()}-{uuid4().hex[:8]}.jsonl"
        self._versions: OrderedDict[int, _Version] = OrderedDict()

    def refresh(self, version: int) -> None:
        """Read the replies about groups of a policy version that other processes have added."""
        if self._folder is not None:
            self._version(version).refresh()

    def get(self, version: int, key: str) -> tuple[Reply, str] | None:
        """A reply and the group for which it was asked; None if there is none."""
        return self._version(version).get(key) if self._folder is not None else None

    def add(self, version: int, key: str, reply: Reply, group: str) -> None:
        """Append a reply.

        Args:
            group: the group for which it was asked.
        """
        if self._folder is not None:
            self._version(version).add(key, reply, group)

    def _version(self, version: int) -> "_Version":
        assert self._folder is not None
        if version not in self._versions:
            self._versions[version] = _Version(self._folder / f"{version:06d}", self._name)
            self._versions[version].refresh()
            if len(self._versions) > OPEN_VERSIONS:
                self._versions.popitem(last=False)
        self._versions.move_to_end(version)
        return self._versions[version]


class _Version:
    """The replies about groups of one policy version: positions in memory, texts on disk."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._own = folder, folder / name
        self._read: dict[Path, int] = {}
        """Bytes of each file that are indexed."""
        self._index: dict[str, tuple[Path, int, int]] = {}
        """File, start and length of each reply's line."""

    def refresh(self) -> None:
        for file in self._folder.glob("*.jsonl"):
            start = self._read.get(file, 0)
            with contextlib.suppress(FileNotFoundError):
                if file.stat().st_size > start:
                    self._index_lines(file, start, _read(file, start))

    def _index_lines(self, file: Path, start: int, content: bytes) -> None:
        *lines, _ = content.split(b"\n")  # the last line is empty, or still being written
        for line in lines:
            if (entry := _parse(line)) is not None:
                self._index.setdefault(entry["key"], (file, start, len(line)))
            start += len(line) + 1
        self._read[file] = start

    def get(self, key: str) -> tuple[Reply, str] | None:
        if key not in self._index:
            return None
        file, start, length = self._index[key]
        entry = None
        with contextlib.suppress(FileNotFoundError):
            entry = _parse(_read(file, start, length))
        if entry is None or entry["key"] != key:
            del self._index[key]
            return None
        return Reply(entry["text"], entry["prompt_tokens"], entry["completion_tokens"]), entry["group"]

    def add(self, key: str, reply: Reply, group: str) -> None:
        entry = {
            "key": key,
            "group": group,
            "text": reply.text,
            "prompt_tokens": reply.prompt_tokens,
            "completion_tokens": reply.completion_tokens,
        }
        line = json.dumps(entry).encode() + b"\n"
        file = self._open()
        try:
            start = os.fstat(file).st_size
            written = os.write(file, line)
        finally:
            os.close(file)
        if written != len(line):
            raise OSError(f"{self._own}: only {written} of {len(line)} bytes were written; the disk may be full")
        self._index[key] = (self._own, start, len(line) - 1)
        self._read[self._own] = start + len(line)

    def _open(self) -> int:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        try:
            return os.open(self._own, flags, 0o644)
        except FileNotFoundError:  # the folder is new, or has been deleted with its round
            self._folder.mkdir(parents=True, exist_ok=True)
            return os.open(self._own, flags, 0o644)


def _read(file: Path, start: int, length: int = -1) -> bytes:
    with file.open("rb") as stream:
        stream.seek(start)
        return stream.read(length)


def _parse(line: bytes) -> dict[str, Any] | None:
    """The entry in a line; None if it is damaged."""
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    expected = {"key": str, "group": str, "text": str, "prompt_tokens": int | None, "completion_tokens": int | None}
    if not isinstance(entry, dict):
        return None
    return entry if all(n in entry and isinstance(entry[n], kind) for n, kind in expected.items()) else None
