"""Tokenized pairs on disk: built once for the same data, tokenizer and limits, and memory-mapped by every reader.

A store is a folder named by a digest of everything that determines its content. The data is split into parts, which
separate processes may tokenize into separate files. The finished folder is moved into place atomically; if two
processes build the same store, the first to finish wins.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import partial
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dpo_ray.data.examples import tokenize_pairs
from dpo_ray.data.formats import Part, Unreadable
from dpo_ray.data.records import Problem
from dpo_ray.data.report import DataReport, DataReportBuilder
from dpo_ray.data.sources import expand_source, source_digest, source_version, split_sources
from dpo_ray.data.tokenize import RecordTokenizer
from dpo_ray.data.tokenizer import tokenizer_digest
from dpo_ray.storage import atomic_folder, cached_text
from dpo_ray.types import TokenPair

FORMAT_VERSION = 8
"""Part of every digest: increment it when the file format, record layouts or tokenization change."""

PART_RECORDS = 4096
"""Records per part: seconds of work, longer than the start of a process."""

_TOKENIZATION_KEYS = ("max_prompt_tokens", "max_completion_tokens", "strings", "pairs_per_prompt")
_LENGTHS, _ENDS, _ORIGINS, _COMPLETIONS = "lengths.i32", "ends.i64", "origins.i64", "completions.i32"
_UNPAIRED, _GAPS, _META = "unpaired.i1", "gaps.f64", "meta.json"

Prepare = Callable[[tuple[int, Part]], DataReportBuilder]
"""Tokenizes a numbered part into files and counts its records."""
RunParts = Callable[[Prepare, Sequence[tuple[int, Part]]], Iterable[DataReportBuilder]]
"""Applies the function to each part, in any process, and returns the results in order, like ``map``."""


class PairStore:
    """Memory-mapped tokenized preference pairs."""

    def __init__(self, folder: Path, sources: Sequence[str], groups: Sequence[Sequence[str]]) -> None:
        """Open a finished store.

        Args:
            folder: written by ``prepare_pairs``.
            sources: current names of its sources, in the same order.
            groups: current names of the files of each source.

        Raises:
            ValueError: the store is damaged.
        """
        try:
            meta = json.loads((folder / _META).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{folder / _META}: {error}; delete the folder to rebuild it") from None
        self.digest: str = meta["digest"]
        self.sources = tuple(sources)
        self.files = tuple(file for group in groups for file in group)
        self.report = DataReport(**meta["report"]).renamed(dict(zip(meta["files"], self.files, strict=True)))
        """Counts of the records when the store was built."""
        file_sizes = iter(meta["sizes"])
        self.sizes: tuple[int, ...] = tuple(sum(islice(file_sizes, len(group))) for group in groups)
        """Number of pairs of each source; pairs are numbered source by source."""
        pairs = sum(self.sizes)
        self.lengths = _open_array(folder / _LENGTHS, "<i4", (pairs, 3))
        """(pairs, 3) int32: tokens of prompt, chosen and rejected."""
        self._ends = _open_array(folder / _ENDS, "<i8", (pairs,))
        self._origins = _open_array(folder / _ORIGINS, "<i8", (pairs, 2))
        self._unpaired = _open_array(folder / _UNPAIRED, "<i1", (pairs,))
        self.gaps = _open_array(folder / _GAPS, "<f8", (pairs,))
        """(pairs,) float64: see ``PairSource.gaps``."""
        self.members = self._members(folder) if meta["prompts"] < pairs else None
        parts = meta["parts"]
        self._tokens = [_open_array(folder / _tokens(n), "<i4", (part["tokens"],)) for n, part in enumerate(parts)]
        self._last = np.cumsum([part["pairs"] for part in parts])

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> TokenPair:
        if not -len(self) <= index < len(self):
            raise IndexError(f"pair {index} of a store of {len(self)}")
        prompt, chosen, _ = self.lengths[index].tolist()
        ids = self.tokens(index).tolist()
        end = prompt + chosen
        return TokenPair(tuple(ids[:prompt]), tuple(ids[prompt:end]), tuple(ids[end:]), int(self._unpaired[index]))

    def _members(self, folder: Path) -> np.ndarray:
        """See ``PairSource.members``: the pairs of a record follow each other."""
        completions = _open_array(folder / _COMPLETIONS, "<i4", (len(self), 2))
        prompts = _new_prompts(self._origins).cumsum(dtype=np.int32)
        return np.column_stack((prompts, completions))

    def tokens(self, index: int) -> np.ndarray:
        """Concatenated token ids of prompt, chosen and rejected; int32, not copied."""
        part = int(np.searchsorted(self._last, index % len(self), side="right"))
        end = int(self._ends[index])
        return self._tokens[part][end - int(self.lengths[index].sum()) : end]

    def name_of(self, index: int) -> str:
        """File and record number of a pair, as in the data report."""
        file, number = self.record_of(index)
        return f"{file}:{number}"

    def record_of(self, index: int) -> tuple[str, int]:
        """The file and the record number a pair was read from."""
        file, number = self._origins[index].tolist()
        return self.files[file], number


def prepare_pairs(
    sources: Sequence[str],
    tokenizer: RecordTokenizer,
    *,
    folder: Path,
    kind: Literal["train", "eval"] = "train",
    run_parts: RunParts = map,
    on_progress: Callable[[int, int], None] | None = None,
) -> PairStore:
    """The tokenized pairs of ``sources``, from an existing store or a new one.

    Args:
        sources: files, folders, patterns, saved datasets or hub datasets.
        tokenizer: of the policy, with the data section.
        folder: parent of stores; may be shared by runs and machines.
        kind: ``data.limit`` applies to train only.
        run_parts: tokenizes parts of ``PART_RECORDS``; by default sequentially in this process.
        on_progress: called with the numbers of finished and of all records after each part.

    Raises:
        ValueError: a source is missing or unreadable, no pair is usable, or ``data.strict`` and a record was dropped.
    """
    name, data = f"data.{kind}", tokenizer.data
    limit = data.limit if kind == "train" else None
    try:
        groups = [expand_source(source) for source in sources]
        files = [file for group in groups for file in group]
        recipe = {
            "format": FORMAT_VERSION,
            "sources": [[_cached_digest(file, folder / "sources") for file in group] for group in groups],
            "tokenizer": tokenizer_digest(tokenizer.tokenizer),
            "limit": limit,
            **{key: getattr(data, key) for key in _TOKENIZATION_KEYS},
            "model": asdict(tokenizer.limits),
            "examples": tokenizer.examples,
        }
        digest = sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()
        store_folder = folder / digest[:32]
        if not store_folder.exists():
            with atomic_folder(store_folder, replace=False) as building:
                parts = split_sources(files, rows_per_part=PART_RECORDS, limit=limit)
                prepare = partial(_prepare_part, folder=building, files=files, tokenizer=tokenizer)
                counts, total = DataReportBuilder(), sum(part.rows or 0 for part in parts)
                for part_counts in run_parts(prepare, list(enumerate(parts))):
                    counts.add(part_counts)
                    if on_progress:
                        on_progress(counts.read, total)
                report = _join(building, digest, files, counts, len(parts))
                report.check(strict=False, name=name, sources=sources)
    except Unreadable as error:
        raise Unreadable(f"{name}: {error}") from None
    store = PairStore(store_folder, sources, groups)
    store.report.check(strict=data.strict, name=name)
    return store


def _cached_digest(source: str, folder: Path) -> str:
    """The digest of a source; cached for a file until it changes."""
    version = source_version(source)
    return source_digest(source) if version is None else cached_text(version, folder, lambda: source_digest(source))


def _prepare_part(
    numbered: tuple[int, Part],
    *,
    folder: Path,
    files: Sequence[str],
    tokenizer: RecordTokenizer,
) -> DataReportBuilder:
    """Tokenize the records of a part into files named by its number, in constant memory."""
    number, part = numbered
    counts, tokens, file = DataReportBuilder(), 0, files.index(part.source)
    with (
        (folder / _tokens(number)).open("wb") as token_file,
        (folder / f"{number}.{_LENGTHS}").open("wb") as lengths,
        (folder / f"{number}.{_ENDS}").open("wb") as ends,
        (folder / f"{number}.{_ORIGINS}").open("wb") as origins,
        (folder / f"{number}.{_COMPLETIONS}").open("wb") as completions,
        (folder / f"{number}.{_UNPAIRED}").open("wb") as unpaired,
        (folder / f"{number}.{_GAPS}").open("wb") as gaps,
    ):
        for item in tokenize_pairs([part], tokenizer):
            if isinstance(item, Problem):
                counts.drop(item)
                continue
            record, result = item
            counts.keep(record.source, record.number, result.notes, record.unread)
            pair = result.pair
            ids = np.array(pair.prompt + pair.chosen + pair.rejected, "<i4")
            tokens += len(ids)
            ids.tofile(token_file)
            np.array((len(pair.prompt), len(pair.chosen), len(pair.rejected)), "<i4").tofile(lengths)
            np.array((tokens,), "<i8").tofile(ends)
            np.array((file, record.number), "<i8").tofile(origins)
            np.array(record.completions, "<i4").tofile(completions)
            np.array(record.unpaired, "<i1").tofile(unpaired)
            np.array(np.nan if record.gap is None else record.gap, "<f8").tofile(gaps)
    return counts


def _join(building: Path, digest: str, files: Sequence[str], counts: DataReportBuilder, parts: int) -> DataReport:
    """Concatenate the files of all parts, except the token files."""
    sizes = [_part_size(building, number) for number in range(parts)]
    for name in (_LENGTHS, _ENDS, _ORIGINS, _COMPLETIONS, _UNPAIRED, _GAPS):
        with (building / name).open("wb") as whole:
            for number in range(parts):
                part = building / f"{number}.{name}"
                with part.open("rb") as file:
                    shutil.copyfileobj(file, whole)
                part.unlink()
    lengths = np.fromfile(building / _LENGTHS, "<i4").reshape(-1, 3)
    origins = np.fromfile(building / _ORIGINS, "<i8").reshape(-1, 2)
    unpaired = np.fromfile(building / _UNPAIRED, "<i1")
    of_records = lengths.copy()  # without completions of other records
    of_records[unpaired > 0, 2] = of_records[unpaired < 0, 1] = 0
    report = counts.build(of_records)
    meta = {
        "digest": digest,
        "files": list(files),
        "prompts": int(_new_prompts(origins).sum()),
        "sizes": np.bincount(origins[:, 0], minlength=len(files)).tolist(),
        "parts": sizes,
        "report": asdict(report),
    }
    (building / _META).write_text(json.dumps(meta, indent=1), encoding="utf-8")
    return report


def _new_prompts(origins: np.ndarray) -> np.ndarray:
    """(n,) True for the first pair of each record; ``origins`` is (n, 2) file and record number of each pair."""
    changed: np.ndarray = np.diff(origins, axis=0, prepend=-1) != 0
    return changed[:, 0] | changed[:, 1]


def _part_size(building: Path, number: int) -> dict[str, int]:
    lengths, tokens = building / f"{number}.{_LENGTHS}", building / _tokens(number)
    if not lengths.exists() or not tokens.exists():
        raise ValueError(
            f"reference.cache_dir: {tokens} was written on another node and is not visible here; "
            "give a folder that all nodes mount"
        )
    return {"pairs": lengths.stat().st_size // 12, "tokens": tokens.stat().st_size // 4}


def _tokens(part: int) -> str:
    return f"{part:06d}.tokens.i32"


def _open_array(path: Path, dtype: str, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    expected = int(np.prod(shape)) * np.dtype(dtype).itemsize
    size = path.stat().st_size if path.exists() else 0
    if size != expected:
        raise ValueError(f"{path}: has {size} bytes, expected {expected}; delete the folder to rebuild it")
    if not expected:  # an empty file cannot be mapped
        return np.empty(shape, dtype)
    return np.memmap(path, dtype, mode="r", shape=shape)
