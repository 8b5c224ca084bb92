"""Running counts of a round, from the lines of its pairs.jsonl."""

import math
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from dpo_ray.types import Judgement

Line = Mapping[str, Any]
"""One line of pairs.jsonl."""
SCORES = ("mean", "best", "chosen", "rejected")
"""Scores of every round."""
SCORE_METRICS = (*(f"{name}_score" for name in SCORES), "length_correlation", "chosen_win_rate")
"""Metrics of every round about its scores, logged as judge/NAME."""


def sampled_candidates(line: Line) -> list[Mapping[str, Any]]:
    """The candidates that the policy sampled: all but a record's own answer."""
    return [candidate for candidate in line["candidates"] if candidate.get("sampled", True)]


@dataclass(slots=True)
class Mean:
    """A running mean."""

    total: float = 0.0
    terms: int = 0

    def add(self, *values: float) -> None:
        self.total += sum(values)
        self.terms += len(values)

    @property
    def value(self) -> float | None:
        """The mean; None without terms."""
        return self.total / self.terms if self.terms else None


@dataclass(slots=True)
class Correlation:
    """Running Pearson correlation within groups: both variables are taken relative to their group's mean."""

    xx: float = 0.0
    xy: float = 0.0
    yy: float = 0.0

    def add(self, xs: Sequence[float], ys: Sequence[float]) -> None:
        if not xs:
            return
        dx, dy = ([value - fmean(values) for value in values] for values in (xs, ys))
        self.xx += sum(x * x for x in dx)
        self.yy += sum(y * y for y in dy)
        self.xy += sum(x * y for x, y in zip(dx, dy, strict=True))

    @property
    def value(self) -> float | None:
        """The correlation; None if a variable does not vary."""
        return self.xy / math.sqrt(self.xx * self.yy) if self.xx and self.yy else None


@dataclass(slots=True)
class Tally:
    """Counts of a round. Completions that the policy did not sample are left out."""

    counts: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    """Groups without a pair by reason."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Pairs by the reason for which a selector left them out of groups that have others."""
    scores: dict[str, Mean] = field(default_factory=lambda: {name: Mean() for name in SCORES})
    """Means of scores: ``mean`` over all completions, ``best`` over the best of each group, and over the completions
    of the pairs; further ones by the components of the judge."""
    means: dict[str, Mean] = field(default_factory=dict)
    """See ``Judgement.means``."""
    totals: Counter[str] = field(default_factory=Counter)
    """See ``Judgement.totals``."""
    chosen: list[float] = field(default_factory=list)
    """Scores of the chosen completion of each pair."""
    length: Correlation = field(default_factory=Correlation)
    """Correlation of score and length in tokens."""
    versions: Counter[int] = field(default_factory=Counter)
    """Completions by the policy version of their first token."""

    def add(self, line: Line) -> None:
        candidates, scores = sampled_candidates(line), [score for score in line["scores"] if score is not None]
        texts = [candidate["text"] for candidate in candidates]
        self.counts.update(
            prompts=1,
            candidates=len(candidates),
            pairs=len(line["pairs"]),
            kept=bool(line["pairs"]),
            duplicates=len(texts) - len(set(texts)),
            empty=sum(not text.strip() for text in texts),
            bad_scores=len(line["scores"]) - len(scores),
            truncated=sum(not candidate["finished"] for candidate in candidates),
            tokens=sum(candidate["tokens"] for candidate in candidates),
        )
        if line["dropped"] is not None:
            self.dropped[line["dropped"]] += 1
        self.left_out.update(line.get("left_out", {}))
        self.versions.update(candidate["versions"][0] for candidate in candidates)
        self._add_scores(line, scores)
        judge = line.get("judge", {})
        for name, value in judge.get("means", {}).items():
            self.means.setdefault(name, Mean()).add(*([] if value is None else [value]))
        self.totals.update(judge.get("totals", {}))

    def _add_scores(self, line: Line, scores: Sequence[float]) -> None:
        self.scores["mean"].add(*scores)
        self.scores["best"].add(*([max(scores)] if scores else []))
        for side in ("chosen", "rejected"):
            of_side = [score for pair in line["pairs"] if (score := pair[f"{side}_score"]) is not None]
            self.scores[side].add(*of_side)
            if side == "chosen":
                self.chosen += of_side
        for name, part in line.get("judge", {}).get("parts", {}).items():
            self.scores.setdefault(name, Mean()).add(*(score for score in part if score is not None))
        scored = [(s, c["tokens"]) for s, c in zip(line["scores"], line["candidates"], strict=False) if s is not None]
        self.length.add([score for score, _ in scored], [tokens for _, tokens in scored])

    def all_counts(self) -> dict[str, Any]:
        """The counts, with those by reason."""
        by_reason = {"dropped": self.dropped, "left_out": self.left_out}
        return {**self.counts, **{name: dict(sorted(reasons.items())) for name, reasons in by_reason.items()}}

    def mean_scores(self) -> dict[str, float | None]:
        """Means of scores, by name; None without a score."""
        return {name: mean.value for name, mean in self.scores.items()}

    def judging(self, held_out: Sequence[float] = ()) -> dict[str, float]:
        """Metrics of the judge, by name.

        Args:
            held_out: scores of held-out completions, over which ``chosen_win_rate`` is.
        """
        values = {name: mean.value for name, mean in self.means.items()} | {
            "length_correlation": self.length.value,
            "chosen_win_rate": win_rate_over(held_out, self.chosen),
        }
        return {name: value for name, value in values.items() if value is not None} | dict(self.totals)


def judge_metrics(judgements: Iterable[Judgement]) -> dict[str, float]:
    """Metrics of a judge over groups, by name: means, means of the scores of components as NAME_score, and sums."""
    means, totals = dict[str, Mean](), Counter[str]()
    for judgement in judgements:
        values = {name: (value,) for name, value in judgement.means.items()}
        values |= {f"{name}_score": scores for name, scores in judgement.parts.items()}
        for name, terms in values.items():
            means.setdefault(name, Mean()).add(*filter(math.isfinite, terms))
        totals.update(judgement.totals)
    return {name: mean.value for name, mean in means.items() if mean.value is not None} | dict(totals)


def win_rate_over(others: Sequence[float], scores: Sequence[float]) -> float | None:
    """Share of all pairs of one of ``scores`` and one of ``others`` in which the former is higher; a tie counts half.

    None if there is no such pair.
    """
    if not (others and scores):
        return None
    others = sorted(others)
    wins = sum(bisect_left(others, score) + bisect_right(others, score) for score in scores)
    return wins / (2 * len(others) * len(scores))
