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
        input_ids, position_ids, *rest = (tensor.to(device, non_blocking=True) for tensor in tensors)
        return PackedRow(input_ids, position_ids, self.spans, *rest)


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
    source: list[np.ndarray] = []
    labels: list[Sequence[int]] = []
    lengths: list[int] = []
    start = 0
    for prompt, both in zip(prompts, completions, strict=True):
        tokens.append(prompt)
        positions.append(np.arange(len(prompt)))
        prompt_end = at = start + len(prompt)
        for completion in both:
            count = len(completion)
            tokens.append(completion)
            positions.append(np.arange(len(prompt), len(prompt) + count))
            # The last prompt token predicts the first token of both completions.
            source.append(np.concatenate(([prompt_end - 1], np.arange(at, at + count - 1))))
            labels.append(completion)
            lengths.append(count)
            at += count
        spans.append(Span(len(prompt), len(both[0]), len(both[1]) if len(both) > 1 else 0))
        start = at
    if not spans:
        spans.append(Span(1, 0, 0))
        tokens.append((0,))
        positions.append(np.zeros(1))

    def flat(parts: Sequence[Sequence[int] | np.ndarray]) -> Tensor:
        return torch.from_numpy(np.concatenate([np.asarray(p, np.int64) for p in parts] or [np.zeros(0, np.int64)]))

    sequence = np.repeat(np.arange(len(lengths)), lengths) if lengths else np.zeros(0, np.int64)
    return PackedRow(
        flat(tokens)[None], flat(positions)[None], tuple(spans),
        flat(source), flat(labels), torch.from_numpy(sequence), torch.tensor(lengths, dtype=torch.int64),
    )  # fmt: skip


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
    turns = max(1, -(-int(tokens.sum()) // (ranks * tokens_per_micro_batch)))
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
