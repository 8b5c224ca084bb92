"""A judge of positive tone by the VADER word list: fast, deterministic, no model."""

import re
from collections.abc import Sequence
from statistics import fmean
from typing import Literal

from dpo_ray.types import CompletionGroup


class Sentiment:
    """VADER's compound sentiment of a completion, from -1 (negative) to 1 (positive); 0 is neutral or empty.

    Hutto and Gilbert, ICWSM 2014. The prompt is ignored.

    Args:
        per: ``text`` scores the completion as a whole, which favors long and repetitive ones, since the sentiment of
            words adds up. ``sentence`` is the mean over its different sentences.

    Raises:
        ValueError: the package vaderSentiment is not installed.
    """

    def __init__(self, per: Literal["text", "sentence"] = "text") -> None:
        if per not in ("text", "sentence"):
            raise ValueError(f"judge 'sentiment': per is {per!r}; accepted are text and sentence")
        try:
            from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
        except ImportError:
            raise ValueError(
                "judge 'sentiment' needs the package vaderSentiment, which is not installed; "
                "install the extra demo (pip install 'dpo-ray[demo]') or set another online.judge.use"
            ) from None
        self._analyzer, self._per = SentimentIntensityAnalyzer(), per

    def __call__(self, groups: Sequence[CompletionGroup]) -> list[list[float]]:
        return [[self._score(completion.text) for completion in group.completions] for group in groups]

    def _score(self, text: str) -> float:
        sentences = {text}
        if self._per == "sentence":
            parts = re.split(r"(?<=[.!?])\s+|\n+", text.lower())
            sentences = {part.strip() for part in parts if part.strip()} or {""}
        return fmean(float(self._analyzer.polarity_scores(sentence)["compound"]) for sentence in sorted(sentences))
