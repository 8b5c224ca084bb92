"""Sources of records: files and datasets, split into parts that any process can read independently.

Independent of the content of records.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from glob import glob
from itertools import islice
from pathlib import Path
from typing import Any

import xxhash

from dpo_ray.config.paths import SOURCES_ACCEPTED, is_pattern
from dpo_ray.data.formats import TABLE_ROWS, File, Part, Row, Unreadable, table_rows
from dpo_ray.storage import file_version

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_NOT_DATA = (".md", ".txt", ".yaml", ".yml", ".py", ".lock", ".crc", "")
"""Suffixes of files that folders of data may contain."""
_NOT_RECORDS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json")
_SPLIT = re.compile(r"(?:train|test|validation|valid|dev|eval)(?![a-z])")
"""Start of the name of a split, such as train or train_prefs."""


def expand_source(source: str) -> list[str]:
    """The files and datasets of a source, sorted: those of a folder or pattern, otherwise the source itself.

    ``FOLDER:split`` are the files of a folder that belong to the split by their names or by those of their folders.

    Raises:
        Unreadable: a source is missing or of an unknown format. None is opened.
    """
    folder, _, split = source.partition(":") if not Path(source).exists() else (source, "", "")
    if is_pattern(source) and not Path(source).exists():
        files = _files_of_pattern(source)
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
    return file_version(located.path) if isinstance(located, File) else None


# ------------------------------------------------------------------------------------------------------------- places


def _locate(source: str) -> "File | _Dataset":
    path = Path(source)
    if path.is_dir():
        return _Dataset(source, source, "train", saved=True)
    if path.is_file():
        file = File.of(source)
        if file is None:
            raise Unreadable(f"{source}: a file ending in {path.suffix!r} is not supported; {SOURCES_ACCEPTED}")
        return file
    location, _, split = source.partition(":")
    if Path(location).is_dir():
        return _Dataset(source, location, split, saved=True)
    if _HUB_NAME.fullmatch(location) and File.of(location) is None:
        return _Dataset(source, location, split or "train", saved=False)
    raise Unreadable(f"{source}: no such file or folder; {SOURCES_ACCEPTED}")


def _is_saved_dataset(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _files_of_pattern(pattern: str) -> list[str]:
    """The files and saved datasets that match a pattern; those of folders if only folders match."""
    names = sorted(glob(pattern, recursive=True))
    datasets = {Path(name) for name in names if _is_saved_dataset(Path(name))}
    files = [
        name
        for name in names
        if Path(name) in datasets or (Path(name).is_file() and not datasets & {*Path(name).parents})
    ]
    entered = {folder for file in files for folder in Path(file).parents}
    folders = [
        name for name in names if Path(name).is_dir() and Path(name) not in entered | datasets and _has_data(Path(name))
    ]
    if files and folders:
        raise Unreadable(
            f"{pattern}: matches files and the folder {folders[0]}, which holds data too; accepted are a pattern of "
            "files, such as *.jsonl, and the folder as a source of its own"
        )
    if not files and not folders:
        raise Unreadable(f"{pattern}: no file matches the pattern; {SOURCES_ACCEPTED}")
    return files or [file for folder in folders for file in expand_source(folder)]


def _has_data(folder: Path) -> bool:
    return any(_is_visible(path) and _is_data(folder / path) for path in _paths_in(folder))


def _paths_in(folder: Path) -> list[Path]:
    """The files and saved datasets in a folder and its subfolders, sorted and relative to it."""
    paths = sorted(folder.rglob("*"))
    datasets = {path for path in paths if (path / "state.json").is_file()}
    return [
        path.relative_to(folder)
        for path in paths
        if path in datasets or (path.is_file() and not datasets & {*path.parents})
    ]


def _is_visible(path: Path) -> bool:
    return not any(part[0] in "._" for part in path.parts)


def _is_data(path: Path) -> bool:
    return path.is_dir() or (File.of(str(path)) is not None and path.name not in _NOT_RECORDS)


def _files_of_folder(source: str, folder: Path, split: str) -> list[str]:
    """The data files and saved datasets of a folder and its subfolders, sorted; those of one split, if given."""
    visible = list(filter(_is_visible, _paths_in(folder)))
    files = [path for path in visible if _is_data(folder / path)]
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
        yield from table_rows(
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
