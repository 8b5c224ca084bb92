"""A judge without a model, for smoke tests and as an example: closeness to a target length in words."""

from collections.abc import Sequence

from dpo_ray.types import CompletionGroup


class Length:
    """Scores a completion ``1 - |words - target_words| / target_words``, at least -1.

    An empty completion scores -1, not 0, so that it never beats a long one.

    Raises:
        ValueError: ``target_words`` is not an integer of at least 1.
    """

    def __init__(self, target_words: int = 60) -> None:
        if not isinstance(target_words, int) or target_words < 1:
            raise ValueError(f"judge 'length': target_words is {target_words!r}; it must be an integer of at least 1")
        self.target_words = target_words

    def __call__(self, groups: Sequence[CompletionGroup]) -> list[list[float]]:
        return [[self._score(completion.text) for completion in group.completions] for group in groups]

    def _score(self, text: str) -> float:
        words = len(text.split())
        if words == 0:
            return -1.0
        return max(-1.0, 1.0 - abs(words - self.target_words) / self.target_words)
