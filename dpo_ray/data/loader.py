"""The order of the data and the batches of each step.

The position in the data is the number of pairs consumed, in a permutation fixed by (seed, epoch): independent of ranks,
rows and micro-batches, so a run continues with the next unseen pair on any number of workers.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from dpo_ray.data.packing import Layout, Rows, build_rows, deal
from dpo_ray.types import TokenPair


class PairSource(Protocol):
    """Pairs by index: a PairStore, or the pairs of a round."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> TokenPair: ...


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What one rank runs at once."""

    pairs: tuple[int, ...]
    """Indices into the pair source, in the order of the rows' sequences."""
    rows: Rows


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


@dataclass(frozen=True, slots=True)
class BatchShape:
    """How a step is cut for one rank."""

    rank: int
    ranks: int
    tokens_per_micro_batch: int
    layout: Layout = "shared"


def micro_batches(source: PairSource, pairs: Sequence[int], shape: BatchShape) -> tuple[MicroBatch, ...]:
    """This rank's micro-batches of ``pairs``."""
    chosen = [source[i] for i in pairs]
    copies = 1 if shape.layout == "shared" else 2
    budget = max(1, shape.tokens_per_micro_batch // copies)
    lengths = np.array([_row_length(pair, shape.layout) for pair in chosen], np.int64)
    mine = deal(lengths, ranks=shape.ranks, tokens_per_micro_batch=budget)[shape.rank]
    return tuple(
        MicroBatch(tuple(pairs[i] for i in batch), build_rows([chosen[i] for i in batch], shape.layout))
        for batch in mine
    )


def _row_length(pair: TokenPair, layout: Layout) -> int:
    if layout == "shared":
        return pair.tokens
    return len(pair.prompt) + max(len(pair.chosen), len(pair.rejected))


@functools.lru_cache(maxsize=2)
def epoch_order(pairs: int, *, seed: int, epoch: int, shuffle: bool) -> np.ndarray:
    """(pairs,) the order of one epoch."""
    if not shuffle:
        return np.arange(pairs)
    return np.random.default_rng([seed, epoch]).permutation(pairs)


class PairLoader:
    """Batches of a pair source from a position on, without end.

    A step never spans two epochs: the last step of an epoch takes what is left.
    """

    def __init__(
        self, source: PairSource, shape: BatchShape, *, pairs_per_step: int, seed: int, shuffle: bool, consumed: int = 0
    ) -> None:
        """Start after ``consumed`` pairs."""
        if not len(source):
            raise ValueError("there are no pairs to train on")
        self.source, self.shape, self.pairs_per_step = source, shape, pairs_per_step
        self.seed, self.shuffle = seed, shuffle
        self.consumed = consumed
        """Pairs handed out so far, over all ranks and epochs."""

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass."""
        return -(-len(self.source) // self.pairs_per_step)

    def __iter__(self) -> Iterator[StepBatch]:
        return self

    def __next__(self) -> StepBatch:
        epoch, start = divmod(self.consumed, len(self.source))
        order = epoch_order(len(self.source), seed=self.seed, epoch=epoch, shuffle=self.shuffle)
        pairs = tuple(int(i) for i in order[start : start + self.pairs_per_step])
        self.consumed += len(pairs)
        return StepBatch(
            micro_batches(self.source, pairs, self.shape),
            pairs,
            tokens=sum(self.source[i].tokens for i in pairs),
            epoch=self.consumed / len(self.source),
        )
