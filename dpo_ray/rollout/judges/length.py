"""A judge that needs no model: closeness to a length in words. For smoke tests and as an example of a judge."""

from collections.abc import Sequence

from dpo_ray.types import CompletionGroup


class Length:
    """Scores a completion by how near its length comes to ``target_words``.

    The score is ``1 - |words - target_words| / target_words``, never below -1: 1 at the target, 0 at twice the target,
    -1 from three times the target on. An empty completion gets -1 too, not the 0 that the formula gives, so that saying
    nothing never beats saying too much.

    Raises:
        ValueError: ``target_words`` is not a whole number of at least 1.
    """

    def __init__(self, target_words: int = 60) -> None:
        if not isinstance(target_words, int) or target_words < 1:
            raise ValueError(
                f"judge 'length': target_words is {target_words!r}; it must be a whole number of at least 1"
            )
        self.target_words = target_words

    def __call__(self, groups: Sequence[CompletionGroup]) -> list[list[float]]:
        return [[self._score(completion.text) for completion in group.completions] for group in groups]

    def _score(self, text: str) -> float:
        words = len(text.split())
        if words == 0:
            return -1.0
        return max(-1.0, 1.0 - abs(words - self.target_words) / self.target_words)
