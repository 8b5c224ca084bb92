"""Reading preference pairs and prompts: file formats and record layouts.

A record that cannot be used becomes a ``Problem`` that says why and where, and reading goes on; only a source that
cannot be read at all is an error. Knows nothing of tokens.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice
from os.path import commonprefix
from pathlib import Path
from typing import Any, NoReturn

from dpo_ray.types import Message, Messages

SOURCES_ACCEPTED = (
    "accepted are .json (a list of records), .jsonl, .parquet and .arrow files, folders written by "
    "datasets.save_to_disk, and hub datasets as org/name or org/name:split"
)
LAYOUTS_ACCEPTED = (
    "accepted are prompt/chosen/rejected, chosen/rejected as whole conversations, "
    "messages/completions with scores, and conversations/chosen/rejected"
)
ROLES = {
    **{role: role for role in ("system", "developer", "user", "assistant", "tool")},
    "human": "user",
    "gpt": "assistant",
}
"""Speakers accepted in ``role`` and ``from``, and the role each one is."""

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_HH_ASSISTANT = "\n\nAssistant:"


@dataclass(frozen=True, slots=True)
class PairRecord:
    """A preference pair as text: all three parts are strings, or all three are messages."""

    prompt: Messages | str
    chosen: Messages | str
    rejected: Messages | str
    source: str
    number: int
    """Line of a JSONL file, else position in the source; from 1."""


@dataclass(frozen=True, slots=True)
class PromptRecord:
    """A prompt to write completions for."""

    messages: Messages
    source: str
    number: int


@dataclass(frozen=True, slots=True)
class Problem:
    """A record that cannot be used, and why."""

    reason: str
    """A snake_case word that is counted: not_json, not_a_record, missing_field, empty_field, bad_field, ..."""
    source: str
    number: int
    detail: str
    """The field and what was found in it."""


def read_pairs(sources: Sequence[str], *, limit: int | None = None) -> Iterator[PairRecord | Problem]:
    """The preference pairs of ``sources``, in order.

    Args:
        sources: files, saved datasets or hub datasets.
        limit: most records read, over all sources; unusable ones count.

    Returns:
        An iterator with one item for each record.

    Raises:
        ValueError: a source is missing (told before anything is read), or cannot be read as a whole.
    """
    located = [_locate(source) for source in sources]
    return islice(_read(located, _pair_record), limit)


def read_prompts(sources: Sequence[str]) -> Iterator[PromptRecord | Problem]:
    """The prompts of ``sources``, in order: of a pair its prompt, of a conversation what leads to its last answer.

    Raises:
        Unreadable: a source is missing or cannot be read as a whole.
    """
    return _read([_locate(source) for source in sources], _prompt_record)


def source_digest(source: str) -> str:
    """The content of ``source`` as a hash: of a file its format and bytes, not its name; of a dataset its fingerprint.

    Raises:
        Unreadable: the source is missing or cannot be read.
    """
    located = _locate(source)
    if isinstance(located, _DatasetSource):
        return sha256(f"dataset {_open_dataset(located)._fingerprint}".encode()).hexdigest()
    digest = sha256(located.path.suffix.encode())
    with located.path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------------------ sources


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
    """A folder of save_to_disk; otherwise a hub dataset."""


class Unreadable(ValueError):
    """A source that is missing or cannot be read as a whole."""


class _Unusable(Exception):
    """Why a record cannot be used."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


_Source = _FileSource | _DatasetSource
_Row = tuple[int, Any | _Unusable]
"""Record number, and the record as parsed or why it could not be."""


def _locate(source: str) -> _Source:
    path = Path(source)
    if path.is_dir():
        return _DatasetSource(source, source, "train", saved=True)
    if path.is_file():
        if path.suffix not in _READERS:
            raise Unreadable(f"{source}: a file ending in {path.suffix!r} is not read; {SOURCES_ACCEPTED}")
        return _FileSource(source, path)
    location, _, split = source.partition(":")
    if Path(location).is_dir():
        return _DatasetSource(source, location, split, saved=True)
    if _HUB_NAME.fullmatch(location) and Path(location).suffix not in _READERS:
        return _DatasetSource(source, location, split or "train", saved=False)
    raise Unreadable(f"{source}: no such file or folder; {SOURCES_ACCEPTED}")


def _read(sources: Sequence[_Source], build: Callable[[Mapping[str, Any], str, int], Any]) -> Iterator[Any]:
    for source in sources:
        rows = _READERS[source.path.suffix](source.path) if isinstance(source, _FileSource) else _dataset_rows(source)
        for number, row in rows:
            yield _build(row, build, source.name, number)


def _build(row: Any, build: Callable[[Mapping[str, Any], str, int], Any], source: str, number: int) -> Any:
    try:
        if isinstance(row, _Unusable):
            raise row
        if not isinstance(row, dict):
            raise _Unusable("not_a_record", f"found {_show(row)}; accepted is an object of fields")
        return build(row, source, number)
    except _Unusable as problem:
        return Problem(problem.reason, source, number, problem.detail)


def _jsonl_rows(path: Path) -> Iterator[_Row]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield number, _parse_line(line)


def _parse_line(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return _Unusable("not_json", f"byte {error.start + 1} is not UTF-8")
    except (ValueError, RecursionError) as error:
        return _Unusable("not_json", str(error).replace(": line 1 column", ": column"))


def _json_rows(path: Path) -> Iterator[_Row]:
    content = path.read_bytes()
    try:
        records = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise Unreadable(f"{path}:{line}: byte {error.start + 1} of the file is not UTF-8 text") from None
    except json.JSONDecodeError as error:
        hint = "; a file with one record a line must end in .jsonl" if error.msg == "Extra data" else ""
        raise Unreadable(f"{path}:{error.lineno}: not valid JSON: {error.msg} at column {error.colno}{hint}") from None
    if not isinstance(records, list):
        raise Unreadable(f"{path}: holds {_show(records)}; a .json file holds a list of records")
    yield from enumerate(records, start=1)


def _parquet_rows(path: Path) -> Iterator[_Row]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            yield from _table_rows(file.iter_batches(batch_size=1024))
    except (ArrowException, OSError) as error:
        raise Unreadable(f"{path}: cannot be read as Parquet: {error}") from None


def _arrow_rows(path: Path) -> Iterator[_Row]:
    import pyarrow as pa

    try:
        with pa.memory_map(str(path)) as file:
            try:
                reader = pa.ipc.open_file(file)
                batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
            except pa.ArrowInvalid:
                file.seek(0)
                batches = iter(pa.ipc.open_stream(file))
            yield from _table_rows(batches)
    except (pa.ArrowException, OSError) as error:
        raise Unreadable(f"{path}: cannot be read as Arrow: {error}") from None


def _table_rows(batches: Iterator[Any]) -> Iterator[_Row]:
    number = 0
    for batch in batches:
        for row in batch.to_pylist():
            number += 1
            yield number, row


def _dataset_rows(source: _DatasetSource) -> Iterator[_Row]:
    yield from enumerate(_open_dataset(source), start=1)


def _open_dataset(source: _DatasetSource) -> Any:
    import datasets

    if not source.saved:
        try:
            return datasets.load_dataset(source.location, split=source.split)
        except Exception as error:  # the hub client, its HTTP library and the dataset's own reader each raise their own
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


_READERS: Mapping[str, Callable[[Path], Iterator[_Row]]] = {
    ".json": _json_rows,
    ".jsonl": _jsonl_rows,
    ".parquet": _parquet_rows,
    ".arrow": _arrow_rows,
}


# ------------------------------------------------------------------------------------------------------------ layouts


def _pair_record(record: Mapping[str, Any], source: str, number: int) -> PairRecord:
    prompt, chosen, rejected = _ranked(record) if _has(record, "completions") else _labelled(record)
    for name, completion in (("chosen", chosen), ("rejected", rejected)):
        if isinstance(completion, tuple):
            for turn in completion:
                if turn["role"] != "assistant":
                    _bad(name, f"a turn by {turn['role']!r} behind the prompt", "turns by 'assistant'")
    if chosen == rejected:
        raise _Unusable("identical", f"chosen and rejected are both {_show(_last_text(chosen))}")
    return PairRecord(prompt, chosen, rejected, source, number)


def _prompt_record(record: Mapping[str, Any], source: str, number: int) -> PromptRecord:
    if _has(record, "prompt"):
        prompt = _conversation(record, "prompt")
    elif _has(record, "messages"):
        prompt = _conversation(record, "messages")
    elif _has(record, "conversations"):
        prompt = _with_system(record, _conversation(record, "conversations"))
    elif isinstance(record.get("chosen"), list) and isinstance(record.get("rejected"), list):
        chosen, rejected = _conversation(record, "chosen"), _conversation(record, "rejected")
        prompt, _, _ = _split_whole(_as_turns("chosen", chosen), _as_turns("rejected", rejected))
    else:
        _missing(record, "prompt", "accepted are prompt, messages and conversations")
    if isinstance(prompt, str):
        prompt = (_turn_of("user", prompt),)
    while prompt and prompt[-1]["role"] == "assistant":
        prompt = prompt[:-1]
    if not prompt:
        _bad("prompt", "only turns by 'assistant'", "a conversation that awaits an answer")
    return PromptRecord(prompt, source, number)


_Pair = tuple[Messages | str, Messages | str, Messages | str]


def _labelled(record: Mapping[str, Any]) -> _Pair:
    """The layouts that name the chosen and the rejected completion."""
    chosen, rejected = _conversation(record, "chosen"), _conversation(record, "rejected")
    if _has(record, "conversations"):
        prompt: Messages | str = _with_system(record, _conversation(record, "conversations"))
    elif _has(record, "prompt"):
        prompt = _conversation(record, "prompt")
    elif isinstance(chosen, str) and isinstance(rejected, str):
        return _split_hh(record, chosen, rejected)
    else:
        chosen, rejected = _as_turns("chosen", chosen), _as_turns("rejected", rejected)
        if chosen[0]["role"] == rejected[0]["role"] == "assistant":
            _missing(record, "prompt", LAYOUTS_ACCEPTED)
        return _split_whole(chosen, rejected)
    if isinstance(prompt, str) and isinstance(chosen, str) and isinstance(rejected, str):
        return prompt, chosen, rejected
    if isinstance(prompt, str) and isinstance(chosen, str) != isinstance(rejected, str):
        _bad("chosen and rejected", "text and messages", "two texts or two lists of messages")
    if isinstance(prompt, str) or (isinstance(chosen, tuple) and chosen[0]["role"] != "assistant"):
        return _split_after(prompt, _as_turns("chosen", chosen), _as_turns("rejected", rejected))
    return prompt, _as_answer(chosen), _as_answer(rejected)


def _split_after(prompt: Messages | str, chosen: Messages, rejected: Messages) -> _Pair:
    """A prompt that chosen and rejected may repeat in front of their answers."""
    turns = (_turn_of("user", prompt),) if isinstance(prompt, str) else prompt
    if chosen[0]["role"] == "assistant" and rejected[0]["role"] == "assistant":
        return turns, chosen, rejected
    shared, chosen, rejected = _split_whole(chosen, rejected)
    if turns[-1]["content"].strip() not in [turn["content"].strip() for turn in shared]:
        _bad("chosen and rejected", "whole conversations without the prompt", "answers, or the prompt and an answer")
    return shared, chosen, rejected


def _split_whole(chosen: Messages, rejected: Messages) -> tuple[Messages, Messages, Messages]:
    """Two whole conversations: the prompt is what they share, and at least the last turn of each is its answer."""
    shared = 0
    for one, other in zip(chosen[:-1], rejected[:-1], strict=False):
        if one != other:
            break
        shared += 1
    if not shared:
        _bad("chosen and rejected", "conversations without a shared start", "a prompt field, or a shared start")
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _split_hh(record: Mapping[str, Any], chosen: str, rejected: str) -> _Pair:
    """Two transcripts as text, Human and Assistant by turns: the prompt ends with the last shared Assistant tag."""
    before, tag, _ = commonprefix([chosen, rejected]).rpartition(_HH_ASSISTANT)
    if not tag:
        _missing(record, "prompt", LAYOUTS_ACCEPTED)
    end = len(before) + len(tag)
    return chosen[:end], _text("chosen", chosen[end:]), _text("rejected", rejected[end:])


def _ranked(record: Mapping[str, Any]) -> _Pair:
    """Several scored completions of one prompt: the best against the worst."""
    prompt = _conversation(record, "messages" if _has(record, "messages") else "prompt")
    completions = record["completions"]
    if not isinstance(completions, list) or len(completions) < 2:
        _bad("completions", _show(completions), "a list of two or more")
    scores = _scores(record, completions)
    best, worst = scores.index(max(scores)), scores.index(min(scores))
    if scores[best] == scores[worst]:
        raise _Unusable("tie", f"all {len(scores)} completions score {scores[best]:g}")
    chosen, rejected = (_text(f"completions[{i}]", _completion_text(completions[i], i)) for i in (best, worst))
    if isinstance(prompt, str):
        return prompt, chosen, rejected
    return prompt, _as_answer(chosen), _as_answer(rejected)


def _scores(record: Mapping[str, Any], completions: Sequence[Any]) -> list[float]:
    scores: list[Any]
    if _has(record, "scores"):
        scores = record["scores"]
        if not isinstance(scores, list) or len(scores) != len(completions):
            raise _Unusable("bad_score", f"scores: found {_show(scores)} for {len(completions)} completions")
    else:
        scores = [c.get("score") if isinstance(c, dict) else None for c in completions]
    for i, score in enumerate(scores):
        if not _is_finite(score):
            raise _Unusable("bad_score", f"completions[{i}]: found score {_show(score)}; accepted: a finite number")
    return scores


def _is_finite(score: Any) -> bool:
    try:
        return isinstance(score, int | float) and not isinstance(score, bool) and math.isfinite(score)
    except OverflowError:  # an integer beyond the range of floats
        return False


def _completion_text(completion: Any, index: int) -> Any:
    if not isinstance(completion, dict):
        return completion
    for name in ("content", "text", "completion", "response", "value"):
        if _has(completion, name):
            return completion[name]
    _missing(completion, f"completions[{index}].content", "accepted are content, text, completion, response and value")


# ------------------------------------------------------------------------------------------------------------- fields


def _has(record: Mapping[str, Any], name: str) -> bool:
    return record.get(name) is not None


def _conversation(record: Mapping[str, Any], name: str) -> Messages | str:
    """A field that holds text, one message or a list of messages."""
    if not _has(record, name):
        _missing(record, name, LAYOUTS_ACCEPTED)
    value = record[name]
    if isinstance(value, str):
        return _text(name, value)
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        _bad(name, _show(value), "text or a list of messages")
    if not value:
        raise _Unusable("empty_field", f"{name}: an empty list")
    return tuple(_turn(f"{name}[{i}]", turn) for i, turn in enumerate(value))


def _turn(name: str, value: Any) -> Message:
    if not isinstance(value, dict):
        _bad(name, _show(value), "a message, {role, content} or {from, value}")
    speaker_key, text_key = ("from", "value") if _has(value, "from") else ("role", "content")
    for key in (speaker_key, text_key):
        if not _has(value, key):
            _missing(value, f"{name}.{key}", "accepted is a message, {role, content} or {from, value}")
    speaker = value[speaker_key]
    if not isinstance(speaker, str) or speaker not in ROLES:
        _bad(f"{name}.{speaker_key}", _show(speaker), ", ".join(ROLES))
    role = ROLES[speaker]
    # An empty system turn has a meaning of its own: it keeps templates from inserting their default one.
    return _turn_of(role, _text(f"{name}.{text_key}", value[text_key], may_be_empty=role == "system"))


def _text(name: str, value: Any, *, may_be_empty: bool = False) -> str:
    if not isinstance(value, str):
        _bad(name, _show(value), "text")
    if not value.strip() and not may_be_empty:
        raise _Unusable("empty_field", f"{name}: {_show(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        _bad(name, f"half of a surrogate pair at character {error.start + 1}", "Unicode text")
    return value


def _with_system(record: Mapping[str, Any], conversation: Messages | str) -> Messages:
    turns = _as_turns("conversations", conversation)
    system = record.get("system")
    if system is None or system == "":
        return turns
    return (_turn_of("system", _text("system", system)), *turns)


def _as_turns(name: str, value: Messages | str) -> Messages:
    if isinstance(value, str):
        _bad(name, _show(value), "a list of messages")
    return value


def _as_answer(value: Messages | str) -> Messages:
    return (_turn_of("assistant", value),) if isinstance(value, str) else value


def _turn_of(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _last_text(completion: Messages | str) -> str:
    return completion if isinstance(completion, str) else completion[-1]["content"]


def _missing(record: Mapping[str, Any], name: str, accepted: str) -> NoReturn:
    raise _Unusable("missing_field", f"{name}: found {', '.join(sorted(map(str, record))) or 'no fields'}; {accepted}")


def _bad(name: str, found: str, accepted: str) -> NoReturn:
    raise _Unusable("bad_field", f"{name}: found {found}; accepted: {accepted}")


def _show(value: Any) -> str:
    if isinstance(value, list | dict):
        noun = "a list" if isinstance(value, list) else "an object"
        return f"{noun} of {len(value)}"
    text = json.dumps(value, ensure_ascii=True, default=repr)
    return text if len(text) <= 48 else text[:45] + "..."
