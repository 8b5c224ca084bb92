"""File formats: the rows of a file, and its split into parts.

A row that cannot be parsed is returned as ``Unusable``; a file that cannot be read raises ``Unreadable``.
"""

import csv
import io
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import filterfalse, islice
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

TABLE_ROWS = 1024
"""Rows of a table converted to Python objects at a time."""
_COMPRESSED = {".gz": "gzip", ".zst": "zstd"}


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


def show(value: Any) -> str:
    """A value for a message: short, and on one line."""
    if isinstance(value, list | dict):
        noun = "a list" if isinstance(value, list) else "an object"
        return f"{noun} of {len(value)}"
    text = json.dumps(value, ensure_ascii=True, default=repr)
    return text if len(text) <= 48 else text[:45] + "..."


@dataclass(frozen=True, slots=True)
class File:
    """A local file; ``kind`` and ``compression`` follow from its name."""

    name: str
    path: Path
    kind: str
    compression: str | None

    @classmethod
    def of(cls, name: str) -> "File | None":
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
def _read_errors(file: File) -> Iterator[None]:
    """Raise Unreadable for errors of reading a file."""
    from pyarrow import ArrowException

    try:
        yield
    except (OSError, EOFError, ArrowException) as error:
        name = {".parquet": " as Parquet", ".arrow": " as Arrow"}.get(file.kind, "")
        problem = getattr(error, "strerror", None) or error
        raise Unreadable(f"{file.name}: cannot be read{name}: {problem}") from None


def _jsonl_rows(file: File, part: Part) -> Iterator[Row]:
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


def _jsonl_parts(file: File, rows_per_part: int) -> Iterator[Part]:
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


def parse_json(text: str) -> Any:
    """The value of a JSON text; ``Unusable`` if an object in it has a key more than once, or one that is not Unicode.

    Raises:
        ValueError, RecursionError: the text is not JSON, or is nested too deeply.
    """
    repeated: list[Unusable] = []

    def build(items: list[tuple[str, Any]]) -> Any:
        value = _object(items)
        if isinstance(value, Unusable):
            repeated.append(value)
        return value

    value = json.loads(text, object_pairs_hook=build)
    return repeated[0] if repeated else value


def _object(items: list[tuple[str, Any]]) -> Any:
    record = dict(items)
    if not all(map(str.isascii, record)) and (key := next(filterfalse(_is_unicode, record), None)) is not None:
        return Unusable("bad_field", f"a key {show(key)}: found half of a surrogate pair; accepted: Unicode text")
    if len(record) == len(items):
        return record
    ((key, count),) = Counter(key for key, _ in items).most_common(1)
    return Unusable("bad_field", f"{key}: found {count} times in one object; accepted: once")


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _checked(value: Any) -> Any:
    """The value, or the first Unusable in it."""
    return _first_unusable(value) or value


def _first_unusable(value: Any) -> Unusable | None:
    if isinstance(value, Unusable):
        return value
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return next(filter(None, map(_first_unusable, items)), None)


def _parse_line(line: bytes) -> Any:
    try:
        return parse_json(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Unusable("not_json", f"byte {error.start + 1} is not UTF-8")
    except (ValueError, RecursionError) as error:
        return Unusable("not_json", str(error).replace(": line 1 column", ": column"))


def _json_rows(file: File, part: Part) -> Iterator[Row]:
    yield from islice(enumerate(_parse_json(file), start=1), part.start, None)


def _parse_json(file: File) -> list[Any]:
    with file.open() as stream:
        content = stream.read()
    try:
        records = json.loads(content.decode("utf-8-sig"), object_pairs_hook=_object)
        if isinstance(records, list):
            return list(map(_checked, records))
    except UnicodeDecodeError:
        raise _not_utf8(file) from None
    except json.JSONDecodeError as error:
        hint = "; a file with one record per line must end in .jsonl" if error.msg == "Extra data" else ""
        raise Unreadable(
            f"{file.name}:{error.lineno}: not valid JSON: {error.msg} at column {error.colno}{hint}"
        ) from None
    except RecursionError:
        raise Unreadable(f"{file.name}: not valid JSON: nested too deeply") from None
    raise Unreadable(f"{file.name}: found {show(records)}; a .json file must contain a list of records")


def _not_utf8(file: File) -> Unreadable:
    """The error of a file that is not UTF-8, with the line and the place of its first such byte."""
    at = 0
    with file.open() as lines:
        for number, line in enumerate(lines, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                return Unreadable(f"{file.name}:{number}: byte {at + error.start + 1} of the file is not UTF-8 text")
            at += len(line)
    return Unreadable(f"{file.name}: the file is not UTF-8 text")


def _csv_rows(file: File, part: Part) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)  # the default of 128 KiB is shorter than some conversations
    with file.open() as stream:
        rows = csv.DictReader(io.TextIOWrapper(stream, "utf-8-sig", newline=""), strict=True)
        try:
            header = rows.fieldnames or []
            # pandas names its index "".
            rows.fieldnames = [
                name if name.strip() else f"column {i} without a name" for i, name in enumerate(header, 1)
            ]
            _validate_columns(file, rows.fieldnames)
            for number, row in enumerate(islice(rows, part.start, None), start=part.start + 1):
                if None in row:
                    yield number, Unusable("not_a_record", f"more cells than the header's {len(header)}")
                else:
                    yield number, {name: cell or None for name, cell in row.items()}
        except csv.Error as error:
            raise Unreadable(f"{file.name}:{rows.reader.line_num}: cannot be read as CSV: {error}") from None
        except UnicodeDecodeError:
            raise _not_utf8(file) from None


def _validate_columns(file: File, names: Sequence[str]) -> None:
    """Raise Unreadable if two columns have the same name: a record would hold one of them."""
    places: dict[str, int] = {}
    for i, name in enumerate(names, start=1):
        if (first := places.setdefault(name, i)) != i:
            raise Unreadable(
                f"{file.name}: columns {first} and {i} are both named {name!r}; accepted: columns of different names"
            )


def _parquet_rows(file: File, part: Part) -> Iterator[Row]:
    from pyarrow.parquet import ParquetFile

    with ParquetFile(file.path) as table:
        _validate_columns(file, table.schema_arrow.names)
        before, group = 0, 0
        while group < table.num_row_groups and before + table.metadata.row_group(group).num_rows <= part.start:
            before += table.metadata.row_group(group).num_rows
            group += 1
        batches = table.iter_batches(batch_size=TABLE_ROWS, row_groups=range(group, table.num_row_groups))
        yield from table_rows(batches, before, part.start)


def _parquet_count(file: File) -> int:
    from pyarrow.parquet import ParquetFile

    with ParquetFile(file.path) as table:
        _validate_columns(file, table.schema_arrow.names)
        return table.metadata.num_rows


def _arrow_batches(file: File) -> Iterator[Any]:
    import pyarrow as pa

    with pa.memory_map(str(file.path)) as mapped:
        try:
            reader = pa.ipc.open_file(mapped)
            _validate_columns(file, reader.schema.names)
            yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
        except pa.ArrowInvalid:
            mapped.seek(0)
            stream = pa.ipc.open_stream(mapped)
            _validate_columns(file, stream.schema.names)
            yield from stream


def table_rows(batches: Iterable[Any], before: int, start: int) -> Iterator[Row]:
    """Rows from index ``start`` on; the first batch starts at row ``before``."""
    for batch in batches:
        for at in range(min(max(start - before, 0), batch.num_rows), batch.num_rows, TABLE_ROWS):
            yield from enumerate(_to_rows(batch.slice(at, TABLE_ROWS)), start=before + at + 1)
        before += batch.num_rows


def _to_rows(batch: Any) -> Iterator[dict[str, Any]]:
    """Rows as Python objects with text as keys, without the null fields that Arrow pads structs with.

    A column or cell that Python has no type for, such as a date after the year 9999, becomes Unusable.
    """
    columns = map(_to_cells, batch.columns)
    for cells in zip(*columns, strict=True):
        yield {name: _without_nulls(cell) for name, cell in zip(batch.schema.names, cells, strict=True)}


def _to_cells(column: Any) -> list[Any]:
    if "map<" not in str(column.type):
        with suppress(ValueError, OverflowError, KeyError):  # KeyError: of an unknown time zone
            return column.to_pylist()  # with the keyword for maps, pyarrow takes several times as long
    return list(map(_to_python, column))


def _to_python(cell: Any) -> Any:
    try:
        return cell.as_py(maps_as_pydicts="strict")
    except (ValueError, OverflowError, KeyError, TypeError) as error:
        return Unusable("bad_field", f"a value of type {cell.type} cannot be read: {error}")


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


@dataclass(frozen=True, slots=True)
class _Format:
    rows: Callable[[File, Part], Iterator[Row]]
    """Rows from the part's first one to the end of the file."""
    count: Callable[[File], int]
    random_access: bool = False
    """True if a part does not read the rows before it."""
    parts: Callable[[File, int], Iterator[Part]] | None = None
    """Parts with the position of their first row."""


def _count_rows(rows: Callable[[File, Part], Iterator[Row]]) -> Callable[[File], int]:
    return lambda file: sum(1 for _ in rows(file, Part(file.name)))


_JSONL = _Format(_jsonl_rows, _count_rows(_jsonl_rows), parts=_jsonl_parts)
_FORMATS: Mapping[str, _Format] = {
    ".jsonl": _JSONL,
    ".ndjson": _JSONL,
    ".json": _Format(_json_rows, lambda file: len(_parse_json(file))),
    ".csv": _Format(_csv_rows, _count_rows(_csv_rows)),
    ".parquet": _Format(_parquet_rows, _parquet_count, random_access=True),
    ".arrow": _Format(
        lambda file, part: table_rows(_arrow_batches(file), 0, part.start),
        lambda file: sum(batch.num_rows for batch in _arrow_batches(file)),
        random_access=True,
    ),
}
