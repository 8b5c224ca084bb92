"""Who computes what: items dealt to ranks and micro-batches by cost.

B = pairs
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dpo_ray.data.packing import Span, label_sources, token_limits

PIECES = 4
"""Pieces of a row that each of its ranks gets."""


@dataclass(frozen=True, slots=True)
class RowSplit:
    """A row cut into pieces of equal length, and the ranks that have them.

    The row is lengthened at its end by a span of ``padding`` tokens that see only themselves and predict nothing.
    """

    spans: tuple[Span, ...]
    """Of the lengthened row."""
    padding: int
    piece: int
    """Tokens of a piece."""
    pieces: tuple[tuple[int, ...], ...]
    """For each rank the numbers of its pieces, ascending; equally many for all."""

    def stretches(self, rank: int) -> tuple[slice, ...]:
        """A rank's pieces, as slices of the row; neighbours are one slice."""
        found: list[slice] = []
        for number in self.pieces[rank]:
            start, stop = number * self.piece, (number + 1) * self.piece
            if found and found[-1].stop == start:
                start = found.pop().start
            found.append(slice(start, stop))
        return tuple(found)

    def tokens(self, rank: int) -> np.ndarray:
        """(T / ranks,) positions in the row of a rank's tokens, ascending."""
        return (np.array(self.pieces[rank])[:, None] * self.piece + np.arange(self.piece)).ravel()

    @property
    def sources(self) -> np.ndarray:
        """(N,) position in the row that predicts each label."""
        return label_sources(self.spans)

    def labels(self, rank: int) -> np.ndarray:
        """(n,) which of the row's labels a rank predicts: those whose source it has, in the order of the row."""
        return np.flatnonzero(np.isin(self.sources // self.piece, self.pieces[rank]))


def shard_row(spans: Sequence[Span], ranks: int) -> RowSplit:
    """Share the tokens of one row out to ranks, equally many each, and about as much attention.

    Pieces go out largest first, forwards and backwards in turn. So one causal stretch is cut as is usual, early pieces
    to the ranks that have late ones (arXiv:2407.21783, section 3.3.2), and in any row two ranks differ by less than one
    piece has.
    """
    padding = -sum(map(sum, spans)) % (PIECES * ranks)
    padded = (*spans, Span(padding, 0, 0)) if padding else tuple(spans)
    costs = token_limits(padded).seen.reshape(PIECES * ranks, -1).sum(1)
    turns = np.argsort(-costs, kind="stable").reshape(PIECES, ranks)
    turns[1::2] = turns[1::2, ::-1]
    piece = sum(map(sum, padded)) // costs.size
    return RowSplit(padded, padding, piece, tuple(tuple(sorted(of_rank)) for of_rank in turns.T.tolist()))


def attended(lengths: np.ndarray) -> np.ndarray:
    """(B,) pairs of tokens of which one attends to the other, in the shared layout; lengths as in ``row_tokens``."""
    prompt, chosen, rejected = lengths.astype(np.float64).T
    return prompt**2 / 2 + sum(c * (prompt + c / 2) for c in (chosen, rejected))


@dataclass(frozen=True, slots=True)
class Assignment:
    """Who computes what."""

    shares: tuple[tuple[tuple[int, ...], ...], ...]
    """For each rank its micro-batches, each a tuple of item positions; equally many for every rank, some empty."""
    idle: float
    """Share of the ranks' time that is spent waiting for the one with the largest cost of the same turn."""


def balance_micro_batches(
    tokens: np.ndarray, costs: np.ndarray, *, ranks: int, tokens_per_micro_batch: int
) -> Assignment:
    """Share items out to ranks: equally many micro-batches each, near-equal cost at every turn.

    Every rank gets the same number of micro-batches, because each is a collective: as few as the token limit allows.
    Items go, largest first, to the micro-batch of least cost that has room.

    Args:
        tokens: (B,) tokens of each item.
        costs: (B,) time of each item, in any unit.
        ranks: ranks that share the work.
        tokens_per_micro_batch: most tokens of one micro-batch; a longer item runs alone.
    """
    largest_first = np.argsort(-costs, kind="stable").tolist()
    # An item that runs alone fills one micro-batch, however long it is.
    turns = max(1, -(-int(np.minimum(tokens, tokens_per_micro_batch).sum()) // (ranks * tokens_per_micro_batch)))
    while (filled := _fill_micro_batches(largest_first, tokens, costs, turns * ranks, tokens_per_micro_batch)) is None:
        turns += 1
    filled.sort(key=lambda batch: -batch[0])
    shares: list[list[tuple[int, ...]]] = [[] for _ in range(ranks)]
    waited = total = 0.0
    for t in range(turns):
        turn = filled[t * ranks : (t + 1) * ranks]
        waited += ranks * turn[0][0] - sum(cost for cost, _ in turn)
        total += ranks * turn[0][0]
        # Every other turn is dealt backwards: the rank with the largest share of one has the smallest of the next.
        for share, (_, items) in zip(shares, turn if t % 2 == 0 else reversed(turn), strict=True):
            share.append(items)
    return Assignment(tuple(map(tuple, shares)), waited / total if total else 0.0)


def _fill_micro_batches(
    items: Sequence[int], tokens: np.ndarray, costs: np.ndarray, batches: int, limit: int
) -> list[tuple[float, tuple[int, ...]]] | None:
    """Cost and items of each of ``batches`` micro-batches; None when the items do not fit into so many."""
    # cost, number, tokens, items: the heap's first is the cheapest
    heap: list[tuple[float, int, int, list[int]]] = [(0.0, n, 0, []) for n in range(batches)]
    for item in items:
        size, passed = int(tokens[item]), []
        while heap and heap[0][2] and heap[0][2] + size > limit:
            passed.append(heapq.heappop(heap))
        if not heap:
            return None
        cost, n, used, held = heapq.heappop(heap)
        held.append(item)
        for batch in ((cost + float(costs[item]), n, used + size, held), *passed):
            heapq.heappush(heap, batch)
    return [(cost, tuple(sorted(held))) for cost, _, _, held in heap]
