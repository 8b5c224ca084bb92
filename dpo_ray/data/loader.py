"""The order of the data and the batches of each step.

The position in the data is the number of pairs consumed of a permutation that depends on (seed, epoch) only, so a run
resumes with the next unseen pair on any number of workers.
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
        """(n, 3) tokens of prompt, chosen and rejected; enough to plan a step without reading its pairs."""
        ...

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> TokenPair: ...
    def tokens(self, index: int, /) -> np.ndarray:
        """Concatenated token ids of prompt, chosen and rejected."""
        ...

    def name_of(self, index: int, /) -> str:
        """Source and position of the pair, for messages."""
        ...


class PairList:
    """A PairSource of pairs in memory; ``name`` is for messages."""

    def __init__(self, pairs: Sequence[TokenPair], name: str = "pairs") -> None:
        self.pairs, self.name = tuple(pairs), name
        lengths = [(len(pair.prompt), len(pair.chosen), len(pair.rejected)) for pair in self.pairs]
        self.lengths = np.array(lengths, np.int64).reshape(-1, 3)

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


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Pairs of one forward and backward pass on one rank."""

    pairs: tuple[int, ...]
    """Indices into the pair source, in the order of the row."""
    row: PackedRow


@dataclass(frozen=True, slots=True)
class StepBatch:
    """The pairs of one optimizer step, with the micro-batches of one rank."""

    micro_batches: tuple[MicroBatch, ...]
    """Micro-batches of this rank; the same number on every rank."""
    pairs: tuple[int, ...]
    """Indices of the pairs of all ranks."""
    tokens: int
    """Tokens of all ranks without padding; a shared prompt counts once."""
    epoch: float
    """Passes over the data completed after the step."""
    idle: float
    """Expected fraction of the ranks' time spent waiting for slower ranks."""


@dataclass(frozen=True, slots=True)
class BatchShape:
    """Parameters of the split of a step into micro-batches, on one rank."""

    dp_rank: int
    dp_size: int
    tokens_per_micro_batch: int
    attention_cost: float
    """Time of one query-key pair of the attention relative to one token's matrix products."""
    layout: Layout = "shared"


def micro_batches(
    source: PairSource, pairs: Sequence[int], shape: BatchShape
) -> tuple[tuple[MicroBatch, ...], np.ndarray, float]:
    """This rank's micro-batches of ``pairs``, the (n, 3) lengths of all pairs, and the expected idle fraction."""
    lengths = np.asarray(source.lengths[list(pairs)])
    tokens = row_tokens(lengths, shape.layout)
    assignment = balance_micro_batches(
        tokens,
        tokens + shape.attention_cost * attended(lengths),
        ranks=shape.dp_size,
        tokens_per_micro_batch=shape.tokens_per_micro_batch,
    )
    indices = (tuple(pairs[i] for i in items) for items in assignment.micro_batches[shape.dp_rank])
    batches = tuple(MicroBatch(batch, build_row([source[i] for i in batch], shape.layout)) for batch in indices)
    return batches, lengths, assignment.idle


@dataclass(frozen=True, slots=True)
class Mixture:
    """Sizes and weights of the sources of an epoch."""

    sizes: tuple[int, ...]
    """Number of pairs of each source; pairs are numbered source by source."""
    weights: tuple[float, ...]
    """Passes over each source per epoch; with 0.5 each pair is seen every second epoch."""

    def __len__(self) -> int:
        return sum(self._counts())

    def _counts(self) -> list[int]:
        return [round(weight * size) for size, weight in zip(self.sizes, self.weights, strict=True)]

    def pairs(self, *, seed: int, epoch: int, shuffle: bool) -> np.ndarray:
        """(len(self),) indices of the pairs of an epoch, source by source.

        Each source is an infinite stream of shuffled passes; an epoch takes the next ``weight * size`` pairs. Over
        several epochs all pairs of a source are seen equally often.
        """
        drawn, first = [np.zeros(0, np.int64)], 0
        for number, (size, count) in enumerate(zip(self.sizes, self._counts(), strict=True)):
            start = epoch * count
            if count:
                passes = range(start // size, -(-(start + count) // size))
                # Whole passes are shuffled with the epoch, by epoch_order.
                shuffle_pass = shuffle and count % size
                orders = [
                    np.random.default_rng([seed, number, n]).permutation(size) if shuffle_pass else np.arange(size)
                    for n in passes
                ]
                drawn.append(first + np.concatenate(orders)[start % size :][:count])
            first += size
        return np.concatenate(drawn)


@functools.lru_cache(maxsize=2)
def epoch_order(mixture: Mixture, *, seed: int, epoch: int, shuffle: bool) -> np.ndarray:
    """(len(mixture),) indices of the pairs of one epoch, in training order."""
    pairs = mixture.pairs(seed=seed, epoch=epoch, shuffle=shuffle)
    return np.random.default_rng([seed, epoch]).permutation(pairs) if shuffle else pairs


class PairLoader:
    """Infinite iterator over the steps of a pair source, from a given position.

    A step never spans two epochs; the last step of an epoch has the remaining pairs.
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
        """Start after ``consumed`` pairs; without a mixture, an epoch is one pass over the source."""
        self.mixture = mixture or Mixture((len(source),), (1.0,))
        if not len(self.mixture):
            raise ValueError("there are no pairs to train on")
        self.source, self.shape, self.pairs_per_step = source, shape, pairs_per_step
        self.seed, self.shuffle = seed, shuffle
        self.consumed = consumed
        """Pairs returned so far, over all ranks and epochs."""

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps per epoch."""
        return -(-len(self.mixture) // self.pairs_per_step)

    def steps_until(self, consumed: int) -> int:
        """Number of steps from here until at least ``consumed`` pairs have been returned."""
        size, step = len(self.mixture), self.pairs_per_step
        (epoch, start), (last_epoch, end) = divmod(self.consumed, size), divmod(consumed, size)
        if epoch == last_epoch:
            return max(0, -((start - end) // step))
        return max(0, -((start - size) // step) + (last_epoch - epoch - 1) * self.steps_per_epoch - (-end // step))

    def epochs_after(self, steps: int = 0) -> float:
        """Passes over the data after ``steps`` further steps; each step counts as an equal part of an epoch."""
        epoch, start = divmod(self.consumed, len(self.mixture))
        whole = epoch * self.steps_per_epoch + steps
        return (whole + start / self.pairs_per_step) / self.steps_per_epoch

    def __iter__(self) -> Iterator[StepBatch]:
        return self

    def __next__(self) -> StepBatch:
        epoch, start = divmod(self.consumed, len(self.mixture))
        order = epoch_order(self.mixture, seed=self.seed, epoch=epoch, shuffle=self.shuffle)
        pairs = tuple(int(i) for i in order[start : start + self.pairs_per_step])
        self.consumed += len(pairs)
        micros, lengths, idle = micro_batches(self.source, pairs, self.shape)
        return StepBatch(micros, pairs, int(lengths.sum()), self.consumed / len(self.mixture), idle)
