"""Pairs of several sources as one."""

from collections.abc import Sequence

import numpy as np

from dpo_ray.data.loader import PairSource
from dpo_ray.types import TokenPair


class JoinedPairs:
    """Selected pairs of several sources, one source after the other: a ``PairSource``.

    Args:
        parts: sources, each with the indices of its selected pairs.
    """

    def __init__(self, parts: Sequence[tuple[PairSource, np.ndarray]]) -> None:
        self._sources = [source for source, _ in parts]
        self._part = np.concatenate([np.full(len(indices), n) for n, (_, indices) in enumerate(parts)]).astype(int)
        self._index = np.concatenate([indices for _, indices in parts]).astype(int)
        self.lengths = np.concatenate([np.asarray(source.lengths)[indices] for source, indices in parts])
        members = [_members(source, indices) for source, indices in parts]
        self.members = None if all(source.members is None for source in self._sources) else _apart(members)

    @property
    def gaps(self) -> np.ndarray | None:
        """See ``PairSource.gaps``."""
        gaps = [source.gaps for source in self._sources]
        if all(of_source is None for of_source in gaps):
            return None
        joined = np.full(len(self), np.nan)
        for part, of_source in enumerate(gaps):
            if of_source is not None:
                joined[self._part == part] = of_source[self._index[self._part == part]]
        return joined

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> TokenPair:
        source, at = self._find(index)
        return source[at]

    def tokens(self, index: int) -> np.ndarray:
        """Concatenated token ids of prompt, chosen and rejected."""
        source, at = self._find(index)
        return source.tokens(at)

    def name_of(self, index: int) -> str:
        """Source and position of the pair there."""
        source, at = self._find(index)
        return source.name_of(at)

    def _find(self, index: int) -> tuple[PairSource, int]:
        return self._sources[self._part[index]], int(self._index[index])


def _members(source: PairSource, indices: np.ndarray) -> np.ndarray:
    """``PairSource.members`` of the selected pairs; without any, each has a prompt of its own."""
    if source.members is None:
        return np.column_stack((indices, np.zeros_like(indices), np.ones_like(indices)))
    return np.asarray(source.members)[indices]


def _apart(members: Sequence[np.ndarray]) -> np.ndarray:
    """Members whose prompts differ between sources."""
    numbered, first = [], 0
    for part in members:
        prompts, numbers = np.unique(part[:, 0], return_inverse=True)
        numbered.append(np.column_stack((numbers + first, part[:, 1:])))
        first += len(prompts)
    return np.concatenate(numbered)
