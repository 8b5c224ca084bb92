"""The pairs that a round trains on: its new ones, fixed ones mixed in, and those of earlier rounds."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from dpo_ray.config.rounds import OnlineConfig
from dpo_ray.data.joined import JoinedPairs
from dpo_ray.data.loader import PairSource
from dpo_ray.rollout.ledger import RoundData

MIXED, REPLAYED = 1, 2
"""Streams of random numbers beside those of the prompts."""


@dataclass(frozen=True, slots=True)
class Sources:
    """The sources of a run's pairs beside its new ones.

    Attributes:
        fixed: pairs of data.train; None without ``online.source.mix``.
        read: an earlier round.
        seed: ``run.seed``.
    """

    online: OnlineConfig
    fixed: PairSource | None
    read: Callable[[int], RoundData]
    seed: int

    def add_to(self, data: RoundData) -> RoundData:
        """The round with the pairs of the other sources after its own; a pure function of the round and the seed.

        Their number follows from ``online.prompts_per_round``, not from how many groups gave a pair.
        """
        source = self.online.source
        new = self.online.prompts_per_round
        parts = [(data.pairs, np.arange(len(data.pairs)))]
        known = [_known(data)]
        if self.fixed is not None and source.mix:
            indices = self._next_fixed(data.index, source.pairs_of(source.mix, new))
            parts.append((self.fixed, indices))
            known.append(np.full((len(indices), 2), np.nan))
        if source.replay:
            for earlier, indices in self._drawn(data.index, source.pairs_of(source.replay, new)):
                parts.append((earlier.pairs, indices))
                known.append(_known(earlier)[indices])
        counts = {"rollout/new_pairs": len(data.pairs), "rollout/added_pairs": sum(len(i) for _, i in parts[1:])}
        if len(parts) == 1:
            return data
        reference = None if data.reference is None else np.concatenate(known)
        return replace(data, pairs=JoinedPairs(parts), reference=reference, metrics={**data.metrics, **counts})

    def _next_fixed(self, round: int, count: int) -> np.ndarray:
        """The next ``count`` fixed pairs of endless passes, each in an order of its own."""
        assert self.fixed is not None
        size, start = len(self.fixed), round * count
        passes = range(start // size, (start + count - 1) // size + 1)
        orders = [np.random.default_rng([self.seed, MIXED, epoch]).permutation(size) for epoch in passes]
        first = start - passes.start * size
        return np.concatenate(orders)[first : first + count]

    def _drawn(self, round: int, count: int) -> list[tuple[RoundData, np.ndarray]]:
        """Up to ``count`` different pairs of the rounds before, drawn evenly from all of their pairs."""
        first = max(0, round - self.online.source.replay_rounds)
        rounds = [self.read(index) for index in range(first, round)]
        ends = np.cumsum([0, *(len(earlier.pairs) for earlier in rounds)])
        count = min(count, int(ends[-1]))
        drawn = np.sort(np.random.default_rng([self.seed, REPLAYED, round]).permutation(int(ends[-1]))[:count])
        return [
            (earlier, drawn[(drawn >= start) & (drawn < end)] - start)
            for earlier, start, end in zip(rounds, ends, ends[1:], strict=False)
        ]


def _known(data: RoundData) -> np.ndarray:
    """(n, 2) reference log-probabilities of a round's pairs, nats; NaN where they are not known."""
    return np.full((len(data.pairs), 2), np.nan) if data.reference is None else data.reference
