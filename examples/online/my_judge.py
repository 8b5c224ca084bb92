"""A judge: scores every completion of every group; higher is better, and only the order within a group matters."""

from collections.abc import Sequence

from dpo_ray.types import CompletionGroup

FILLERS = ("great question", "as an ai", "certainly", "of course", "i'm glad", "it depends", "in conclusion")


def to_the_point(groups: Sequence[CompletionGroup], target_words: int = 40) -> list[list[float]]:
    """Scores 1 for an answer of at most ``target_words`` words; each filler, and each surplus of that length, costs 1.

    Args:
        groups: prompts with their completions.
        target_words: set with ``online.judge.args``.
    """
    return [[_score(completion.text, target_words) for completion in group.completions] for group in groups]


def _score(text: str, target_words: int) -> float:
    words = len(text.split())
    if words == 0:
        return float("nan")  # no score: the candidate is left out and counted
    fillers = sum(filler in text.lower() for filler in FILLERS)
    return 1.0 - fillers - max(0, words - target_words) / target_words
