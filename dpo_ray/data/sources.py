"""Sources of records: files and datasets, split into parts that any process can read independently.

A row that cannot be parsed is returned as ``Unusable``; a source that cannot be read raises. Independent of the content
of records.
"""

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from glob import glob
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from dpo_ray.storage import file_version

SOURCES_ACCEPTED = (
    "accepted are .json (a list of records), .jsonl, .ndjson and .csv files (also as .jsonl.gz or .jsonl.zst), "
    ".parquet and .arrow files, folders of files, patterns such as data/*.jsonl, folders written by "
    "datasets.save_to_disk, and hub datasets as org/name or org/name:split"
)
TABLE_ROWS = 1024
"""Rows of a table converted to Python objects at a time."""

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
_NOT_DATA = (".md", ".txt", ".yaml", ".yml", ".py", ".lock", ".crc", "")
"""Suffixes of files that folders of data may contain."""
_NOT_RECORDS = ("dataset_info.json", "dataset_infos.json")
_SPLIT = re.compile(r"(?:train|test|validation|valid|dev|eval)(?![a-z])")
"""Start of the name of a split, such as train or train_prefs."""


class Unreadable(ValueError):
    """A source is missing or cannot be read."""


class Unusable(Exception):
    """A record cannot be used."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True, slots=True)
class Part:
    """A range of rows of a file or dataset; by default all."""

    source: str
    start: int = 0
    """Index of the first row."""
    rows: int | None = None
    """Number of rows; None is all remaining ones."""
    byte: int = 0
    """Offset of the first row; uncompressed JSONL only, like ``line``."""
    line: int = 0
    """Lines before the first row, empty ones included."""


Row = tuple[int, Any | Unusable]
"""Record number (line of a JSONL file, otherwise position in the source; from 1), and the record or its error."""


def expand_source(source: str) -> list[str]:
    """The files and datasets of a source, sorted: those of a folder or pattern, otherwise the source itself.

    ``FOLDER:split`` are the files of a folder that belong to the split by their names or by those of their folders.

    Raises:
        Unreadable: a source is missing or of an unknown format. None is opened.
    """
    folder, _, split = source.partition(":") if not Path(source).exists() else (source, "", "")
    if any(character in source for character in "*?[") and not Path(source).exists():
        files = sorted(name for name in glob(source, recursive=True) if Path(name).is_file())
        if not files:
            raise Unreadable(f"{source}: no file matches the pattern; {SOURCES_ACCEPTED}")
    elif Path(folder).is_dir() and not _is_saved_dataset(Path(folder)):
        files = _files_of_folder(source, Path(folder), split)
    else:
        files = [source]
    check_sources(map(Part, files))
    return files


def check_sources(parts: Iterable[Part]) -> None:
    """Raise Unreadable for a missing source or an unknown format, without opening any."""
    for source in {part.source: None for part in parts}:
        _locate(source)


def read_rows(part: Part) -> Iterator[Row]:
    """Yield the rows of a part in order, in constant memory except for .json files, which are parsed whole.

    Raises:
        Unreadable: the source is missing or cannot be read.
    """
    return islice(_locate(part.source).read(part), part.rows)


def split_sources(sources: Sequence[str], *, rows_per_part: int, limit: int | None = None) -> list[Part]:
    """Split the first ``limit`` rows of ``sources`` into parts of at most ``rows_per_part`` rows, in order.

    Raises:
        Unreadable: a source is missing or cannot be read.
    """
    parts: list[Part] = []
    left = limit
    for located in [_locate(source) for source in sources]:
        for part in located.split(rows_per_part):
            rows = part.rows or 0 if left is None else min(part.rows or 0, left)
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
    return _locate(source).digest()


def source_version(source: str) -> str | None:
    """A string that changes whenever a local file is written; None for a dataset.

    Raises:
        Unreadable: the source is missing.
    """
    located = _locate(source)
    return file_version(located.path) if isinstance(located, _File) else None


def show(value: Any) -> str:
    """A value for a message: short, and on one line."""
    if isinstance(value, list | dict):
        noun = "a list" if isinstance(value, list) else "an object"
        return f"{noun} of {len(value)}"
    text = json.dumps(value, ensure_ascii=True, default=repr)
    return text if len(text) <= 48 else text[:45] + "..."


# ------------------------------------------------------------------------------------------------------------- places


def _locate(source: str) -> "_File | _Dataset":
    path = Path(source)
    if path.is_dir():
        return _Dataset(source, source, "train", saved=True)
    if path.is_file():
        file = _File.of(source)
        if file is None:
            raise Unreadable(f"{source}: a file ending in {path.suffix!r} is not supported; {SOURCES_ACCEPTED}")
        return file
    location, _, split = source.partition(":")
    if Path(location).is_dir():
        return _Dataset(source, location, split, saved=True)
    if _HUB_NAME.fullmatch(location) and _File.of(location) is None:
        return _Dataset(source, location, split or "train", saved=False)
    raise Unreadable(f"{source}: no such file or folder; {SOURCES_ACCEPTED}")


def _is_saved_dataset(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _files_of_folder(source: str, folder: Path, split: str) -> list[str]:
    """The data files of a folder and its subfolders, sorted; those of one split, if given."""
    paths = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    visible = [path for path in paths if not any(part[0] in "._" for part in path.parts)]
    files = [path for path in visible if _File.of(str(path)) and path.name not in _NOT_RECORDS]
    other = [
        path
        for path in visible
        if path not in files and path.name not in _NOT_RECORDS and path.suffix.lower() not in _NOT_DATA
    ]
    if other or not files:
        problem = f"{other[0]} is not supported" if other else "the folder has no data files"
        raise Unreadable(f"{source}: {problem}; {SOURCES_ACCEPTED}")
    splits: dict[str, list[Path]] = {}
    for file in files:
        splits.setdefault(_split_of(file), []).append(file)
    if not split and len(splits) > 1 and any(splits.keys() - {""}):
        named = ", ".join(f"{folder}:{name}" for name in splits if name)
        raise Unreadable(f"{source}: the folder holds several splits; accepted are {named}")
    if split and split not in splits:
        raise Unreadable(
            f"{source}: the folder has no split {split!r}; found {', '.join(filter(None, splits)) or 'none'}"
        )
    return [str(folder / file) for file in (splits[split] if split else files)]


def _split_of(file: Path) -> str:
    """The split that a file belongs to by the name of its folder or by its own name without the number of the shard."""
    stem = re.sub(r"-\d+-of-\d+$", "", file.name.partition(".")[0])
    return next((part for part in (*file.parts[:-1], stem) if _SPLIT.match(part)), "")


# -------------------------------------------------------------------------------------------------------------- files


@dataclass(frozen=True, slots=True)
class _File:
    """A local file; ``kind`` and ``compression`` follow from its name."""

    name: str
    path: Path
    kind: str
    compression: str | None

    @classmethod
    def of(cls, name: str) -> "_File | None":
        """The file, or None if its suffix is not supported."""
        path = Path(name)
        compression = _COMPRESSED.get(path.suffix.lower())
        kind = Path(path.stem).suffix.lower() if compression else path.suffix.lower()
        known = kind in _FORMATS and not (compression and kind in (".parquet", ".arrow"))
        return cls(name, path, kind, compression) if known else None

    def read(self, part: Part) -> Iterator[Row]:
        """Rows from the part's first one to the end of the file."""
        with _read_errors(self):
            yield from _FORMATS[self.kind].rows(self, part)

    def split(self, rows_per_part: int) -> Iterator[Part]:
        """Parts of the file, in order; one part if rows can only be reached by reading all before them."""
        form = _FORMATS[self.kind]
        with _read_errors(self):
            if form.parts and not self.compression:
                yield from form.parts(self, rows_per_part)
            else:
                rows = form.count(self)
                step = rows_per_part if form.random_access else rows
                yield from (Part(self.name, start, min(step, rows - start)) for start in range(0, rows, step or 1))

    def digest(self) -> str:
        """Hash of format and bytes."""
        digest = xxhash.xxh3_128((self.kind + (self.compression or "")).encode())
        with _read_errors(self), self.path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
        return digest.hexdigest()

    def open(self) -> BinaryIO:
        """The decompressed content."""
        if not self.compression:
            return self.path.open("rb")
        import pyarrow as pa

        return io.BufferedReader(pa.input_stream(str(self.path), compression=self.compression))


@contextmanager
def _read_errors(file: _File) -> Iterator[None]:
    """Raise Unreadable for errors of reading a file."""
    from pyarrow import ArrowException

    try:
        yield
    except (OSError, EOFError, ArrowException) as error:
        name = {".parquet": " as Parquet", ".arrow": " as Arrow"}.get(file.kind, "")
        problem = getattr(error, "strerror", None) or error
        raise Unreadable(f"{file.name}: cannot be read{name}: {problem}") from None


def _jsonl_rows(file: _File, part: Part) -> Iterator[Row]:
    with file.open() as lines:
        if part.byte:
            lines.seek(part.byte)
        skip = 0 if part.byte else part.start
        for number, line in enumerate(lines, start=part.line + 1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                if skip:
                    skip -= 1
                else:
                    yield number, _parse_line(line)


def _jsonl_parts(file: _File, rows_per_part: int) -> Iterator[Part]:
    part, rows, at = Part(file.name), 0, 0
    with file.open() as lines:
        for number, line in enumerate(lines):
            if line.strip():
                if rows == rows_per_part:
                    yield replace(part, rows=rows)
                    part, rows = Part(file.name, part.start + rows, None, at, number), 0
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


def _json_rows(file: _File, part: Part) -> Iterator[Row]:
    yield from islice(enumerate(_parse_json(file), start=1), part.start, None)


def _parse_json(file: _File) -> list[Any]:
    with file.open() as stream:
        content = stream.read()
    try:
        records = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise Unreadable(f"{file.name}:{line}: byte {error.start + 1} of the file is not UTF-8 text") from None
    except json.JSONDecodeError as error:
        hint = "; a file with one record per line must end in .jsonl" if error.msg == "Extra data" else ""
        raise Unreadable(
            f"{file.name}:{error.lineno}: not valid JSON: {error.msg} at column {error.colno}{hint}"
        ) from None
    except RecursionError:
        raise Unreadable(f"{file.name}: not valid JSON: nested too deeply") from None
    if not isinstance(records, list):
        raise Unreadable(f"{file.name}: found {show(records)}; a .json file must contain a list of records")
    return records


def _csv_rows(file: _File, part: Part) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)  # the default of 128 KiB is shorter than some conversations
    try:
        with file.open() as stream:
            rows = csv.DictReader(io.TextIOWrapper(stream, "utf-8-sig", newline=""), strict=True)
            for number, row in enumerate(islice(rows, part.start, None), start=part.start + 1):
                if None in row:
                    yield number, Unusable("not_a_record", f"more cells than the header's {len(rows.fieldnames or [])}")
                else:
                    yield (
                        number,
                        {name: cell or None for name, cell in row.items() if name},
                    )  # pandas names its index ""
    except (csv.Error, UnicodeDecodeError) as error:
        raise Unreadable(f"{file.name}: cannot be read as CSV: {error}") from None


def _parquet_rows(file: _File, part: Part) -> Iterator[Row]:
    from pyarrow.parquet import ParquetFile

    with ParquetFile(file.path) as table:
        before, group = 0, 0
        while group < table.num_row_groups and before + table.metadata.row_group(group).num_rows <= part.start:
            before += table.metadata.row_group(group).num_rows
            group += 1
        batches = table.iter_batches(batch_size=TABLE_ROWS, row_groups=range(group, table.num_row_groups))
        yield from _table_rows(batches, before, part.start)


def _parquet_count(file: _File) -> int:
    from pyarrow.parquet import ParquetFile

    with ParquetFile(file.path) as table:
        return table.metadata.num_rows


def _arrow_batches(file: _File) -> Iterator[Any]:
    import pyarrow as pa

    with pa.memory_map(str(file.path)) as mapped:
        try:
            reader = pa.ipc.open_file(mapped)
            yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
        except pa.ArrowInvalid:
            mapped.seek(0)
            yield from pa.ipc.open_stream(mapped)


def _table_rows(batches: Iterable[Any], before: int, start: int) -> Iterator[Row]:
    """Rows from index ``start`` on; the first batch starts at row ``before``."""
    for batch in batches:
        for at in range(min(max(start - before, 0), batch.num_rows), batch.num_rows, TABLE_ROWS):
            yield from enumerate(_to_rows(batch.slice(at, TABLE_ROWS)), start=before + at + 1)
        before += batch.num_rows


def _to_rows(batch: Any) -> Iterator[dict[str, Any]]:
    """Rows as Python objects, without the null fields that Arrow pads structs with.

    A column or cell that Python has no type for, such as a date after the year 9999, becomes Unusable.
    """
    columns = []
    for column in batch.columns:
        try:
            columns.append(column.to_pylist())
        except (ValueError, OverflowError):
            columns.append([_to_python(cell) for cell in column])
    for cells in zip(*columns, strict=True):
        yield {name: _without_nulls(cell) for name, cell in zip(batch.schema.names, cells, strict=True)}


def _to_python(cell: Any) -> Any:
    try:
        return cell.as_py()
    except (ValueError, OverflowError) as error:
        return Unusable("bad_field", f"a value of type {cell.type} cannot be read: {error}")


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


@dataclass(frozen=True, slots=True)
class _Format:
    rows: Callable[[_File, Part], Iterator[Row]]
    """Rows from the part's first one to the end of the file."""
    count: Callable[[_File], int]
    random_access: bool = False
    """True if a part does not read the rows before it."""
    parts: Callable[[_File, int], Iterator[Part]] | None = None
    """Parts with the position of their first row."""


def _count_rows(rows: Callable[[_File, Part], Iterator[Row]]) -> Callable[[_File], int]:
    return lambda file: sum(1 for _ in rows(file, Part(file.name)))


_JSONL = _Format(_jsonl_rows, _count_rows(_jsonl_rows), parts=_jsonl_parts)
_FORMATS: Mapping[str, _Format] = {
    ".jsonl": _JSONL,
    ".ndjson": _JSONL,
    ".json": _Format(_json_rows, lambda file: len(_parse_json(file))),
    ".csv": _Format(_csv_rows, _count_rows(_csv_rows)),
    ".parquet": _Format(_parquet_rows, _parquet_count, random_access=True),
    ".arrow": _Format(
        lambda file, part: _table_rows(_arrow_batches(file), 0, part.start),
        lambda file: sum(batch.num_rows for batch in _arrow_batches(file)),
        random_access=True,
    ),
}


# ----------------------------------------------------------------------------------------------------------- datasets


@dataclass(frozen=True, slots=True)
class _Dataset:
    name: str
    location: str
    choice: str
    """Name of the split."""
    saved: bool
    """True for a folder of save_to_disk, False for a hub dataset."""

    def read(self, part: Part) -> Iterator[Row]:
        """Rows from the part's first one to the end of the dataset."""
        table = self.open().with_format("arrow")
        yield from _table_rows(
            (batch for start in range(part.start, len(table), TABLE_ROWS)
             for batch in table[start : start + TABLE_ROWS].to_batches()),
            part.start, part.start,
        )  # fmt: skip

    def split(self, rows_per_part: int) -> Iterator[Part]:
        """Parts of equal size."""
        rows = len(self.open())
        return (Part(self.name, start, min(rows_per_part, rows - start)) for start in range(0, rows, rows_per_part))

    def digest(self) -> str:
        """Hash of the fingerprint."""
        return xxhash.xxh3_128_hexdigest(f"dataset {self.open()._fingerprint}".encode())

    def open(self) -> Any:
        """The ``datasets.Dataset``."""
        import datasets

        if not self.saved:
            try:
                return datasets.load_dataset(self.location, split=self.choice)
            except Exception as error:  # the hub client, its HTTP library and the dataset's own reader have own errors
                raise Unreadable(
                    f"{self.name}: no such file or folder, and not loaded as a hub dataset: {error}; {SOURCES_ACCEPTED}"
                ) from error
        try:
            dataset = datasets.load_from_disk(self.location)
        except (OSError, ValueError) as error:
            raise Unreadable(f"{self.name}: the folder is not a saved dataset: {error}; {SOURCES_ACCEPTED}") from None
        if isinstance(dataset, datasets.DatasetDict):
            if self.choice not in dataset:
                splits = ", ".join(f"{self.location}:{split}" for split in dataset)
                raise Unreadable(f"{self.name}: the folder has no split {self.choice!r}; accepted are {splits}")
            return dataset[self.choice]
        return dataset
