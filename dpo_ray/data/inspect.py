"""The records of a run as the model will read them, decoded."""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.text import Text

from dpo_ray.config import Config
from dpo_ray.data.examples import tokenize_answers, tokenize_pairs, tokenize_prompts
from dpo_ray.data.records import PairRecord, Problem, PromptRecord
from dpo_ray.data.report import MEANINGS, DataReport, DataReportBuilder
from dpo_ray.data.sources import expand_source, split_sources
from dpo_ray.data.tokenize import (
    RecordTokenizer,
    TokenizedPair,
    TokenizedPrompt,
    load_record_tokenizer,
)
from dpo_ray.types import Messages

SIDES = ("prompt", "chosen", "rejected")
UNREAD = ("not_used", "carried")
"""Reasons of the notes that list fields."""
LABELS = {0: (), 1: (("desirable", ""),), -1: (("undesirable", ""),)}
"""Note on a completion without a pair."""


@dataclass(frozen=True, slots=True)
class InspectedRecord:
    """A record and what the run makes of it; texts are decoded with special tokens."""

    key: str
    """data.train, data.eval, online.prompts or online.eval_prompts."""
    source: str
    number: int
    status: Literal["kept", "dropped"]
    reason: str | None = None
    detail: str | None = None
    notes: tuple[tuple[str, str], ...] = ()
    """Reason and detail; the details of ``not_used`` and ``carried`` are names of fields."""
    prompt: str | None = None
    chosen: str | None = None
    rejected: str | None = None
    tokens: Mapping[str, int] = field(default_factory=dict)
    """Length of each part."""
    truncated: Mapping[str, int] = field(default_factory=dict)
    """Tokens removed from the end of a completion."""
    no_loss: Mapping[str, int] = field(default_factory=dict)
    """Tokens of a completion that carry no loss, such as the answers of tools."""
    written: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Texts of the record that each part consists of; the template added everything else."""
    unread: tuple[str, ...] = ()
    """Fields that are not used, or carried along; the notes list them too."""

    def to_json(self) -> str:
        """One line of ``--json``."""
        line = asdict(self) | {"notes": [": ".join(filter(None, note)) for note in self.notes]}
        del line["written"], line["unread"]
        return json.dumps(line, ensure_ascii=False)


def inspect_run(config: Config, console: Console, *, json_file: Path | None = None, shown: int = 3) -> None:
    """Print the data report and the first records of every data set of a run; write all records to ``json_file``.

    Raises:
        ValueError: a source or the tokenizer cannot be loaded, or no record of a data set is usable.
    """
    tokenizer = load_record_tokenizer(config)
    sets = {
        key: (_pairs(key, sources, tokenizer, limit), sources)
        for key, sources, limit in (
            ("data.train", config.data.train, config.data.limit), ("data.eval", config.data.eval, None)
        )
    }  # fmt: skip
    if config.online:
        answered = config.online.source.use == "self_play"
        for name, read in (("prompts", _answers if answered else _prompts), ("eval_prompts", _prompts)):
            sources = getattr(config.online, name)
            sets[f"online.{name}"] = (read(f"online.{name}", sources, tokenizer), sources)
    if not any(sources for _, sources in sets.values()):
        raise ValueError("data.train, data.eval and online.prompts are empty: nothing to inspect")
    try:
        output = json_file.open("w", encoding="utf-8") if json_file else contextlib.nullcontext()
    except OSError as error:
        raise ValueError(f"--json {json_file}: cannot be written: {error.strerror}") from None
    with output as lines:
        for key, (records, sources) in sets.items():
            if sources:
                _inspect_set(key, records, sources, console, lines, shown)


def _inspect_set(
    key: str, records: Iterator[InspectedRecord], sources: Sequence[str], console: Console, lines: Any, shown: int
) -> None:
    counts, first, lengths = DataReportBuilder(), [], []
    with console.status(f"{key}: reading") as status:
        for record in records:
            if lines:
                lines.write(record.to_json() + "\n")
            _count(counts, record)
            if record.status == "kept":
                sides = SIDES if "rejected" in record.tokens else SIDES[:1]
                lengths.append(tuple(record.tokens[side] for side in sides))
                first += [record] if len(first) < shown else []
            if counts.read % 1000 == 0:
                status.update(f"{key}: {counts.read:,} records read")
    columns = len(lengths[0]) if lengths else 3
    report: DataReport = counts.build(np.array(lengths, np.int64).reshape(-1, columns))
    report.check(strict=False, name=key, sources=sources)
    console.print(report.text(key), highlight=False, markup=False, soft_wrap=True)
    for record in first:
        console.print(to_text(record), soft_wrap=True)


def _count(counts: DataReportBuilder, record: InspectedRecord) -> None:
    if record.status == "dropped":
        counts.drop(Problem(record.reason or "", record.source, record.number, record.detail or ""))
        return
    notes = [note for note in record.notes if note[0] not in UNREAD]
    counts.keep(record.source, record.number, notes, record.unread)


def _pairs(
    key: str, sources: Sequence[str], tokenizer: RecordTokenizer, limit: int | None
) -> Iterator[InspectedRecord]:
    files = [file for source in sources for file in expand_source(source)]
    parts = split_sources(files, rows_per_part=1 << 62, limit=limit)
    for item in tokenize_pairs(parts, tokenizer):
        yield _dropped(key, item) if isinstance(item, Problem) else _kept_pair(key, *item, tokenizer)


def _prompts(key: str, sources: Sequence[str], tokenizer: RecordTokenizer) -> Iterator[InspectedRecord]:
    for item in tokenize_prompts(sources, tokenizer):
        yield _dropped(key, item) if isinstance(item, Problem) else _kept_prompt(key, *item, tokenizer)


def _answers(key: str, sources: Sequence[str], tokenizer: RecordTokenizer) -> Iterator[InspectedRecord]:
    """Prompts of self-play, whose records' answers are chosen."""
    for item in tokenize_answers(sources, tokenizer):
        if isinstance(item, Problem):
            yield _dropped(key, item)
            continue
        record, result, answer = item
        kept = _kept_prompt(key, record, result, tokenizer)
        yield replace(
            kept,
            chosen=tokenizer.decode(answer.token_ids),
            tokens={**kept.tokens, "chosen": len(answer.token_ids)},
            written={**kept.written, "chosen": (answer.text,)},
        )


def _kept_prompt(
    key: str, record: PromptRecord, result: TokenizedPrompt, tokenizer: RecordTokenizer
) -> InspectedRecord:
    prompt = tokenizer.decode(result.token_ids)
    return InspectedRecord(
        key, record.source, record.number, "kept",
        notes=(*result.notes, *_fields((*record.fields, *record.unread), "carried")),
        prompt=prompt,
        tokens={"prompt": len(result.token_ids)},
        written={"prompt": _written(result.messages, prompt)},
        unread=(*record.fields, *record.unread),
    )  # fmt: skip


def _dropped(key: str, problem: Problem) -> InspectedRecord:
    return InspectedRecord(key, problem.source, problem.number, "dropped", problem.reason, problem.detail)


def _kept_pair(key: str, record: PairRecord, result: TokenizedPair, tokenizer: RecordTokenizer) -> InspectedRecord:
    ids = {side: getattr(result.pair, side) for side in SIDES}
    if record.unpaired:  # the other completion is of another record
        ids["rejected" if record.unpaired > 0 else "chosen"] = ()
    no_loss = {side: sum(token < 0 for token in ids[side]) for side in SIDES}
    texts = {side: tokenizer.decode(ids[side]) for side in SIDES}
    written = {side: _written(getattr(record, side), texts[side]) if ids[side] else () for side in SIDES}
    return InspectedRecord(
        key, record.source, record.number, "kept",
        notes=(*LABELS[record.unpaired], *result.notes, *_fields(record.unread, "not_used")),
        **texts,
        tokens={side: len(ids[side]) for side in SIDES},
        truncated={side: n for side, n in zip(SIDES[1:], result.removed, strict=True) if n},
        no_loss={side: n for side, n in no_loss.items() if n},
        written={**written, "prompt": (*_written(record.system, texts["prompt"]), *written["prompt"])},
        unread=record.unread,
    )  # fmt: skip


def _fields(names: Sequence[str], fate: str) -> tuple[tuple[str, str], ...]:
    """The note that lists fields, if there are any."""
    return ((fate, ", ".join(names)),) if names else ()


def _written(part: Messages | str, text: str) -> tuple[str, ...]:
    """Texts of a part of the record, in the spelling of the decoded ``text``."""
    if isinstance(part, str):
        return (part,)
    keys = ("reasoning_content", "thinking", "content")
    written: list[str] = []
    for message in part:
        written += [message[key] for key in keys if message.get(key)]
        for call in message.get("tool_calls", ()):
            called = call["function"] if isinstance(call.get("function"), dict) else call
            written += [*_values(called.get("name")), *_written_arguments(called.get("arguments"), text)]
    return tuple(written)


def _written_arguments(arguments: Any, text: str) -> list[str]:
    """Arguments of a call as ``text`` has them: JSON in the record's spelling or the template's, or single values."""
    with contextlib.suppress(ValueError):
        arguments = json.loads(arguments) if isinstance(arguments, str) and arguments not in text else arguments
    encoded = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return [encoded] if encoded in text else _values(arguments)


def _values(value: Any) -> list[str]:
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    if items is None:
        return [str(value)] if value not in (None, "") else []
    return [text for item in items for text in _values(item)]


def to_text(record: InspectedRecord) -> Text:
    """A kept record for the terminal; what the template added is dim and in guillemets."""
    counts = " | ".join(
        f"{side} {count:,} tokens"
        + (f" ({record.truncated[side]:,} more truncated)" if side in record.truncated else "")
        + (f" ({record.no_loss[side]:,} without loss)" if side in record.no_loss else "")
        for side, count in record.tokens.items()
    )
    text = Text(f"\n{record.source}:{record.number}  ", style="bold").append(counts, style="not bold")
    for reason, detail in record.notes:
        text.append(
            f"\n  note: {MEANINGS.get(reason, reason.replace('_', ' '))}" + (f": {detail}" if detail else ""), "yellow"
        )
    for side in record.tokens:
        text.append(f"\n| {side}\n", style="bold cyan")
        for part, added in _segments(getattr(record, side), record.written.get(side, ())):
            text.append(f"«{part}»" if added else part, style="dim" if added else "not bold")
        if side in record.truncated:
            text.append(" [truncated]", style="bold red")
    return text.append("\n|", style="bold cyan")


def _segments(text: str, written: Sequence[str]) -> Iterator[tuple[str, bool]]:
    """The parts of a text in order, and True for those that do not occur in ``written``."""
    at = 0
    for part in written:
        part = part.strip() if part.strip() in text[at:] and part not in text[at:] else part
        # A truncated completion ends within its text.
        start = text.find(part, at)
        if start < 0 and part.startswith(text[at:].strip()) and text[at:].strip():
            start, part = at, text[at:]
        if start < 0:
            continue
        if start > at:
            yield text[at:start], True
        yield part, False
        at = start + len(part)
    if at < len(text):
        yield text[at:], True
