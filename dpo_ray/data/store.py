"""Tokenised pairs on disk: built once for the same data, tokenizer and limits, and memory-mapped by every reader.

A store is a folder named by a digest of all that decides its content. It is written beside its place and moved there
whole, so a reader sees a complete store or none, and of two builders the later one takes what the earlier one made.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self
from uuid import uuid4

import numpy as np

from dpo_ray.config.schema import DataConfig
from dpo_ray.data.records import PairRecord, Problem, Unreadable, read_pairs, source_digest
from dpo_ray.data.report import DataReport, DataReportBuilder
from dpo_ray.data.tokenize import TokenizedPair, tokenize_pair, tokenizer_digest
from dpo_ray.types import TokenPair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT_VERSION = 1
"""Part of every digest: raise it when the files, the layouts read or the tokenisation change."""

PROGRESS_EVERY = 1000
"""Records between two calls of ``on_progress``."""

_TOKENS, _LENGTHS, _ENDS, _ORIGINS, _META = "tokens.i32", "lengths.i32", "ends.i64", "origins.i64", "meta.json"


class PairStore:
    """Tokenised preference pairs, memory-mapped: opening one reads none of its tokens."""

    def __init__(self, folder: Path, sources: Sequence[str]) -> None:
        """Open a finished store.

        Args:
            folder: one that ``prepare_pairs`` made.
            sources: what it was made from, by the names to report; the same number in the same order.

        Raises:
            ValueError: the store is damaged.
        """
        try:
            meta = json.loads((folder / _META).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{folder / _META}: {error}; delete the folder and it is built again") from None
        self.digest: str = meta["digest"]
        self.sources = tuple(sources)
        self.report = DataReport.from_dict(meta["report"]).renamed(dict(zip(meta["sources"], sources, strict=True)))
        """What became of the records, as counted when the store was built."""
        pairs, tokens = meta["pairs"], meta["tokens"]
        self.lengths = _open_array(folder / _LENGTHS, "<i4", (pairs, 3))
        """(pairs, 3) int32: tokens of prompt, chosen and rejected."""
        self._tokens = _open_array(folder / _TOKENS, "<i4", (tokens,))
        self._ends = _open_array(folder / _ENDS, "<i8", (pairs,))
        self._origins = _open_array(folder / _ORIGINS, "<i8", (pairs, 2))

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> TokenPair:
        if not -len(self) <= index < len(self):
            raise IndexError(f"pair {index} of a store of {len(self)}")
        prompt, chosen, _ = self.lengths[index].tolist()
        ids = self.tokens(index).tolist()
        return TokenPair(tuple(ids[:prompt]), tuple(ids[prompt : prompt + chosen]), tuple(ids[prompt + chosen :]))

    def tokens(self, index: int) -> np.ndarray:
        """Token ids of prompt, chosen and rejected, one behind the other; int32, not copied."""
        end = int(self._ends[index])
        return self._tokens[end - int(self.lengths[index].sum()) : end]

    def __iter__(self) -> Iterator[TokenPair]:
        return (self[index] for index in range(len(self)))

    def name_of(self, index: int) -> str:
        """Source and record number of a pair, as the data report names them."""
        source, number = self.record_of(index)
        return f"{source}:{number}"

    def record_of(self, index: int) -> tuple[str, int]:
        """The source and the record number a pair was read from."""
        source, number = self._origins[index].tolist()
        return self.sources[source], number


def prepare_pairs(
    sources: Sequence[str],
    tokenizer: "PreTrainedTokenizerBase",
    data_config: DataConfig,
    *,
    folder: Path,
    kind: Literal["train", "eval"] = "train",
    on_progress: Callable[[int], None] | None = None,
) -> PairStore:
    """The tokenised pairs of ``sources``: opened where they were prepared before, else read and tokenised.

    Args:
        sources: files, saved datasets or hub datasets.
        tokenizer: of the policy.
        data_config: the limits, and whether a dropped record is an error.
        folder: holds stores; may be shared by runs and by machines.
        kind: ``data.limit`` applies to train only.
        on_progress: called with the number of records read, every 1,000 and at the end of a build.

    Raises:
        ValueError: a source is missing or unreadable, no pair is left, or ``data.strict`` and a record was dropped.
    """
    name = f"data.{kind}"
    limit = data_config.limit if kind == "train" else None
    try:
        digests = [source_digest(source) for source in sources]
    except Unreadable as error:
        raise Unreadable(f"{name}: {error}") from None
    recipe = {
        "format": FORMAT_VERSION,
        "sources": digests,
        "tokenizer": tokenizer_digest(tokenizer),
        "limit": limit,
        "max_prompt_tokens": data_config.max_prompt_tokens,
        "max_completion_tokens": data_config.max_completion_tokens,
    }
    digest = sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()
    place = folder / digest[:32]
    if not place.exists():
        folder.mkdir(parents=True, exist_ok=True)
        building = folder / f".building-{uuid4().hex}"
        try:
            tokenise = partial(
                tokenize_pair,
                tokenizer=tokenizer,
                max_prompt_tokens=data_config.max_prompt_tokens,
                max_completion_tokens=data_config.max_completion_tokens,
            )
            report = _build(building, digest, sources, read_pairs(sources, limit=limit), tokenise, on_progress)
            report.check(strict=False, name=name, sources=sources)
            _move_into_place(building, place)
        except Unreadable as error:
            raise Unreadable(f"{name}: {error}") from None
        finally:
            shutil.rmtree(building, ignore_errors=True)
    store = PairStore(place, sources)
    store.report.check(strict=data_config.strict, name=name)
    return store


def _build(
    building: Path,
    digest: str,
    sources: Sequence[str],
    records: Iterable[PairRecord | Problem],
    tokenise: Callable[[PairRecord], TokenizedPair | Problem],
    on_progress: Callable[[int], None] | None,
) -> DataReport:
    counts = DataReportBuilder()
    building.mkdir()
    with _Writer(building, sources) as writer:
        for record in records:
            result = record if isinstance(record, Problem) else tokenise(record)
            if isinstance(result, Problem):
                counts.drop(result)
            else:
                counts.keep(record.source, record.number, result.notes)
                writer.write(result.pair, record.source, record.number)
            if on_progress and counts.read % PROGRESS_EVERY == 0:
                on_progress(counts.read)
    if on_progress:
        on_progress(counts.read)
    report = counts.build(np.fromfile(building / _LENGTHS, "<i4").reshape(-1, 3))
    meta = {
        "digest": digest,
        "sources": list(sources),
        "pairs": writer.pairs,
        "tokens": writer.tokens,
        "report": report.to_dict(),
    }
    (building / _META).write_text(json.dumps(meta, indent=1), encoding="utf-8")
    return report


def _move_into_place(building: Path, place: Path) -> None:
    try:
        os.rename(building, place)
    except OSError:
        if not place.exists():
            raise
        # Another builder of the same content was faster.


class _Writer:
    """Appends pairs to the files of a store; memory does not grow with them."""

    def __init__(self, folder: Path, sources: Sequence[str]) -> None:
        self.pairs = 0
        self.tokens = 0
        self._source_index = {source: index for index, source in enumerate(sources)}
        self._files = {name: (folder / name).open("wb") for name in (_TOKENS, _LENGTHS, _ENDS, _ORIGINS)}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for file in self._files.values():
            file.close()

    def write(self, pair: TokenPair, source: str, number: int) -> None:
        self.pairs += 1
        self.tokens += pair.tokens
        self._append(_TOKENS, "<i4", pair.prompt + pair.chosen + pair.rejected)
        self._append(_LENGTHS, "<i4", (len(pair.prompt), len(pair.chosen), len(pair.rejected)))
        self._append(_ENDS, "<i8", (self.tokens,))
        self._append(_ORIGINS, "<i8", (self._source_index[source], number))

    def _append(self, name: str, dtype: str, values: Sequence[int]) -> None:
        self._files[name].write(np.array(values, dtype).tobytes())


def _open_array(path: Path, dtype: str, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    expected = int(np.prod(shape)) * np.dtype(dtype).itemsize
    found = path.stat().st_size if path.exists() else 0
    if found != expected:
        raise ValueError(f"{path}: holds {found} bytes, expected {expected}; delete the folder and it is built again")
    return np.memmap(path, dtype, mode="r", shape=shape)
