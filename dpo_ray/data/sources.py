"""Sources of records: files and datasets, split into parts that any process can read independently.

A row that cannot be parsed is returned as ``Unusable``; a source that cannot be read raises. Independent of the content
of records.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import xxhash

from dpo_ray.storage import file_version

SOURCES_ACCEPTED = (
    "accepted are .json (a list of records), .jsonl, .parquet and .arrow files, folders written by "
    "datasets.save_to_disk, and hub datasets as org/name or org/name:split"
)
TABLE_ROWS = 1024
"""Rows of a table converted to Python objects at a time."""

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


class Unreadable(ValueError):
    """A source is missing or cannot be read."""


class Unusable(Exception):
    """A record cannot be used."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True, slots=True)
class Part:
    """A range of rows of a source; by default all."""

    source: str
    start: int = 0
    """Index of the first row."""
    rows: int | None = None
    """Number of rows; None is all remaining ones."""
    byte: int = 0
    """Offset of the first row; JSONL only, like ``line``."""
    line: int = 0
    """Lines before the first row, empty ones included."""


Row = tuple[int, Any | Unusable]
"""Record number (line of a JSONL file, otherwise position in the source; from 1), and the record or its error."""


def check_sources(parts: Iterable[Part]) -> None:
    """Raise Unreadable for a missing source or an unknown format, without opening any."""
    for source in {part.source: None for part in parts}:
        _locate(source)


def read_rows(part: Part) -> Iterator[Row]:
    """Yield the rows of a part in order, in constant memory except for .json files, which are parsed whole.

    Raises:
        Unreadable: the source is missing or cannot be read.
    """
    source = _locate(part.source)
    kind = _DATASET if isinstance(source, _DatasetSource) else _FORMATS[source.path.suffix]
    return islice(kind.rows(source, part), part.rows)


def split_sources(sources: Sequence[str], *, rows_per_part: int, limit: int | None = None) -> list[Part]:
    """Split the first ``limit`` rows of ``sources`` into parts of at most ``rows_per_part`` rows, in order.

    Raises:
        Unreadable: a source is missing or cannot be read.
    """
    parts: list[Part] = []
    left = limit
    check_sources(map(Part, sources))
    for name in sources:
        source = _locate(name)
        kind = _DATASET if isinstance(source, _DatasetSource) else _FORMATS[source.path.suffix]
        for part in kind.parts(source, rows_per_part):
            rows = part.rows if left is None else min(part.rows, left)
            if rows:
                parts.append(replace(part, rows=rows))
            if left is not None:
                left -= rows
                if not left:
                    return parts
    return parts


def source_digest(source: str) -> str:
    """Hash of the content of ``source``: format and bytes of a file (not its name), fingerprint of a dataset.

    Raises:
        Unreadable: the source is missing or cannot be read.
    """
    located = _locate(source)
    if isinstance(located, _DatasetSource):
        return xxhash.xxh3_128_hexdigest(f"dataset {_open_dataset(located)._fingerprint}".encode())
    digest = xxhash.xxh3_128(located.path.suffix.encode())
    try:
        with located.path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    except OSError as error:
        raise Unreadable(f"{source}: cannot be read: {error.strerror}") from None
    return digest.hexdigest()


def source_version(source: str) -> str | None:
    """A string that changes whenever a local file is written; None for a dataset.

    Raises:
        Unreadable: the source is missing.
    """
    located = _locate(source)
    if isinstance(located, _DatasetSource):
        return None
    return file_version(located.path)


def show(value: Any) -> str:
    """A value for a message: short, and on one line."""
    if isinstance(value, list | dict):
        noun = "a list" if isinstance(value, list) else "an object"
        return f"{noun} of {len(value)}"
    text = json.dumps(value, ensure_ascii=True, default=repr)
    return text if len(text) <= 48 else text[:45] + "..."


# ------------------------------------------------------------------------------------------------------------- places


@dataclass(frozen=True, slots=True)
class _FileSource:
    name: str
    path: Path


@dataclass(frozen=True, slots=True)
class _DatasetSource:
    name: str
    location: str
    split: str
    saved: bool
    """True for a folder of save_to_disk, False for a hub dataset."""


def _locate(source: str) -> _FileSource | _DatasetSource:
    path = Path(source)
    if path.is_dir():
        return _DatasetSource(source, source, "train", saved=True)
    if path.is_file():
        if path.suffix not in _FORMATS:
            raise Unreadable(f"{source}: a file ending in {path.suffix!r} is not supported; {SOURCES_ACCEPTED}")
        return _FileSource(source, path)
    location, _, split = source.partition(":")
    if Path(location).is_dir():
        return _DatasetSource(source, location, split, saved=True)
    if _HUB_NAME.fullmatch(location) and Path(location).suffix not in _FORMATS:
        return _DatasetSource(source, location, split or "train", saved=False)
    raise Unreadable(f"{source}: no such file or folder; {SOURCES_ACCEPTED}")


# ------------------------------------------------------------------------------------------------------------ formats


@dataclass(frozen=True, slots=True)
class _Format:
    rows: Callable[[Any, Part], Iterator[Row]]
    """(source, part): rows from the part's first row to the end of the source."""
    parts: Callable[[Any, int], Iterator[Any]]
    """(source, rows per part): the parts of the source, in order."""


def _even_parts(count: Callable[[Any], int]) -> Callable[[Any, int], Iterator[Part]]:
    """Parts of a source with random access to rows."""

    def parts(source: Any, rows_per_part: int) -> Iterator[Part]:
        rows = count(source)
        for start in range(0, rows, rows_per_part):
            yield Part(source.name, start, min(rows_per_part, rows - start))

    return parts


def _jsonl_rows(source: _FileSource, part: Part) -> Iterator[Row]:
    with source.path.open("rb") as file:
        file.seek(part.byte)
        for number, line in enumerate(file, start=part.line + 1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield number, _parse_line(line)


def _jsonl_parts(source: _FileSource, rows_per_part: int) -> Iterator[Part]:
    part, rows, at = Part(source.name), 0, 0
    with source.path.open("rb") as file:
        for number, line in enumerate(file):
            if line.strip():
                if rows == rows_per_part:
                    yield replace(part, rows=rows)
                    part, rows = Part(source.name, part.start + rows, None, at, number), 0
                rows += 1
            at += len(line)
    yield replace(part, rows=rows)


def _parse_line(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Unusable("not_json", f"byte {error.start + 1} is not UTF-8")
    except (ValueError, RecursionError) as error:
        return Unusable("not_json", str(error).replace(": line 1 column", ": column"))


def _json_rows(source: _FileSource, part: Part) -> Iterator[Row]:
    yield from islice(enumerate(_parse_json(source), start=1), part.start, None)


def _parse_json(source: _FileSource) -> list[Any]:
    path = source.path
    content = path.read_bytes()
    try:
        records = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise Unreadable(f"{path}:{line}: byte {error.start + 1} of the file is not UTF-8 text") from None
    except json.JSONDecodeError as error:
        hint = "; a file with one record per line must end in .jsonl" if error.msg == "Extra data" else ""
        raise Unreadable(f"{path}:{error.lineno}: not valid JSON: {error.msg} at column {error.colno}{hint}") from None
    except RecursionError:
        raise Unreadable(f"{path}: not valid JSON: nested too deeply") from None
    if not isinstance(records, list):
        raise Unreadable(f"{path}: found {show(records)}; a .json file must contain a list of records")
    return records


def _parquet_rows(source: _FileSource, part: Part) -> Iterator[Row]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(source.path) as file:
            before, group = 0, 0
            while group < file.num_row_groups and before + file.metadata.row_group(group).num_rows <= part.start:
                before += file.metadata.row_group(group).num_rows
                group += 1
            batches = file.iter_batches(batch_size=TABLE_ROWS, row_groups=range(group, file.num_row_groups))
            yield from _table_rows(batches, before, part.start)
    except (ArrowException, OSError) as error:
        raise Unreadable(f"{source.path}: cannot be read as Parquet: {error}") from None


def _parquet_count(source: _FileSource) -> int:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(source.path) as file:
            return file.metadata.num_rows
    except (ArrowException, OSError) as error:
        raise Unreadable(f"{source.path}: cannot be read as Parquet: {error}") from None


def _arrow_rows(source: _FileSource, part: Part) -> Iterator[Row]:
    yield from _table_rows(_arrow_batches(source), 0, part.start)


def _arrow_count(source: _FileSource) -> int:
    return sum(batch.num_rows for batch in _arrow_batches(source))


def _arrow_batches(source: _FileSource) -> Iterator[Any]:
    import pyarrow as pa

    try:
        with pa.memory_map(str(source.path)) as file:
            try:
                reader = pa.ipc.open_file(file)
                yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
            except pa.ArrowInvalid:
                file.seek(0)
                yield from pa.ipc.open_stream(file)
    except (pa.ArrowException, OSError) as error:
        raise Unreadable(f"{source.path}: cannot be read as Arrow: {error}") from None


def _table_rows(batches: Iterable[Any], before: int, start: int) -> Iterator[Row]:
    """Rows from index ``start`` on; the first batch starts at row ``before``."""
    for batch in batches:
        for at in range(min(max(start - before, 0), batch.num_rows), batch.num_rows, TABLE_ROWS):
            yield from enumerate(batch.slice(at, TABLE_ROWS).to_pylist(), start=before + at + 1)
        before += batch.num_rows


def _dataset_rows(source: _DatasetSource, part: Part) -> Iterator[Row]:
    dataset = _open_dataset(source)
    yield from enumerate(dataset.select(range(part.start, len(dataset))), start=part.start + 1)


def _dataset_count(source: _DatasetSource) -> int:
    return len(_open_dataset(source))


def _open_dataset(source: _DatasetSource) -> Any:
    import datasets

    if not source.saved:
        try:
            return datasets.load_dataset(source.location, split=source.split)
        except Exception as error:  # the hub client, its HTTP library and the dataset's own reader each have own errors
            raise Unreadable(
                f"{source.name}: no such file or folder, and not loaded as a hub dataset: {error}; {SOURCES_ACCEPTED}"
            ) from error
    try:
        dataset = datasets.load_from_disk(source.location)
    except (OSError, ValueError) as error:
        raise Unreadable(f"{source.name}: the folder is not a saved dataset: {error}; {SOURCES_ACCEPTED}") from None
    if isinstance(dataset, datasets.DatasetDict):
        if source.split not in dataset:
            splits = ", ".join(f"{source.location}:{split}" for split in dataset)
            raise Unreadable(f"{source.name}: the folder has no split {source.split!r}; accepted are {splits}")
        return dataset[source.split]
    return dataset


_DATASET = _Format(_dataset_rows, _even_parts(_dataset_count))
_FORMATS: Mapping[str, _Format] = {
    ".json": _Format(_json_rows, _even_parts(lambda source: len(_parse_json(source)))),
    ".jsonl": _Format(_jsonl_rows, _jsonl_parts),
    ".parquet": _Format(_parquet_rows, _even_parts(_parquet_count)),
    ".arrow": _Format(_arrow_rows, _even_parts(_arrow_count)),
}
