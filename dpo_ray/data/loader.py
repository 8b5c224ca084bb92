"""The order of the data and the batches of each step.

The position in the data is the number of pairs consumed, in a permutation fixed by (seed, epoch): independent of ranks,
rows and micro-batches, so a run continues with the next unseen pair on any number of workers.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from dpo_ray.data.assignment import attended, balance_micro_batches
from dpo_ray.data.packing import Layout, PackedRow, build_row, row_tokens
from dpo_ray.types import TokenPair


class PairSource(Protocol):
    """Pairs by index: a PairStore, or the pairs of a round."""

    @property
    def lengths(self) -> np.ndarray:
        """(n, 3) tokens of prompt, chosen and rejected: what is needed to plan a step without reading its pairs."""
        ...

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> TokenPair: ...
    def tokens(self, index: int, /) -> np.ndarray:
        """Token ids of prompt, chosen and rejected, one behind the other."""
        ...

    def name_of(self, index: int, /) -> str:
        """Where a person finds the pair."""
        ...


class PairList:
    """A PairSource of pairs in memory.

    Args:
        pairs: the pairs.
        name: of them all, for messages.
    """

    def __init__(self, pairs: Sequence[TokenPair], name: str = "pairs") -> None:
        self.pairs, self.name = tuple(pairs), name
        lengths = [(len(pair.prompt), len(pair.chosen), len(pair.rejected)) for pair in self.pairs]
        self.lengths = np.array(lengths, np.int64).reshape(-1, 3)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> TokenPair:
        return self.pairs[index]

    def tokens(self, index: int) -> np.ndarray:
        """Token ids of prompt, chosen and rejected, one behind the other."""
        pair = self.pairs[index]
        return np.array(pair.prompt + pair.chosen + pair.rejected, np.int32)

    def name_of(self, index: int) -> str:
        """The list's name and the position in it."""
        return f"{self.name}[{index}]"


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What one rank runs at once."""

    pairs: tuple[int, ...]
    """Indices into the pair source, in the order of the row's sequences."""
    row: PackedRow


@dataclass(frozen=True, slots=True)
class StepBatch:
    """One optimizer step, as one rank sees it."""

    micro_batches: tuple[MicroBatch, ...]
    """This rank's share; every rank has equally many."""
    pairs: tuple[int, ...]
    """Indices of all pairs of the step, over all ranks."""
    tokens: int
    """Real tokens of the step over all ranks; a shared prompt counts once."""
    epoch: float
    """Passes over the data completed when the step is done."""
    idle: float
    """Share of the ranks' time spent waiting for a rank with more to do, as planned."""


@dataclass(frozen=True, slots=True)
class BatchShape:
    """How a step is cut for one rank."""

    share: int
    """Which share of the pairs is this rank's."""
    shares: int
    tokens_per_micro_batch: int
    attention_cost: float
    """Time of one attended pair of tokens over that of one token's matrix products."""
    layout: Layout = "shared"


def micro_batches(
    source: PairSource, pairs: Sequence[int], shape: BatchShape
) -> tuple[tuple[MicroBatch, ...], np.ndarray, float]:
    """This rank's micro-batches of ``pairs``, the lengths of all of them (as in PairSource), and the idle share."""
    lengths = np.asarray(source.lengths[list(pairs)])
    tokens = row_tokens(lengths, shape.layout)
    dealt = balance_micro_batches(
        tokens,
        tokens + shape.attention_cost * attended(lengths),
        ranks=shape.shares,
        tokens_per_micro_batch=shape.tokens_per_micro_batch,
    )
    mine = (tuple(pairs[i] for i in batch) for batch in dealt.shares[shape.share])
    batches = tuple(MicroBatch(batch, build_row([source[i] for i in batch], shape.layout)) for batch in mine)
    return batches, lengths, dealt.idle


@dataclass(frozen=True, slots=True)
class Mixture:
    """How often the pairs of each source are seen in an epoch."""

    sizes: tuple[int, ...]
    """Pairs of each source; a source's pairs stand together, in the order of the sources."""
    weights: tuple[float, ...]
    """Passes over each source in an epoch. 0.5 sees each pair in every other epoch."""

    def __len__(self) -> int:
        return sum(self._drawn())

    def _drawn(self) -> list[int]:
        return [round(weight * size) for size, weight in zip(self.sizes, self.weights, strict=True)]

    def pairs(self, *, seed: int, epoch: int, shuffle: bool) -> np.ndarray:
        """(len(self),) indices of the pairs of an epoch, source by source.

        Each source is an endless row of passes, each in an order of its own, of which an epoch takes the next piece:
        over the epochs all pairs of a source are seen equally often.
        """
        drawn, first = [np.zeros(0, np.int64)], 0
        for number, (size, count) in enumerate(zip(self.sizes, self._drawn(), strict=True)):
            start = epoch * count
            if count:
                passes = range(start // size, -(-(start + count) // size))
                # Whole passes need no order of their own: the epoch's is drawn over all of them.
                drawn_order = shuffle and count % size
                orders = [
                    np.random.default_rng([seed, number, n]).permutation(size) if drawn_order else np.arange(size)
                    for n in passes
                ]
                drawn.append(first + np.concatenate(orders)[start % size :][:count])
            first += size
        return np.concatenate(drawn)


@functools.lru_cache(maxsize=2)
def epoch_order(mixture: Mixture, *, seed: int, epoch: int, shuffle: bool) -> np.ndarray:
    """(len(mixture),) indices of the pairs of one epoch, in the order they are trained on."""
    pairs = mixture.pairs(seed=seed, epoch=epoch, shuffle=shuffle)
    return np.random.default_rng([seed, epoch]).permutation(pairs) if shuffle else pairs


class PairLoader:
    """Batches of a pair source from a position on, without end.

    A step never spans two epochs: the last step of an epoch takes what is left.
    """

    def __init__(
        self,
        source: PairSource,
        shape: BatchShape,
        *,
        pairs_per_step: int,
        seed: int,
        shuffle: bool,
        mixture: Mixture | None = None,
        consumed: int = 0,
    ) -> None:
        """Start after ``consumed`` pairs; without a mixture an epoch is one pass over the source."""
        self.mixture = mixture or Mixture((len(source),), (1.0,))
        if not len(self.mixture):
            raise ValueError("there are no pairs to train on")
        self.source, self.shape, self.pairs_per_step = source, shape, pairs_per_step
        self.seed, self.shuffle = seed, shuffle
        self.consumed = consumed
        """Pairs handed out so far, over all ranks and epochs."""

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass."""
        return -(-len(self.mixture) // self.pairs_per_step)

    def __iter__(self) -> Iterator[StepBatch]:
        return self

    def __next__(self) -> StepBatch:
        epoch, start = divmod(self.consumed, len(self.mixture))
        order = epoch_order(self.mixture, seed=self.seed, epoch=epoch, shuffle=self.shuffle)
        pairs = tuple(int(i) for i in order[start : start + self.pairs_per_step])
        self.consumed += len(pairs)
        micros, lengths, idle = micro_batches(self.source, pairs, self.shape)
        return StepBatch(micros, pairs, int(lengths.sum()), self.consumed / len(self.mixture), idle)
