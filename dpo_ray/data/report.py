"""What became of the records of a data set: how many were read, kept, dropped and altered, and which.

Counts and formats; decides nothing about a record.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

import numpy as np

from dpo_ray.data.records import Problem

SHOWN = 3
"""Records named for each reason."""

MEANINGS: Mapping[str, str] = {
    "not_json": "not valid JSON",
    "not_a_record": "not an object of fields",
    "missing_field": "field missing",
    "empty_field": "field empty",
    "bad_field": "field not usable",
    "identical": "chosen equal to rejected",
    "identical_after_truncation": "chosen equal to rejected once cut",
    "tie": "best and worst score equal",
    "bad_score": "score missing or not finite",
    "template_refused": "refused by the chat template",
    "empty_prompt": "prompt without tokens",
    "prompt_too_long": "prompt too long",
    "completion_emptied": "completion without tokens",
    "boundary_moved": "boundary moved into the prompt",
    "completion_cut": "completion cut to its limit",
    "double_eos": "two end-of-sequence tokens in a row",
    "no_eos": "no end-of-sequence token",
}

_MEANING_WIDTH = max(map(len, MEANINGS.values()))

LENGTH_GAP_WARNED = 0.2
"""Share of the mean completion length."""


@dataclass(frozen=True, slots=True)
class Offender:
    """A record that is named in the report."""

    source: str
    number: int
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.source}:{self.number}" + (f" ({self.detail})" if self.detail else "")


@dataclass(frozen=True, slots=True)
class Tally:
    """How many records one reason befell, and the first of them."""

    count: int
    first: tuple[Offender, ...]


@dataclass(frozen=True, slots=True)
class LengthStats:
    """Tokens of one part of the pairs."""

    mean: float
    median: float
    max: int


@dataclass(frozen=True, slots=True)
class DataReport:
    """What became of the records of a data set."""

    read: int
    kept: int
    dropped: Mapping[str, Tally]
    """By reason."""
    notes: Mapping[str, Tally]
    """Kept records with something to know about them, by reason."""
    prompt: LengthStats | None
    """None where no record was kept."""
    chosen: LengthStats | None
    rejected: LengthStats | None

    @property
    def length_gap(self) -> float:
        """Mean of chosen minus rejected, in tokens."""
        return self.chosen.mean - self.rejected.mean if self.chosen and self.rejected else 0.0

    @property
    def relative_length_gap(self) -> float:
        """The length gap as a share of the mean completion."""
        return 2 * self.length_gap / (self.chosen.mean + self.rejected.mean) if self.chosen and self.rejected else 0.0

    def text(self, name: str = "data") -> str:
        """The report as lines for a terminal.

        Args:
            name: what the first line begins with.
        """
        dropped = sum(tally.count for tally in self.dropped.values())
        lines = [f"{name}: {self.read:,} records read, {self.kept:,} kept, {dropped:,} dropped"]
        lines += _tally_lines(self.dropped)
        if self.notes:
            lines += ["  of those kept:", *_tally_lines(self.notes)]
        for part in ("prompt", "chosen", "rejected"):
            if (stats := getattr(self, part)) is not None:
                lines.append(f"  {part:<8} tokens: mean {stats.mean:.0f}, median {stats.median:.0f}, max {stats.max:,}")
        if abs(self.relative_length_gap) > LENGTH_GAP_WARNED:
            longer, shorter = ("chosen", "rejected") if self.length_gap > 0 else ("rejected", "chosen")
            lines.append(
                f"  warning: {longer} is {abs(self.length_gap):.0f} tokens longer than {shorter} on average "
                f"({abs(self.relative_length_gap):.0%} of the mean completion); the policy may learn the length"
            )
        return "\n".join(lines)

    def check(self, *, strict: bool, name: str = "data", sources: Sequence[str] = ()) -> None:
        """Refuse a data set of which nothing is left, or, if strict, of which anything was dropped.

        Args:
            strict: a dropped record is an error.
            name: of the key, for the message.
            sources: what the records came from, for the message.

        Raises:
            ValueError: the message holds the whole report.
        """
        if not self.kept:
            where = f" of {', '.join(sources)}" if sources else ""
            raise ValueError(f"{name}: no record{where} can be used\n{self.text(name)}")
        if strict and self.dropped:
            raise ValueError(f"{name}: data.strict is true and records were dropped\n{self.text(name)}")

    def renamed(self, names: Mapping[str, str]) -> Self:
        """The same report with its sources under other names."""

        def rename(tally: Tally) -> Tally:
            return replace(tally, first=tuple(replace(o, source=names.get(o.source, o.source)) for o in tally.first))

        return replace(
            self,
            dropped={reason: rename(tally) for reason, tally in self.dropped.items()},
            notes={reason: rename(tally) for reason, tally in self.notes.items()},
        )

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON types; ``from_dict`` is the way back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> Self:
        """The report that ``to_dict`` wrote."""

        def tallies(name: str) -> dict[str, Tally]:
            return {
                reason: Tally(tally["count"], tuple(Offender(**offender) for offender in tally["first"]))
                for reason, tally in tree[name].items()
            }

        def stats(name: str) -> LengthStats | None:
            return None if tree[name] is None else LengthStats(**tree[name])

        return cls(
            tree["read"],
            tree["kept"],
            tallies("dropped"),
            tallies("notes"),
            stats("prompt"),
            stats("chosen"),
            stats("rejected"),
        )


class DataReportBuilder:
    """Counts records as they are read."""

    def __init__(self) -> None:
        """Start with nothing read."""
        self.kept = 0
        self._dropped: dict[str, Tally] = {}
        self._notes: dict[str, Tally] = {}

    @property
    def read(self) -> int:
        """Records counted so far, kept or dropped."""
        return self.kept + sum(tally.count for tally in self._dropped.values())

    def drop(self, problem: Problem) -> None:
        """Count a record that is not used."""
        _count(self._dropped, problem.reason, Offender(problem.source, problem.number, problem.detail))

    def keep(self, source: str, number: int, notes: Sequence[str] = ()) -> None:
        """Count a record that is used, and the notes on it."""
        self.kept += 1
        for note in notes:
            _count(self._notes, note, Offender(source, number))

    def add(self, other: "DataReportBuilder") -> None:
        """Count what another has counted behind what this one has."""
        self.kept += other.kept
        for mine, theirs in ((self._dropped, other._dropped), (self._notes, other._notes)):
            for reason, tally in theirs.items():
                before = mine.get(reason, Tally(0, ()))
                mine[reason] = Tally(before.count + tally.count, (*before.first, *tally.first)[:SHOWN])

    def build(self, lengths: np.ndarray) -> DataReport:
        """The report.

        Args:
            lengths: (pairs, 3) tokens of prompt, chosen and rejected of the kept records.
        """
        stats = [_length_stats(lengths[:, column]) if len(lengths) else None for column in range(3)]
        return DataReport(self.read, self.kept, dict(self._dropped), dict(self._notes), *stats)


def _count(tallies: dict[str, Tally], reason: str, offender: Offender) -> None:
    tally = tallies.get(reason, Tally(0, ()))
    first = tally.first if len(tally.first) == SHOWN else (*tally.first, offender)
    tallies[reason] = Tally(tally.count + 1, first)


def _length_stats(tokens: np.ndarray) -> LengthStats:
    return LengthStats(float(tokens.mean()), float(np.median(tokens)), int(tokens.max()))


def _tally_lines(tallies: Mapping[str, Tally]) -> list[str]:
    lines = []
    for reason, tally in tallies.items():
        meaning = MEANINGS.get(reason, reason.replace("_", " "))
        beginning = f"  {tally.count:>6,} {meaning:<{_MEANING_WIDTH}}  "
        for offender in tally.first:
            lines.append(f"{beginning}{offender}")
            beginning = " " * len(beginning)
        if tally.count > len(tally.first):
            lines.append(f"{beginning}and {tally.count - len(tally.first):,} more")
    return lines
