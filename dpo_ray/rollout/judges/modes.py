"""The two ways to question a language model about a group: compare completions pairwise, or score each by a rubric.

A mode turns a group into questions and verdicts into scores. Pure: it asks nobody.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean
from typing import Any

from dpo_ray.rollout.judges.answers import parse_score, parse_winner
from dpo_ray.rollout.judges.comparisons import Outcome, choose_pairs, swap_agreement, win_rates
from dpo_ray.rollout.judges.prompts import fill, transcript
from dpo_ray.types import CompletionGroup

Schema = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt of the judge."""

    text: str
    sample: int = 0
    """Distinguishes questions with the same text, whose answers are drawn independently."""


@dataclass(frozen=True, slots=True)
class Assessment:
    """Scores of a group."""

    scores: tuple[float, ...]
    """One per completion; NaN for one without a score."""
    means: Mapping[str, float]
    """See ``Judgement.means``."""


@dataclass(frozen=True, slots=True)
class Pairwise:
    """Each comparison is asked in both orders, and the score is how often a completion won, from 0 to 1.

    Position bias thus cancels out (arXiv:2306.05685, section 3.4). Repeated texts are compared once.
    """

    template: str
    rubric: str
    comparisons: int
    """Largest number of pairs per group."""

    @property
    def reminder(self) -> str:
        """Appended to a question whose reply had no verdict."""
        return _reminder('"winner": "A", "B" or "tie"')

    @property
    def verdict(self) -> Schema:
        """JSON schema of the verdict alone, as properties of an object."""
        return {"winner": {"type": "string", "enum": ["A", "B", "tie"]}}

    def questions(self, group: CompletionGroup) -> list[Question]:
        """The prompts of the judge: two per pair."""
        texts, shared = _distinct(group), _shared_values(group) | {"rubric": self.rubric}
        orders = [order for a, b in self._pairs(group) for order in ((a, b), (b, a))]
        return [Question(fill(self.template, shared | {"first": texts[a], "second": texts[b]})) for a, b in orders]

    def parse(self, reply: str) -> float | None:
        """The verdict of a reply, the share of the completion shown first; None if it has none."""
        return parse_winner(reply)

    def assess(self, group: CompletionGroup, verdicts: Sequence[float | None]) -> Assessment:
        """Win rates, from the verdicts on ``questions(group)`` in order; equal texts have the same one."""
        texts = _distinct(group)
        both_orders = list(pairwise(verdicts))[::2]
        outcomes = [
            Outcome(first, second, forward, None if swapped is None else 1 - swapped)
            for (first, second), (forward, swapped) in zip(self._pairs(group), both_orders, strict=True)
        ]
        rates = dict(zip(texts, win_rates(len(texts), outcomes), strict=True))
        if len(texts) == 1 < len(group.completions):
            rates = {texts[0]: 0.5}
        scores = tuple(rates[completion.text] for completion in group.completions)
        return Assessment(scores, {"swap_agreement": swap_agreement(outcomes)})

    def _pairs(self, group: CompletionGroup) -> list[tuple[int, int]]:
        return choose_pairs(len(_distinct(group)), self.comparisons, group.seed)


@dataclass(frozen=True, slots=True)
class Score:
    """Each completion is scored by a rubric, ``samples`` times, and its score is the mean, in points of the rubric."""

    template: str
    rubric: str
    low: float
    high: float
    samples: int

    @property
    def reminder(self) -> str:
        return _reminder(f'"score": a number from {self.low:g} to {self.high:g}')

    @property
    def verdict(self) -> Schema:
        return {"score": {"type": "number"}}

    def questions(self, group: CompletionGroup) -> list[Question]:
        """``samples`` per distinct text."""
        bounds = {"low": f"{self.low:g}", "high": f"{self.high:g}"}
        shared = _shared_values(group) | bounds | {"rubric": self.rubric}
        prompts = [fill(self.template, shared | {"completion": text}) for text in _distinct(group)]
        return [Question(prompt, sample) for prompt in prompts for sample in range(self.samples)]

    def parse(self, reply: str) -> float | None:
        """The score, if it is in the range."""
        return parse_score(reply, self.low, self.high)

    def assess(self, group: CompletionGroup, verdicts: Sequence[float | None]) -> Assessment:
        """Means over the samples that have a score."""
        means = {}
        for number, text in enumerate(_distinct(group)):
            samples = verdicts[number * self.samples : (number + 1) * self.samples]
            scores = [score for score in samples if score is not None]
            means[text] = fmean(scores) if scores else math.nan
        return Assessment(tuple(means[completion.text] for completion in group.completions), {})


Mode = Pairwise | Score


def _reminder(verdict: str) -> str:
    return f"\n\nReply with only this JSON object, without reasoning and without other text: {{{verdict}}}"


def _distinct(group: CompletionGroup) -> list[str]:
    return list(dict.fromkeys(completion.text for completion in group.completions))


def _shared_values(group: CompletionGroup) -> dict[str, Any]:
    return {**group.prompt.fields, "prompt": transcript(group.prompt.messages)}
