"""Packing pairs into rows: the layouts of a micro-batch.

A micro-batch is one row without padding. In the shared layout a pair is one span, prompt | chosen | rejected: both
completions attend to the prompt and to themselves, and their positions continue from the prompt, so the prompt is
computed once. In the plain layout each completion has a span of its own, with a copy of the prompt; tests compare the
shared layout with it.

T = tokens of the row, C = completion tokens, N = labels: completion tokens that carry loss, B = pairs, S = 2B sequences
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dpo_ray.types import TokenPair, TokenSample

Layout = Literal["shared", "plain"]


class Span(NamedTuple):
    """A segment of a row that attends only to itself: lengths in tokens."""

    prompt: int
    first: int
    """A completion, which attends to the prompt and itself."""
    second: int = 0
    """Another completion of the same prompt, or 0; it attends to the prompt and itself."""


@dataclass(frozen=True, slots=True)
class PackedRow:
    """One micro-batch, the input of the scorer."""

    input_ids: Tensor
    """(1, T) int64."""
    position_ids: Tensor
    """(1, T) int64; both completions of a span continue the positions of its prompt."""
    spans: tuple[Span, ...]
    """Segments of the row, in order; T tokens in total."""
    source: Tensor
    """(N,) position whose hidden state predicts the label."""
    labels: Tensor
    """(N,) completion tokens that carry loss."""
    sequence: Tensor
    """(N,) index in [0, S): the pair's chosen is 2i, its rejected 2i + 1."""
    lengths: Tensor
    """(S,) labels of each completion."""
    scored: np.ndarray
    """(C,) True for the completion tokens that are labels; on the host."""

    @property
    def pair_tokens(self) -> tuple[int, ...]:
        """(B,) labels of each pair, without a device synchronization."""
        return tuple(_label_counts(self.spans, self.scored).reshape(-1, 2).sum(1).tolist())

    def to(self, device: torch.device) -> "PackedRow":
        """The row on ``device``."""
        tensors = [name for name in self.__slots__ if name not in ("spans", "scored")]
        return replace(self, **{name: to_device(getattr(self, name), device) for name in tensors})


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a host tensor to ``device``; to a GPU from pinned memory, without blocking the host."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def attention_mask(row: PackedRow) -> Tensor:
    """(1, 1, T, T) bool: a token attends to earlier tokens of its span's prompt and of its own completion."""
    device = row.input_ids.device
    lengths = torch.tensor(row.spans, device=device).flatten()
    part = torch.arange(lengths.numel(), device=device).repeat_interleave(lengths)  # (T,) 3 parts per span
    same_span = part[:, None] // 3 == part[None, :] // 3  # (T, T)
    visible = (part[None, :] % 3 == 0) | (part[:, None] == part[None, :])
    return (same_span & visible).tril()[None, None]


def build_row(pairs: Sequence[TokenPair], layout: Layout) -> PackedRow:
    """Pack pairs into one row, with one span per pair in the ``shared`` layout and two in the ``plain`` one.

    Without pairs, the row is a single token without labels: a rank without work still takes part in collectives.
    """
    if layout == "plain":
        return _pack([(pair.prompt, completion) for pair in pairs for completion in (pair.chosen, pair.rejected)])
    return _pack([(pair.prompt, pair.chosen, pair.rejected) for pair in pairs])


def build_sample_row(samples: Sequence[TokenSample]) -> PackedRow:
    """Pack single completions into one row; sample i is sequence i."""
    return _pack([(sample.prompt, sample.completion) for sample in samples])


def _pack(segments: Sequence[tuple[Sequence[int], ...]]) -> PackedRow:
    """Pack segments, each a prompt and one or two completions."""
    spans = tuple(Span(*map(len, segment)) for segment in segments) or (Span(1, 0),)
    parts = [ids for segment in segments for ids in segment] or [(0,)]
    stored_ids = np.concatenate([np.asarray(ids, np.int64) for ids in parts])
    input_ids = np.where(stored_ids < 0, ~stored_ids, stored_ids)
    limits = token_limits(spans)
    scored = stored_ids[limits.in_completion] >= 0
    lengths = _label_counts(spans, scored)
    return PackedRow(
        input_ids=torch.from_numpy(input_ids)[None],
        position_ids=torch.from_numpy(limits.seen - 1)[None],
        spans=spans,
        source=torch.from_numpy(limits.sources[scored]),
        labels=torch.from_numpy(input_ids[limits.in_completion][scored]),
        sequence=torch.from_numpy(np.arange(len(lengths)).repeat(lengths)),
        lengths=torch.from_numpy(lengths),
        scored=scored,
    )


def _label_counts(spans: Sequence[Span], scored: np.ndarray) -> np.ndarray:
    """(S,) labels of each completion."""
    lengths = np.array(spans, np.int64)[:, 1:].ravel()
    ends = lengths[lengths > 0].cumsum()
    return np.diff(np.concatenate([[0], scored.cumsum()])[np.concatenate([[0], ends])])


class Limits(NamedTuple):
    """Attention as four numbers per token: it attends to [span, prompt_end) and [part, here]."""

    here: np.ndarray
    """(T,) position of the token in the row."""
    span: np.ndarray
    """(T,) first token of its span."""
    prompt_end: np.ndarray
    """(T,) end of its span's prompt."""
    part: np.ndarray
    """(T,) first token of its own prompt or completion."""

    def of(self, tokens: np.ndarray) -> "Limits":
        """Limits of a subset of the tokens."""
        return Limits(*(limit[tokens] for limit in self))

    @property
    def seen(self) -> np.ndarray:
        """(T,) number of tokens that each token attends to, including itself."""
        return np.where(self.in_completion, self.prompt_end - self.span, 0) + self.here + 1 - self.part

    @property
    def in_completion(self) -> np.ndarray:
        """(T,) True for the tokens of completions, which are the labels."""
        return self.part > self.span

    @property
    def sources(self) -> np.ndarray:
        """(N,) position whose hidden state predicts each label: the token before it, or the last prompt token."""
        labels = self.of(self.in_completion)
        return np.where(labels.here == labels.part, labels.prompt_end, labels.here) - 1


def token_limits(spans: Sequence[Span]) -> Limits:
    """Attention limits of the tokens of a row."""
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


def row_tokens(lengths: np.ndarray, layout: Layout) -> np.ndarray:
    """(B,) row length of each pair in tokens; ``lengths`` is (B, 3) tokens of prompt, chosen and rejected."""
    return lengths.sum(1) + (lengths[:, 0] if layout == "plain" else 0)
