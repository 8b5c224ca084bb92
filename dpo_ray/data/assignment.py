"""Assignment of work to ranks: items to micro-batches by cost, and tokens of a row to context parallel ranks.

B = items, P = prompts
"""

import bisect
import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from dpo_ray.data.packing import Span, token_limits

PIECES = 4
"""Pieces of a row per rank."""


@dataclass(frozen=True, slots=True)
class RowSplit:
    """A row split into pieces of equal length, and the assignment of the pieces to ranks.

    The row is padded at its end with a span of ``padding`` tokens that attend only to themselves and have no labels.
    """

    spans: tuple[Span, ...]
    """Spans of the padded row."""
    padding: int
    positions: np.ndarray
    """(ranks, T / ranks) positions of each rank's tokens in the row, ascending."""

    def stretches(self, rank: int) -> tuple[slice, ...]:
        """The adjacent tokens of a rank as slices of the row."""
        tokens = self.positions[rank]
        runs = np.split(tokens, np.flatnonzero(np.diff(tokens) > 1) + 1)
        return tuple(slice(int(run[0]), int(run[-1]) + 1) for run in runs)

    def sources(self, scored: np.ndarray) -> np.ndarray:
        """(N,) position whose hidden state predicts each label.

        Args:
            scored: (C,) ``PackedRow.scored``, True for the completion tokens that carry loss.
        """
        return token_limits(self.spans).sources[scored]

    def labels(self, rank: int, scored: np.ndarray) -> np.ndarray:
        """(n,) indices of the labels that a rank predicts, because it holds their source; see ``sources``."""
        return np.flatnonzero(np.isin(self.sources(scored), self.positions[rank]))


def shard_row(spans: Sequence[Span], ranks: int) -> RowSplit:
    """Split the tokens of one row among ranks: the same number of tokens and about the same attention cost.

    Pieces are assigned by descending cost, in alternating direction. For a single causal span this is the usual split
    that pairs early with late pieces (arXiv:2407.21783, section 3.3.2); for any row, the attention of two ranks differs
    by less than one piece.
    """
    padding = -sum(map(sum, spans)) % (PIECES * ranks)
    padded = (*spans, Span.of(padding)) if padding else tuple(spans)
    limits = token_limits(padded)
    pieces = limits.here.reshape(PIECES * ranks, -1)  # (pieces, tokens per piece)
    costs = limits.seen.reshape(pieces.shape).sum(1)
    turns = np.argsort(-costs, kind="stable").reshape(PIECES, ranks)
    turns[1::2] = turns[1::2, ::-1]
    return RowSplit(padded, padding, pieces[np.sort(turns.T)].reshape(ranks, -1))


def attended(lengths: np.ndarray) -> np.ndarray:
    """(P,) query-key pairs of the attention in the shared layout; ``lengths`` as in ``row_tokens``."""
    prompt, *completions = lengths.astype(np.float64).T
    return prompt**2 / 2 + sum(c * (prompt + c / 2) for c in completions)


@dataclass(frozen=True, slots=True)
class Assignment:
    """Micro-batches of all ranks."""

    micro_batches: tuple[tuple[tuple[int, ...], ...], ...]
    """Item indices by rank and micro-batch; the same number of micro-batches for every rank, some possibly empty."""
    idle: float
    """Fraction of the ranks' time spent waiting for the most expensive micro-batch of the same turn."""


def balance_micro_batches(
    tokens: np.ndarray, costs: np.ndarray, *, ranks: int, tokens_per_micro_batch: int, rows: np.ndarray | None = None
) -> Assignment:
    """Assign items to micro-batches and ranks, with nearly equal cost over the ranks at every turn.

    Every rank gets the same number of micro-batches, because each runs collectives; as few as the token limit allows.
    Items are assigned by descending cost to the cheapest micro-batch with room; if they are padded, items of like
    length share a micro-batch.

    Args:
        tokens: (B,) tokens of each item.
        costs: (B,) time of each item, in any unit.
        tokens_per_micro_batch: maximum tokens of a micro-batch; a longer item forms its own.
        rows: (B,) sequences of each item, which are padded to the longest of the micro-batch, and the padding counts;
            None without padding.
    """
    fill = _fill_packed if rows is None else partial(_fill_padded, rows=rows)
    largest_first = np.argsort(-costs, kind="stable").tolist()
    # An item over the limit fills exactly one micro-batch.
    turns = max(1, -(-int(np.minimum(tokens, tokens_per_micro_batch).sum()) // (ranks * tokens_per_micro_batch)))
    while (filled := fill(largest_first, tokens, costs, turns * ranks, tokens_per_micro_batch)) is None:
        turns += 1
    filled.sort(key=lambda batch: -batch[0])
    by_rank: list[list[tuple[int, ...]]] = [[] for _ in range(ranks)]
    waited = total = 0.0
    for t in range(turns):
        turn = filled[t * ranks : (t + 1) * ranks]
        waited += ranks * turn[0][0] - sum(cost for cost, _ in turn)
        total += ranks * turn[0][0]
        # Alternate the direction: the rank with the most expensive micro-batch of a turn has the cheapest of the next.
        for batches, (_, items) in zip(by_rank, turn if t % 2 == 0 else reversed(turn), strict=True):
            batches.append(items)
    return Assignment(tuple(map(tuple, by_rank)), waited / total if total else 0.0)


def _fill_packed(
    items: Sequence[int], tokens: np.ndarray, costs: np.ndarray, batches: int, limit: int
) -> list[tuple[float, tuple[int, ...]]] | None:
    """Cost and items of each micro-batch; None if the items do not fit."""
    # (cost, index, tokens, items): the cheapest comes first
    heap: list[tuple[float, int, int, list[int]]] = [(0.0, n, 0, []) for n in range(batches)]
    for item in items:
        size, full = int(tokens[item]), []
        while heap and heap[0][2] and heap[0][2] + size > limit:
            full.append(heapq.heappop(heap))
        if not heap:
            return None
        cost, n, used, content = heapq.heappop(heap)
        content.append(item)
        for batch in ((cost + float(costs[item]), n, used + size, content), *full):
            heapq.heappush(heap, batch)
    return [(cost, tuple(sorted(content))) for cost, _, _, content in heap]


def _fill_padded(
    items: Sequence[int], tokens: np.ndarray, costs: np.ndarray, batches: int, limit: int, *, rows: np.ndarray
) -> list[tuple[float, tuple[int, ...]]] | None:
    """As ``_fill_packed``, for items that are padded; a lower limit is taken if it suffices, for more even costs."""
    longest = tokens // np.maximum(rows, 1)  # of an item's sequences, all of which are padded to it
    longest_first = sorted(items, key=lambda item: -longest[item])
    split = lambda limit: _split_padded(longest_first, longest, rows, limit)  # noqa: E731
    if len(split(limit)) > batches:
        return None
    limits = range(1, limit + 1)
    even = split(limits[bisect.bisect_left(limits, True, key=lambda limit: len(split(limit)) <= batches)])
    even += [()] * (batches - len(even))
    # In a padded batch each sequence costs as much as the longest.
    of_row = costs / np.maximum(rows, 1)
    return [
        (float(rows[list(batch)].sum() * of_row[list(batch)].max()) if batch else 0.0, tuple(sorted(batch)))
        for batch in even
    ]


def _split_padded(
    longest_first: Sequence[int], longest: np.ndarray, rows: np.ndarray, limit: int
) -> list[tuple[int, ...]]:
    """Consecutive items as micro-batches of at most ``limit`` tokens with padding, or of a single item."""
    batches: list[list[int]] = []
    width = height = 0
    for item in longest_first:
        if batches and (height + rows[item]) * width <= limit:
            batches[-1].append(item)
            height += int(rows[item])
        else:
            batches.append([item])
            width, height = int(longest[item]), int(rows[item])
    return [tuple(batch) for batch in batches]
