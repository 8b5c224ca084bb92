"""Reports of data preparation: counts of the records read, kept, dropped and altered, with examples."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import pydantic

from dpo_ray.data.records import Problem

EXAMPLES = 3
"""Records named per reason."""

MEANINGS: Mapping[str, str] = {
    "not_json": "not valid JSON",
    "not_a_record": "not an object of fields",
    "missing_field": "field missing",
    "empty_field": "field empty",
    "bad_field": "field not usable",
    "identical": "chosen equal to rejected",
    "identical_after_truncation": "chosen equal to rejected after truncation",
    "tie": "best and worst score equal",
    "bad_score": "score missing or not finite",
    "template_refused": "rejected by the chat template",
    "loss_mask": "assistant turns not found in the text",
    "empty_prompt": "prompt without tokens",
    "prompt_rewritten": "prompt rendered otherwise before an answer",
    "prompt_too_long": "prompt too long",
    "completion_emptied": "completion without tokens",
    "too_long_for_model": "longer than the model's positions",
    "unknown_token": "token without an embedding",
    "split_special_token": "special token split by the tokenizer",
    "unpaired": "one completion with a label",
    "left_out": "pair or completion left out",
    "not_used": "fields not used",
    "carried": "fields carried along for judges",
    "strings_chat": "strings put into the chat template",
    "strings_raw": "strings used as written",
    "special_in_text": "special token in text, trained on as written",
    "media_placeholder": "placeholder of media in text, used as written",
    "unreadable_cell": "cell that cannot be read",
    "text_not_rendered": "text left out by the chat template",
    "unknown_text": "text that the tokenizer has no token for",
    "boundary_moved": "prompt boundary moved by the tokenizer",
    "completion_cut": "completion truncated",
    "double_eos": "two end-of-sequence tokens in a row",
    "no_eos": "no end-of-turn token",
}

WITHOUT_EXAMPLES = ("strings_chat", "strings_raw")
"""Reasons that apply to whole data sets."""

_MEANING_WIDTH = max(map(len, MEANINGS.values()))

MAX_LENGTH_GAP = 0.2
"""Largest difference of mean lengths without a warning, as a fraction of the mean completion length."""


@dataclass(frozen=True, slots=True)
class Example:
    """A record named in the report."""

    source: str
    number: int
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.source}:{self.number}" + (f" ({self.detail})" if self.detail else "")


@dataclass(frozen=True, slots=True)
class Tally:
    """Records with the same reason: their count and the first of them."""

    count: int
    first: tuple[Example, ...]


@dataclass(frozen=True, slots=True)
class LengthStats:
    """Lengths in tokens."""

    mean: float
    median: float
    max: int


@pydantic.dataclasses.dataclass(frozen=True, slots=True)
class DataReport:
    """Counts of a data set's records, and lengths of those kept; loaded with ``DataReport(**asdict(report))``."""

    read: int
    kept: int
    dropped: Mapping[str, Tally]
    """Dropped records by reason."""
    notes: Mapping[str, Tally]
    """Kept records that were altered or look unusual, by reason."""
    unread: Mapping[str, int]
    """Kept records with a field that is not part of the pair or prompt, by field."""
    prompt: LengthStats | None
    """None if no record was kept."""
    chosen: LengthStats | None
    rejected: LengthStats | None
    examples: int = 0
    """Pairs, or completions without a pair, that the kept records became; 0 for prompts."""

    def text(self, name: str = "data") -> str:
        """The report as lines of text, prefixed with ``name``."""
        dropped = sum(tally.count for tally in self.dropped.values())
        made = f" as {self.examples:,} pairs or completions" if self.examples > self.kept else ""
        lines = [f"{name}: {self.read:,} records read, {self.kept:,} kept{made}, {dropped:,} dropped"]
        lines += _tally_lines(self.dropped)
        if self.notes:
            lines += ["  notes on kept records:", *_tally_lines(self.notes)]
        if self.unread:
            fate = "not used" if self.chosen else "carried along for judges"
            lines.append(f"  fields {fate}: " + ", ".join(f"{field} ({n:,})" for field, n in self.unread.items()))
        for part in ("prompt", "chosen", "rejected"):
            if (stats := getattr(self, part)) is not None:
                lines.append(f"  {part:<8} tokens: mean {stats.mean:.0f}, median {stats.median:.0f}, max {stats.max:,}")
        return "\n".join(lines + _length_warning(self.chosen, self.rejected))

    def check(self, *, strict: bool, name: str = "data", sources: Sequence[str] = ()) -> None:
        """Raise a ValueError with the whole report if no record was kept, or if ``strict`` and any was dropped."""
        if not self.kept:
            where = f" of {', '.join(sources)}" if sources else ""
            raise ValueError(f"{name}: no record{where} can be used\n{self.text(name)}")
        if strict and self.dropped:
            raise ValueError(f"{name}: data.strict is true and records were dropped\n{self.text(name)}")

    def renamed(self, names: Mapping[str, str]) -> Self:
        """The report with renamed sources."""

        def rename(tallies: Mapping[str, Tally]) -> dict[str, Tally]:
            return {
                reason: Tally(tally.count, tuple(replace(e, source=names.get(e.source, e.source)) for e in tally.first))
                for reason, tally in tallies.items()
            }

        return replace(self, dropped=rename(self.dropped), notes=rename(self.notes))


class DataReportBuilder:
    """Counts records as they are read."""

    def __init__(self) -> None:
        self.read = self.kept = self.examples = 0
        self._last: tuple[str, int] | None = None
        self._noted: set[str] = set()  # notes on the last record
        self._dropped: dict[str, Tally] = {}
        self._notes: dict[str, Tally] = {}
        self._unread: Counter[str] = Counter()

    def drop(self, problem: Problem) -> None:
        """Count a dropped record."""
        self.read += 1
        _add(self._dropped, problem.reason, Tally(1, (Example(problem.source, problem.number, problem.detail),)))

    def keep(self, source: str, number: int, notes: Sequence[tuple[str, str]] = (), unread: Sequence[str] = ()) -> None:
        """Count a pair or prompt of a kept record; and the record, the notes on it and its fields that were not read.

        The pairs of a record follow each other; the record and each kind of note on it count once, except that every
        pair or completion left out counts.

        Args:
            notes: reason and detail of each.
        """
        self.examples += 1
        if self._last != (source, number):
            self._last, self._noted = (source, number), set()
            self.read += 1
            self.kept += 1
            self._unread.update(unread)
        for note, detail in notes:
            if note not in self._noted or note == "left_out":
                self._noted.add(note)
                _add(self._notes, note, Tally(1, (Example(source, number, detail),)))

    def add(self, other: "DataReportBuilder") -> None:
        """Add the counts of another builder, whose records follow."""
        self.read, self.kept = self.read + other.read, self.kept + other.kept
        self.examples += other.examples
        self._unread.update(other._unread)
        for tallies, added in ((self._dropped, other._dropped), (self._notes, other._notes)):
            for reason, tally in added.items():
                _add(tallies, reason, tally)

    def build(self, lengths: np.ndarray) -> DataReport:
        """The report. ``lengths`` is (n, 3) tokens of prompt, chosen and rejected, or (n, 1) of prompts alone."""
        # A completion without a pair may have nothing in the other's place.
        stats = [_length_stats(tokens[tokens > 0]) if tokens.any() else None for tokens in lengths.T]
        examples = self.examples if len(stats) == 3 else 0
        prompt, chosen, rejected = (*stats, None, None)[:3]
        counts = dict(self._dropped), dict(self._notes), dict(self._unread)
        return DataReport(self.read, self.kept, *counts, prompt, chosen, rejected, examples)


def _add(tallies: dict[str, Tally], reason: str, tally: Tally) -> None:
    before = tallies.get(reason, Tally(0, ()))
    tallies[reason] = Tally(before.count + tally.count, (*before.first, *tally.first)[:EXAMPLES])


def _length_stats(tokens: np.ndarray) -> LengthStats:
    return LengthStats(float(tokens.mean()), float(np.median(tokens)), int(tokens.max()))


def _length_warning(chosen: LengthStats | None, rejected: LengthStats | None) -> list[str]:
    if chosen is None or rejected is None:
        return []
    gap = abs(chosen.mean - rejected.mean)
    relative_gap = 2 * gap / (chosen.mean + rejected.mean)
    if relative_gap <= MAX_LENGTH_GAP:
        return []
    longer, shorter = ("chosen", "rejected") if chosen.mean > rejected.mean else ("rejected", "chosen")
    return [
        f"  warning: {longer} is {gap:.0f} tokens longer than {shorter} on average "
        f"({relative_gap:.0%} of the mean completion); the policy may learn the length"
    ]


def _tally_lines(tallies: Mapping[str, Tally]) -> list[str]:
    lines = []
    for reason, tally in tallies.items():
        meaning = MEANINGS.get(reason, reason.replace("_", " "))
        prefix = f"  {tally.count:>6,} {meaning:<{_MEANING_WIDTH}}  "
        if reason in WITHOUT_EXAMPLES and not set(WITHOUT_EXAMPLES) <= set(tallies):
            lines.append(f"{prefix}data.strings: auto, chat or raw")
            continue
        for example in tally.first:
            lines.append(f"{prefix}{example}")
            prefix = " " * len(prefix)
        if tally.count > len(tally.first):
            lines.append(f"{prefix}and {tally.count - len(tally.first):,} more")
    return lines
