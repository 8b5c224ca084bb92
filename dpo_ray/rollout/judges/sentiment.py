"""A judge of positive tone by the VADER word list: fast, deterministic, no model."""

import re
from collections.abc import Sequence

from dpo_ray.types import CompletionGroup


class Sentiment:
    """VADER's compound sentiment of a completion, from -1 (negative) to 1 (positive); 0 is neutral or empty.

    Hutto and Gilbert, ICWSM 2014. The prompt is ignored. Sentences are counted once, because the sentiment of words
    adds up and a policy would learn to repeat itself.

    Raises:
        ValueError: the package vaderSentiment is not installed.
    """

    def __init__(self) -> None:
        try:
            from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
        except ImportError:
            raise ValueError(
                "judge 'sentiment' needs the package vaderSentiment, which is not installed; "
                "install the extra demo (pip install 'dpo-ray[demo]') or set another online.judge.use"
            ) from None
        self._analyzer = SentimentIntensityAnalyzer()

    def __call__(self, groups: Sequence[CompletionGroup]) -> list[list[float]]:
        return [[self._score(completion.text) for completion in group.completions] for group in groups]

    def _score(self, text: str) -> float:
        sentences = re.split(r"(?<=[.!?])\s+|\n+", text)
        distinct = {sentence.lower(): sentence for sentence in sentences}
        return self._analyzer.polarity_scores(" ".join(distinct.values()))["compound"]
