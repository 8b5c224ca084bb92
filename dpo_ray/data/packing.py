"""From pairs to packed rows: the layouts of the training step, and who computes what.

A micro-batch is one row without padding. In it a pair is a span, prompt | chosen | rejected: both completions attend to
the prompt and to themselves, and both restart their positions after it, so the prompt runs once. The plain layout, each
completion in a span of its own behind its own copy of the prompt, is the oracle that tests hold the shared one against.

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
        input_ids, position_ids, *rest = (to_device(tensor, device) for tensor in tensors)
        return PackedRow(input_ids, position_ids, self.spans, *rest)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
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


def row_tokens(lengths: np.ndarray, layout: Layout) -> np.ndarray:
    """Tokens that pairs take in a row.

    Args:
        lengths: (B, 3) tokens of prompt, chosen and rejected.
        layout: ``plain`` counts the prompt twice.

    Returns:
        (B,)
    """
    return lengths.sum(1) + (lengths[:, 0] if layout == "plain" else 0)
