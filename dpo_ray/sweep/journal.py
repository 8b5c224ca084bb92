"""The journal of a sweep: every event that its searcher and scheduler see, in order, appended as it happens.

A killed sweep is continued by feeding the events to a fresh searcher and scheduler, which then have the state of those
that were killed, whatever they keep inside.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpo_ray.storage import read_jsonl

Event = dict[str, Any]


class Journal:
    """An append-only file of events, one JSON object per line."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def read(self) -> list[Event]:
        """The events so far. A last line that a kill truncated is dropped, from the file too."""
        if self.file.exists():
            text = self.file.read_bytes()
            complete = text.rfind(b"\n") + 1
            if complete < len(text):
                os.truncate(self.file, complete)
        return read_jsonl(self.file)

    def append(self, event: Mapping[str, Any]) -> None:
        """Writes an event through to the disk."""
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")
            file.flush()
            os.fsync(file.fileno())
