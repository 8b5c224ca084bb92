"""From pairs to rows: the layouts of the training step, and who computes what.

A pair is one row, prompt | chosen | rejected: both completions attend to the prompt and to themselves, and both restart
their positions after it, so the prompt runs once. The plain layout, each completion in a row of its own behind its own
copy of the prompt, is the oracle that tests hold the shared one against.

R = rows, T = tokens of a row, N = completion tokens, B = pairs, S = 2B sequences
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from dpo_ray.types import TokenPair, TokenSample

Layout = Literal["shared", "plain"]
PROMPT, CHOSEN, REJECTED = 0, 1, 2
PADDING = -1

_Segment = tuple[int, int, Sequence[int]]
"""Pair, part and tokens of a stretch of a row."""


@dataclass(frozen=True, slots=True)
class Rows:
    """One micro-batch as the scorer takes it."""

    input_ids: Tensor
    """(R, T) int64."""
    position_ids: Tensor
    """(R, T) int64; chosen and rejected both continue from the end of the prompt."""
    pair: Tensor
    """(R, T) which pair a token belongs to; -1 is padding."""
    part: Tensor
    """(R, T) 0 prompt, 1 chosen, 2 rejected."""
    source: Tensor
    """(N,) flat position in (R * T) whose hidden state predicts the label."""
    labels: Tensor
    """(N,) completion tokens."""
    sequence: Tensor
    """(N,) index in [0, S): the pair's chosen is 2i, its rejected 2i + 1."""
    lengths: Tensor
    """(S,) completion lengths in tokens."""

    def to(self, device: torch.device) -> "Rows":
        """The same rows on ``device``."""
        return Rows(*(getattr(self, name).to(device, non_blocking=True) for name in self.__slots__))


def attention_mask(rows: Rows) -> Tensor:
    """Who attends to whom: earlier tokens of the same pair, in the prompt or in the same completion.

    Returns:
        (R, 1, T, T) bool. Padding attends to padding, so that no row of the mask is empty.
    """
    pair, part = rows.pair, rows.part
    same_pair = pair[:, :, None] == pair[:, None, :]  # (R, T, T)
    visible = (part[:, None, :] == PROMPT) | (part[:, :, None] == part[:, None, :])
    tokens = pair.shape[1]
    causal = torch.ones(tokens, tokens, dtype=torch.bool, device=pair.device).tril()
    return (same_pair & visible & causal)[:, None]


def build_rows(pairs: Sequence[TokenPair], layout: Layout) -> Rows:
    """Lay pairs out as rows, padded to the longest.

    No pairs give one row of a single padding token: a rank without work still takes part in every collective.

    Args:
        pairs: B pairs.
        layout: ``shared``: B rows. ``plain``: 2B rows.
    """
    segments: list[Sequence[_Segment]] = []
    for index, pair in enumerate(pairs):
        chosen, rejected = (index, CHOSEN, pair.chosen), (index, REJECTED, pair.rejected)
        prompt = (index, PROMPT, pair.prompt)
        segments += [[prompt, chosen, rejected]] if layout == "shared" else [[prompt, chosen], [prompt, rejected]]
    return _lay_out(segments, sequences=2 * len(pairs))


def build_sample_rows(samples: Sequence[TokenSample]) -> Rows:
    """Rows of single completions; sample i is sequence i."""
    segments = [[(i, PROMPT, s.prompt), (i, CHOSEN, s.completion)] for i, s in enumerate(samples)]
    rows = _lay_out(segments, sequences=2 * len(samples))
    return Rows(
        rows.input_ids, rows.position_ids, rows.pair, rows.part, rows.source, rows.labels,
        rows.sequence // 2, rows.lengths[0::2],
    )  # fmt: skip


def _lay_out(segments: Sequence[Sequence[_Segment]], sequences: int) -> Rows:
    width = max((sum(len(tokens) for *_, tokens in row) for row in segments), default=1)
    shape = (max(len(segments), 1), width)
    input_ids, position_ids = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    pair_ids, parts = np.full(shape, PADDING, np.int64), np.zeros(shape, np.int64)
    source: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    owners: list[np.ndarray] = []
    lengths = np.zeros(sequences, np.int64)
    for r, row in enumerate(segments):
        at, prompt_end = 0, 0
        for pair, part, tokens in row:
            span, count = slice(at, at + len(tokens)), len(tokens)
            first = 0 if part == PROMPT else prompt_end
            input_ids[r, span] = tokens
            position_ids[r, span] = np.arange(first, first + count)
            pair_ids[r, span], parts[r, span] = pair, part
            if part == PROMPT:
                prompt_end = count
            else:
                sequence = 2 * pair + (part == REJECTED)
                # The last prompt token predicts the first token of both completions.
                before = np.concatenate(([prompt_end - 1], np.arange(at, at + count - 1)))
                source.append(before + r * width)
                labels.append(input_ids[r, span].copy())
                owners.append(np.full(count, sequence))
                lengths[sequence] = count
            at += count
    flat = (np.concatenate(x) if x else np.zeros(0, np.int64) for x in (source, labels, owners))
    return Rows(*map(torch.from_numpy, (input_ids, position_ids, pair_ids, parts, *flat, lengths)))


def deal(lengths: np.ndarray, *, ranks: int, tokens_per_micro_batch: int) -> list[list[tuple[int, ...]]]:
    """Share rows out to ranks: equally many micro-batches each, near-equal work at every turn.

    Rows are bucketed by length so that little is padding. Every rank gets the same number of micro-batches, because
    each is a collective: as few as the token limit allows, and cut as evenly as that number allows, so that at every
    turn all ranks are done at about the same time.

    Args:
        lengths: (B,) tokens of each row.
        ranks: ranks that share the work.
        tokens_per_micro_batch: most tokens, padding included, of one micro-batch; a longer single row runs alone.

    Returns:
        For each rank its micro-batches, each a tuple of positions in ``lengths``; some may be empty.
    """
    by_length = [int(i) for i in np.argsort(-lengths, kind="stable")]
    fewest = len(_buckets(by_length, lengths, tokens_per_micro_batch))
    turns = max(1, -(-fewest // ranks))
    low, high = 1, tokens_per_micro_batch
    while low < high:  # the smallest limit that needs no further turn
        middle = (low + high) // 2
        if len(_buckets(by_length, lengths, middle)) <= turns * ranks:
            high = middle
        else:
            low = middle + 1
    batches = _buckets(by_length, lengths, high)
    batches += [()] * (turns * ranks - len(batches))

    def cost(batch: tuple[int, ...]) -> int:
        return len(batch) * max((int(lengths[i]) for i in batch), default=0)

    batches.sort(key=cost, reverse=True)
    dealt: list[list[tuple[int, ...]]] = [[] for _ in range(ranks)]
    for t in range(turns):
        turn = batches[t * ranks : (t + 1) * ranks]
        # Every other turn is dealt backwards: the rank with the largest share of one has the smallest of the next.
        for mine, batch in zip(dealt, turn if t % 2 == 0 else reversed(turn), strict=True):
            mine.append(batch)
    return dealt


def _buckets(by_length: Sequence[int], lengths: np.ndarray, limit: int) -> list[tuple[int, ...]]:
    """Consecutive rows, longest first, in batches of at most ``limit`` padded tokens, or of one row."""
    batches: list[tuple[int, ...]] = []
    bucket: list[int] = []
    for index in by_length:
        if bucket and (len(bucket) + 1) * int(lengths[bucket[0]]) > limit:
            batches.append(tuple(bucket))
            bucket = []
        bucket.append(index)
    return [*batches, tuple(bucket)] if bucket else batches
