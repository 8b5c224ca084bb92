"""From pairs to packed rows: the layouts of the training step, and who computes what.

A micro-batch is one row without padding. In it a pair is a span, prompt | chosen | rejected: both completions attend to
the prompt and to themselves, and both restart their positions after it, so the prompt runs once. The plain layout, each
completion in a span of its own behind its own copy of the prompt, is the oracle that tests hold the shared one against.

T = tokens of the row, N = completion tokens, B = pairs, S = 2B sequences
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dpo_ray.types import TokenPair, TokenSample

Layout = Literal["shared", "plain"]


class Span(NamedTuple):
    """A stretch of a row that attends to itself only, in tokens."""

    prompt: int
    first: int
    """A completion; sees the prompt and itself."""
    second: int
    """Another completion of the same prompt; sees the prompt and itself. 0 where there is none."""


@dataclass(frozen=True, slots=True)
class PackedRow:
    """One micro-batch as the scorer takes it."""

    input_ids: Tensor
    """(1, T) int64."""
    position_ids: Tensor
    """(1, T) int64; both completions of a span continue from the end of its prompt."""
    spans: tuple[Span, ...]
    """How the T tokens are divided, from the left."""
    source: Tensor
    """(N,) position in the row whose hidden state predicts the label."""
    labels: Tensor
    """(N,) completion tokens."""
    sequence: Tensor
    """(N,) index in [0, S): the pair's chosen is 2i, its rejected 2i + 1."""
    lengths: Tensor
    """(S,) completion lengths in tokens."""

    @property
    def pair_tokens(self) -> tuple[int, ...]:
        """(B,) completion tokens of each pair, known without asking the device."""
        completions = [tokens for span in self.spans for tokens in (span.first, span.second) if tokens]
        return tuple(map(sum, zip(completions[0::2], completions[1::2], strict=True)))

    def to(self, device: torch.device) -> "PackedRow":
        """The same row on ``device``."""
        tensors = (getattr(self, name) for name in self.__slots__ if name != "spans")
        input_ids, position_ids, *rest = (sent(tensor, device) for tensor in tensors)
        return PackedRow(input_ids, position_ids, self.spans, *rest)


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on ``device``; to a GPU from pinned memory, so that the host need not wait for its work."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def attention_mask(row: PackedRow) -> Tensor:
    """Who attends to whom: earlier tokens of the same span, in its prompt or in the same completion.

    Returns:
        (1, 1, T, T) bool.
    """
    device = row.input_ids.device
    lengths = torch.tensor(row.spans, device=device).flatten()
    part = torch.arange(lengths.numel(), device=device).repeat_interleave(lengths)  # (T,) 3 parts a span
    same_span = part[:, None] // 3 == part[None, :] // 3  # (T, T)
    visible = (part[None, :] % 3 == 0) | (part[:, None] == part[None, :])
    return (same_span & visible).tril()[None, None]


def build_row(pairs: Sequence[TokenPair], layout: Layout) -> PackedRow:
    """Lay pairs out as one row.

    No pairs give a row of a single token without labels: a rank without work still takes part in every collective.

    Args:
        pairs: B pairs.
        layout: ``shared``: a span a pair. ``plain``: two spans a pair.
    """
    completions = [[pair.chosen, pair.rejected] for pair in pairs]
    prompts = [pair.prompt for pair in pairs]
    if layout == "plain":
        prompts = [prompt for prompt in prompts for _ in range(2)]
        completions = [[completion] for both in completions for completion in both]
    return _lay_out(prompts, completions)


def build_sample_row(samples: Sequence[TokenSample]) -> PackedRow:
    """A row of single completions; sample i is sequence i."""
    return _lay_out([s.prompt for s in samples], [[s.completion] for s in samples])


def _lay_out(prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[Sequence[int]]]) -> PackedRow:
    spans: list[Span] = []
    tokens: list[Sequence[int]] = []
    positions: list[np.ndarray] = []
    labels: list[Sequence[int]] = []
    lengths: list[int] = []
    for prompt, both in zip(prompts, completions, strict=True):
        tokens.append(prompt)
        positions.append(np.arange(len(prompt)))
        for completion in both:
            count = len(completion)
            tokens.append(completion)
            positions.append(np.arange(len(prompt), len(prompt) + count))
            labels.append(completion)
            lengths.append(count)
        spans.append(Span(len(prompt), len(both[0]), len(both[1]) if len(both) > 1 else 0))
    if not spans:
        spans.append(Span(1, 0, 0))
        tokens.append((0,))
        positions.append(np.zeros(1))

    def flat(parts: Sequence[Sequence[int] | np.ndarray]) -> Tensor:
        return torch.from_numpy(np.concatenate([np.asarray(p, np.int64) for p in parts] or [np.zeros(0, np.int64)]))

    sequence = np.repeat(np.arange(len(lengths)), lengths) if lengths else np.zeros(0, np.int64)
    return PackedRow(
        flat(tokens)[None], flat(positions)[None], tuple(spans),
        torch.from_numpy(label_sources(spans)), flat(labels), torch.from_numpy(sequence),
        torch.tensor(lengths, dtype=torch.int64),
    )  # fmt: skip


def label_sources(spans: Sequence[Span]) -> np.ndarray:
    """(N,) position in a row of ``spans`` that predicts each label: the last prompt token the first of completions."""
    sources, start = [np.zeros(0, np.int64)], 0
    for span in spans:
        prompt_end = at = start + span.prompt
        for count in (span.first, span.second):
            if count:
                sources += [np.array([prompt_end - 1]), np.arange(at, at + count - 1)]
                at += count
        start = at
    return np.concatenate(sources)


class Limits(NamedTuple):
    """What tokens see of the tokens up to themselves: from ``span`` to ``prompt_end``, and from ``part`` on."""

    here: np.ndarray
    """(T,) where in the row the token is."""
    span: np.ndarray
    """(T,) first token of its span."""
    prompt_end: np.ndarray
    """(T,) first token behind its span's prompt."""
    part: np.ndarray
    """(T,) first token of its own prompt or completion."""

    def of(self, tokens: np.ndarray) -> "Limits":
        """Those of some of the tokens."""
        return Limits(*(limit[tokens] for limit in self))

    @property
    def seen(self) -> np.ndarray:
        """(T,) tokens that each attends to, itself among them."""
        return np.where(self.part > self.span, self.prompt_end - self.span, 0) + self.here + 1 - self.part


def token_limits(spans: Sequence[Span]) -> Limits:
    """Who attends to whom in a row of ``spans``, as four numbers a token."""
    lengths = np.array(spans, np.int64).reshape(-1, 3)  # (S, 3)
    ends = lengths.cumsum().reshape(-1, 3)
    starts = ends - lengths
    tokens = lengths.sum(1)
    return Limits(
        np.arange(tokens.sum()),
        starts[:, 0].repeat(tokens),
        ends[:, 0].repeat(tokens),
        starts.ravel().repeat(lengths.ravel()),
    )


PIECES = 4
"""Pieces of a row that each of its ranks gets."""


@dataclass(frozen=True, slots=True)
class Cut:
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


def cut_row(spans: Sequence[Span], ranks: int) -> Cut:
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
    return Cut(padded, padding, piece, tuple(tuple(sorted(of_rank)) for of_rank in turns.T.tolist()))


def row_tokens(lengths: np.ndarray, layout: Layout) -> np.ndarray:
    """Tokens that pairs take in a row.

    Args:
        lengths: (B, 3) tokens of prompt, chosen and rejected.
        layout: ``plain`` counts the prompt twice.

    Returns:
        (B,)
    """
    return lengths.sum(1) + (lengths[:, 0] if layout == "plain" else 0)


def attended(lengths: np.ndarray) -> np.ndarray:
    """(B,) pairs of tokens of which one attends to the other, in the shared layout; lengths as in ``row_tokens``."""
    prompt, chosen, rejected = lengths.astype(np.float64).T
    return prompt**2 / 2 + sum(c * (prompt + c / 2) for c in (chosen, rejected))


@dataclass(frozen=True, slots=True)
class Deal:
    """Who computes what."""

    shares: tuple[tuple[tuple[int, ...], ...], ...]
    """For each rank its micro-batches, each a tuple of item positions; equally many for every rank, some empty."""
    idle: float
    """Share of the ranks' time that is spent waiting for the one with the largest cost of the same turn."""


def deal(tokens: np.ndarray, costs: np.ndarray, *, ranks: int, tokens_per_micro_batch: int) -> Deal:
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
    while (filled := _fill(largest_first, tokens, costs, turns * ranks, tokens_per_micro_batch)) is None:
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
    return Deal(tuple(map(tuple, shares)), waited / total if total else 0.0)


def _fill(
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
