"""Pairs in memory, for code that reads them by index."""

from collections.abc import Sequence

import numpy as np

from dpo_ray.types import TokenPair


class PairList:
    """A PairSource of pairs in memory; ``name`` is for messages, ``gaps`` are those of ``PairSource``."""

    def __init__(self, pairs: Sequence[TokenPair], name: str = "pairs", gaps: Sequence[float] | None = None) -> None:
        self.pairs, self.name = tuple(pairs), name
        self.gaps = None if gaps is None else np.array(gaps, np.float64)
        lengths = [(len(pair.prompt), len(pair.chosen), len(pair.rejected)) for pair in self.pairs]
        self.lengths = np.array(lengths, np.int64).reshape(-1, 3)
        self.members = _members(self.pairs)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> TokenPair:
        return self.pairs[index]

    def tokens(self, index: int) -> np.ndarray:
        """Concatenated token ids of prompt, chosen and rejected."""
        pair = self.pairs[index]
        return np.array(pair.prompt + pair.chosen + pair.rejected, np.int32)

    def name_of(self, index: int) -> str:
        """Name of the list and position of the pair."""
        return f"{self.name}[{index}]"


def _members(pairs: Sequence[TokenPair]) -> np.ndarray | None:
    numbers: dict[tuple[int, ...], int] = {}  # of prompts and of completions
    number = lambda ids: numbers.setdefault(ids, len(numbers))  # noqa: E731
    members = np.array([list(map(number, (p.prompt, p.chosen, p.rejected))) for p in pairs], np.int64).reshape(-1, 3)
    return members if len(np.unique(members[:, 0])) < len(pairs) else None
