"""The order of the data and the batches of each step.

The position in the data is the number of pairs consumed of a permutation that depends on (seed, epoch) only, so a run
resumes with the next unseen pair on any number of workers.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, zip_longest
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

    @property
    def members(self) -> np.ndarray | None:
        """(n, 3) numbers of prompt, chosen and rejected; None if each pair has a prompt of its own.

        Pairs with the same first number have the same prompt, and completions of a prompt with the same number are the
        same.
        """
        ...

    @property
    def gaps(self) -> np.ndarray | None:
        """(n,) differences of the scores of chosen and rejected, NaN for a pair without scores; None without any."""
        ...

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> TokenPair: ...
    def tokens(self, index: int, /) -> np.ndarray:
        """Concatenated token ids of prompt, chosen and rejected."""
        ...

    def name_of(self, index: int, /) -> str:
        """Source and position of the pair, for messages."""
        ...


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
    source: PairSource, pairs: Sequence[int], shape: BatchShape, weights: np.ndarray | None = None
) -> tuple[tuple[MicroBatch, ...], int, float]:
    """This rank's micro-batches of ``pairs``, the tokens of all ranks, and the expected idle fraction.

    Pairs of one prompt that follow each other stay together.

    Args:
        weights: (len(pairs),) weight of each pair's loss; None is 1 for each.
    """
    items, lengths = _prompts(source, pairs)
    tokens = row_tokens(lengths, shape.layout)
    assignment = balance_micro_batches(
        tokens,
        tokens + shape.attention_cost * attended(lengths),
        ranks=shape.dp_size,
        tokens_per_micro_batch=shape.tokens_per_micro_batch,
        rows=(lengths[:, 1:] > 0).sum(1) if shape.layout == "padded" else None,
    )
    weight_of = dict.fromkeys(pairs, 1.0) if weights is None else dict(zip(pairs, weights.tolist(), strict=True))
    batches = []
    for batch in assignment.micro_batches[shape.dp_rank]:
        numbered = [(number, pair) for number in batch for pair in items[number]]
        row = build_row(
            [source[pair] for _, pair in numbered],
            shape.layout,
            [number for number, _ in numbered],
            [weight_of[pair] for _, pair in numbered],
        )
        batches.append(MicroBatch(tuple(pair for _, pair in numbered), row))
    return tuple(batches), int(lengths.sum()), assignment.idle


def _prompts(source: PairSource, pairs: Sequence[int]) -> tuple[list[tuple[int, ...]], np.ndarray]:
    """Pairs of each of P prompts, and (P, 1 + K) tokens of prompt and completions, filled up with zeros."""
    lengths = np.asarray(source.lengths[list(pairs)])
    if source.members is None or not len(pairs):
        return [(pair,) for pair in pairs], lengths
    members = np.asarray(source.members[list(pairs)])
    starts = np.flatnonzero(np.diff(members[:, 0], prepend=-1))
    items, rows = [], []
    for start, stop in pairwise([*starts.tolist(), len(pairs)]):
        of_prompt = slice(start, stop)
        completions = dict(zip(members[of_prompt, 1:].ravel(), lengths[of_prompt, 1:].ravel(), strict=True))
        items.append(tuple(pairs[of_prompt]))
        rows.append((lengths[start, 0], *completions.values()))
    return items, np.array(list(zip_longest(*rows, fillvalue=0))).T


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


def epoch_order(mixture: Mixture, *, seed: int, epoch: int, shuffle: bool) -> np.ndarray:
    """(len(mixture),) indices of the pairs of one epoch, in training order."""
    pairs = mixture.pairs(seed=seed, epoch=epoch, shuffle=shuffle)
    return np.random.default_rng([seed, epoch]).permutation(pairs) if shuffle else pairs


def group_by_prompt(order: np.ndarray, prompts: np.ndarray) -> np.ndarray:
    """Reorder pairs so that all pairs of a prompt follow its first one.

    Args:
        order: (m,) indices of pairs. Each repeat of a pair belongs to a further pass, which is grouped on its own.
        prompts: (n,) number of the prompt of each pair.

    Returns:
        (m,) the same indices, grouped.
    """
    by_pair = np.argsort(order, kind="stable")
    runs = np.flatnonzero(np.diff(order[by_pair], prepend=-1))
    occurrence = np.empty_like(order)
    occurrence[by_pair] = np.arange(len(order)) - runs.repeat(np.diff(runs, append=len(order)))
    of_pass = prompts[order] + occurrence * (prompts.max() + 1)
    _, first, place = np.unique(of_pass, return_index=True, return_inverse=True)
    return order[np.lexsort((order, first[place]))]


def checked_gaps(source: PairSource) -> np.ndarray:
    """(n,) ``source.gaps``.

    Raises:
        ValueError: a pair has no scores, or the rejected completion has the higher one.
    """
    gaps = np.full(len(source), np.nan) if source.gaps is None else np.asarray(source.gaps)
    if len(bad := np.flatnonzero(~((gaps >= 0) & (gaps < np.inf)))):
        gap = gaps[bad[0]]
        found = "has none" if np.isnan(gap) else f"has a gap of {gap:g}"
        raise ValueError(
            "loss.weighting: gap needs pairs with scores, the higher one for the chosen completion, and "
            f"{source.name_of(int(bad[0]))} {found}; set loss.weighting: none, or use other "
            "pairs (online.select picks those of rounds)"
        )
    return gaps


def gap_weights(gaps: np.ndarray) -> np.ndarray:
    """(B,) weight of each pair of a step: its gap divided by the mean gap, so that their mean is 1.

    Equal gaps, also of 0, give weights of 1.

    Args:
        gaps: (B,) from 0.
    """
    mean = gaps.mean()
    return gaps / mean if mean > 0 else np.ones_like(gaps)


class PairLoader:
    """Infinite iterator over the steps of a pair source, from a given position.

    A step never spans two epochs; the last step of an epoch has the remaining pairs. Pairs of one prompt follow each
    other, so that they share a row; those at the end of a step may be divided between it and the next.
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
        gaps: np.ndarray | None = None,
        consumed: int = 0,
    ) -> None:
        """Start after ``consumed`` pairs; without a mixture, an epoch is one pass over the source.

        Args:
            gaps: (n,) from 0; the pairs of each step are weighted by them, see ``gap_weights``. None: not weighted.

        Raises:
            ValueError: there are no pairs.
        """
        self.mixture = mixture or Mixture((len(source),), (1.0,))
        if not len(self.mixture):
            raise ValueError("there are no pairs to train on")
        self.source, self.shape, self.pairs_per_step = source, shape, pairs_per_step
        self.seed, self.shuffle = seed, shuffle
        self.gaps = gaps
        self.consumed = consumed
        """Pairs returned so far, over all ranks and epochs."""
        self._of_epoch: tuple[int, np.ndarray] | None = None

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
        pairs = tuple(self._order(epoch)[start : start + self.pairs_per_step].tolist())
        self.consumed += len(pairs)
        weights = None if self.gaps is None else gap_weights(self.gaps[list(pairs)])
        micros, tokens, idle = micro_batches(self.source, pairs, self.shape, weights)
        return StepBatch(micros, pairs, tokens, self.consumed / len(self.mixture), idle)

    def _order(self, epoch: int) -> np.ndarray:
        if self._of_epoch is None or self._of_epoch[0] != epoch:
            order = epoch_order(self.mixture, seed=self.seed, epoch=epoch, shuffle=self.shuffle)
            members = self.source.members
            self._of_epoch = epoch, order if members is None else group_by_prompt(order, np.asarray(members[:, 0]))
        return self._of_epoch[1]
