"""Packing pairs into rows: the layouts of a micro-batch.

A micro-batch is one row without padding. In the shared layout a pair is one span, prompt | chosen | rejected: both
completions attend to the prompt and to themselves, and their positions continue from the prompt, so the prompt is
computed once. In the plain layout each completion has a span of its own, with a copy of the prompt; tests compare the
shared layout with it.

T = tokens of the row, N = completion tokens, B = pairs, S = 2B sequences
"""

from collections.abc import Sequence
from dataclasses import dataclass
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
    second: int
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
    """(N,) completion tokens."""
    sequence: Tensor
    """(N,) index in [0, S): the pair's chosen is 2i, its rejected 2i + 1."""
    lengths: Tensor
    """(S,) completion lengths in tokens."""

    @property
    def pair_tokens(self) -> tuple[int, ...]:
        """(B,) completion tokens of each pair, without a device synchronization."""
        completions = [tokens for span in self.spans for tokens in (span.first, span.second) if tokens]
        return tuple(map(sum, zip(completions[0::2], completions[1::2], strict=True)))

    def to(self, device: torch.device) -> "PackedRow":
        """The row on ``device``."""
        tensors = (getattr(self, name) for name in self.__slots__ if name != "spans")
        input_ids, position_ids, *rest = (to_device(tensor, device) for tensor in tensors)
        return PackedRow(input_ids, position_ids, self.spans, *rest)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a host tensor to ``device``; to a GPU from pinned memory, without blocking the host."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def attention_mask(row: PackedRow) -> Tensor:
    """Dense attention mask: a token attends to earlier tokens of its span's prompt and of its own completion.

    Returns:
        (1, 1, T, T) bool.
    """
    device = row.input_ids.device
    lengths = torch.tensor(row.spans, device=device).flatten()
    part = torch.arange(lengths.numel(), device=device).repeat_interleave(lengths)  # (T,) 3 parts per span
    same_span = part[:, None] // 3 == part[None, :] // 3  # (T, T)
    visible = (part[None, :] % 3 == 0) | (part[:, None] == part[None, :])
    return (same_span & visible).tril()[None, None]


def build_row(pairs: Sequence[TokenPair], layout: Layout) -> PackedRow:
    """Pack pairs into one row.

    Without pairs, the row is a single token without labels: a rank without work still takes part in collectives.

    Args:
        pairs: B pairs.
        layout: ``shared`` has one span per pair, ``plain`` two.
    """
    completions = [[pair.chosen, pair.rejected] for pair in pairs]
    prompts = [pair.prompt for pair in pairs]
    if layout == "plain":
        prompts = [prompt for prompt in prompts for _ in range(2)]
        completions = [[completion] for pair in completions for completion in pair]
    return _pack(prompts, completions)


def build_sample_row(samples: Sequence[TokenSample]) -> PackedRow:
    """Pack single completions into one row; sample i is sequence i."""
    return _pack([s.prompt for s in samples], [[s.completion] for s in samples])


def _pack(prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[Sequence[int]]]) -> PackedRow:
    spans: list[Span] = []
    tokens: list[Sequence[int]] = []
    positions: list[np.ndarray] = []
    labels: list[Sequence[int]] = []
    lengths: list[int] = []
    for prompt, answers in zip(prompts, completions, strict=True):
        tokens.append(prompt)
        positions.append(np.arange(len(prompt)))
        for completion in answers:
            count = len(completion)
            tokens.append(completion)
            positions.append(np.arange(len(prompt), len(prompt) + count))
            labels.append(completion)
            lengths.append(count)
        spans.append(Span(len(prompt), len(answers[0]), len(answers[1]) if len(answers) > 1 else 0))
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
    """(N,) position whose hidden state predicts each label: the token before it, or the last prompt token."""
    sources, start = [np.zeros(0, np.int64)], 0
    for span in spans:
        prompt_end = position = start + span.prompt
        for count in (span.first, span.second):
            if count:
                sources += [np.array([prompt_end - 1]), np.arange(position, position + count - 1)]
                position += count
        start = position
    return np.concatenate(sources)


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
        return np.where(self.part > self.span, self.prompt_end - self.span, 0) + self.here + 1 - self.part


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
    """Row length of each pair in tokens.

    Args:
        lengths: (B, 3) tokens of prompt, chosen and rejected.
        layout: ``plain`` counts the prompt twice.

    Returns:
        (B,)
    """
    return lengths.sum(1) + (lengths[:, 0] if layout == "plain" else 0)
