"""Packing pairs into rows: the layouts of a micro-batch.

A micro-batch is one row without padding. In the shared layout a prompt and all of its completions are one span, for a
pair prompt | chosen | rejected: completions attend to the prompt and to themselves, and their positions continue from
the prompt, so the prompt is computed once. Pairs of one prompt that follow each other share the span, and a completion
that is part of several of them. In the plain layout each completion has a span of its own, with a copy of the prompt;
tests compare the shared layout with it. The padded layout is a plain row that the model computes as a batch of
sequences, padded to the longest, for layers that would mix the sequences of a row.

T = tokens of the row, C = completion tokens, N = labels: completion tokens that carry loss, B = pairs, S = sequences:
completions with their prompts
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain, groupby
from typing import Literal, NamedTuple, overload

import numpy as np
import torch
from torch import Tensor

from dpo_ray.objective.head import Counts
from dpo_ray.types import TokenPair, TokenSample

Layout = Literal["shared", "plain", "padded"]


class Span(tuple[int, ...]):
    """A segment of a row that attends only to itself: lengths of its parts, in tokens.

    The first part is the prompt, the others are completions, each of which attends to the prompt and itself.
    """

    @classmethod
    def of(cls, prompt: int, *completions: int) -> "Span":
        """A prompt of ``prompt`` tokens and its completions."""
        return cls((prompt, *completions))

    @property
    def prompt(self) -> int:
        """Tokens of the prompt."""
        return self[0]

    @property
    def completions(self) -> tuple[int, ...]:
        """Tokens of each completion."""
        return self[1:]


class Spans(Sequence[Span]):
    """Spans of a row as compiled layers pass them on, unseen: torch compiles once more for each length of a tuple."""

    __slots__ = ("_spans",)

    def __init__(self, spans: tuple[Span, ...]) -> None:
        self._spans = spans

    @overload
    def __getitem__(self, index: int) -> Span: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Span]: ...

    def __getitem__(self, index: int | slice) -> Span | Sequence[Span]:
        return self._spans[index]

    def __len__(self) -> int:
        return len(self._spans)


@dataclass(frozen=True, slots=True)
class PackedRow:
    """One micro-batch, the input of the scorer."""

    input_ids: Tensor
    """(1, T) int64."""
    position_ids: Tensor
    """(1, T) int64; all completions of a span continue the positions of its prompt."""
    spans: tuple[Span, ...]
    """Segments of the row, in order; T tokens in total."""
    source: Tensor
    """(N,) position whose hidden state predicts the label."""
    labels: Tensor
    """(N,) completion tokens that carry loss."""
    sequence: Tensor
    """(N,) index in [0, S), ascending."""
    lengths: Tensor
    """(S,) labels of each completion."""
    pairs: Tensor
    """(B, 2) sequences that are chosen and rejected."""
    unpaired: Tensor
    """(B,) int64 ``TokenPair.unpaired`` of each pair."""
    weights: Tensor
    """(B,) float32 weight of each pair's loss."""
    prompts: tuple[Counts, ...]
    """Pairs, sequences and labels of each prompt, in order; on the host, like ``spans``."""
    scored: np.ndarray
    """(C,) True for the completion tokens that are labels; on the host."""

    def to(self, device: torch.device) -> "PackedRow":
        """The row on ``device``."""
        tensors = [name for name in self.__slots__ if name not in ("spans", "prompts", "scored")]
        return replace(self, **{name: to_device(getattr(self, name), device) for name in tensors})


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a host tensor to ``device``; to a GPU from pinned memory, without blocking the host."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def attention_mask(spans: Sequence[Span], device: torch.device | None = None) -> Tensor:
    """(1, 1, T, T) bool: a token attends to earlier tokens of its span's prompt and of its own completion."""
    parts = [(i, n == 0) for i, span in enumerate(spans) for n in range(len(span))]
    lengths = torch.tensor([length for span in spans for length in span], device=device)
    part = torch.arange(len(parts), device=device).repeat_interleave(lengths)  # (T,)
    of_span, in_prompt = torch.tensor(parts, device=device)[part].unbind(1)  # (T,) each
    visible = (of_span[:, None] == of_span) & (in_prompt.bool() | (part[:, None] == part))
    return visible.tril()[None, None]


def padded_positions(spans: Sequence[Span]) -> tuple[tuple[int, int], np.ndarray]:
    """Place of a plain row's tokens in a batch of its S sequences, padded on the right to the longest, L.

    Returns:
        (S, L), and (T,) positions of the tokens among the S * L of the flattened batch.
    """
    lengths = np.array([sum(span) for span in spans], np.int64)
    is_token = np.arange(lengths.max()) < lengths[:, None]
    return is_token.shape, np.flatnonzero(is_token)


def build_row(
    pairs: Sequence[TokenPair],
    layout: Layout,
    numbers: Sequence[int] | None = None,
    weights: Sequence[float] | None = None,
) -> PackedRow:
    """Pack pairs into one row.

    Consecutive pairs of the same prompt share each of their completions. In the ``shared`` layout these are one span,
    in the other layouts each completion is one.

    Args:
        numbers: of the prompt of each pair; pairs with different ones share nothing, even if their prompts are equal.
        weights: of the loss of each pair; None is 1 for each.

    Without pairs, the row is a single token without labels: a rank without work still takes part in collectives.
    """
    segments, indices = [], []
    numbered = zip(numbers or [0] * len(pairs), pairs, strict=True)
    for (_, prompt), group in groupby(numbered, key=lambda item: (item[0], item[1].prompt)):
        of_prompt = [(pair.chosen, pair.rejected) for _, pair in group]
        completions = sorted(dict.fromkeys(chain(*of_prompt)), key=lambda ids: not ids)  # an empty one is the last
        segments.append(_segments(prompt, completions, layout))
        indices.append([(completions.index(chosen), completions.index(rejected)) for chosen, rejected in of_prompt])
    return _pack(segments, indices, [pair.unpaired for pair in pairs], weights or [1.0] * len(pairs))


def _segments(prompt: tuple[int, ...], completions: Sequence[tuple[int, ...]], layout: Layout) -> "list[Segment]":
    """Spans of a prompt; an empty completion, the last one, has none of its own."""
    if layout == "shared" or len(completions) == 1:
        return [(prompt, *completions)]
    *separate, last = completions if completions[-1] else completions[:-1]
    return [*((prompt, ids) for ids in separate), (prompt, last, *completions[len(separate) + 1 :])]


def build_sample_row(samples: Sequence[TokenSample]) -> PackedRow:
    """Pack single completions into one row without pairs; sample i is sequence i."""
    return _pack([[(sample.prompt, sample.completion)] for sample in samples], [[] for _ in samples], [], [])


Segment = tuple[Sequence[int], ...]
"""Token ids of a prompt and of completions, a span of the row."""


def _pack(
    segments: Sequence[Sequence[Segment]],
    pairs: Sequence[Sequence[tuple[int, int]]],
    unpaired: Sequence[int],
    weights: Sequence[float],
) -> PackedRow:
    """Pack the segments of each prompt.

    Args:
        segments: of each prompt.
        pairs: for each prompt, the chosen and the rejected of its pairs, as indices of its completions.
        unpaired: (B,) ``TokenPair.unpaired``.
        weights: (B,) weight of each pair's loss.
    """
    of_row = list(chain(*segments))
    spans = tuple(Span(map(len, segment)) for segment in of_row) or (Span.of(1),)
    parts = list(chain(*of_row)) or [(0,)]
    stored_ids = np.concatenate([np.asarray(ids, np.int64) for ids in parts])
    input_ids = np.where(stored_ids < 0, ~stored_ids, stored_ids)
    limits = token_limits(spans)
    scored = stored_ids[limits.in_completion] >= 0
    lengths = _label_counts(spans, scored)
    sequences = [sum(len(segment) - 1 for segment in of_prompt) for of_prompt in segments]
    starts = list(accumulate(sequences, initial=0))
    tokens = np.diff(np.concatenate([[0], lengths.cumsum()])[starts])
    first_sequence = [start for start, of_prompt in zip(starts, pairs, strict=False) for _ in of_prompt]
    in_prompt = torch.tensor(list(chain(*pairs)), dtype=torch.int64).view(-1, 2)
    return PackedRow(
        input_ids=torch.from_numpy(input_ids)[None],
        position_ids=torch.from_numpy(limits.seen - 1)[None],
        spans=spans,
        source=torch.from_numpy(limits.sources[scored]),
        labels=torch.from_numpy(input_ids[limits.in_completion][scored]),
        sequence=torch.from_numpy(np.arange(len(lengths)).repeat(lengths)),
        lengths=torch.from_numpy(lengths),
        pairs=in_prompt + torch.tensor(first_sequence, dtype=torch.int64)[:, None],
        unpaired=torch.tensor(unpaired, dtype=torch.int64),
        weights=torch.tensor(weights, dtype=torch.float32),
        prompts=tuple(map(Counts, map(len, pairs), sequences, tokens.tolist())),
        scored=scored,
    )


def _label_counts(spans: Sequence[Span], scored: np.ndarray) -> np.ndarray:
    """(S,) labels of each completion."""
    lengths = np.array([length for span in spans for length in span.completions], np.int64)
    return np.diff(np.concatenate([[0], scored.cumsum()])[np.concatenate([[0], lengths.cumsum()])])


class Limits(NamedTuple):
    """The attention mask of a row, by token: a token attends to [span, prompt_end) and [part, here]."""

    here: np.ndarray
    """(T,) position of the token in the row: 0, 1, ..., T - 1."""
    span: np.ndarray
    """(T,) position of the first token of its span, which is the first one of the prompt."""
    prompt_end: np.ndarray
    """(T,) position after the last prompt token of its span."""
    part: np.ndarray
    """(T,) position of the first token of its part: of the prompt, or of its completion."""

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
    parts = np.array([len(span) for span in spans])
    lengths = np.concatenate([np.asarray(span, np.int64) for span in spans])  # one per part
    ends = lengths.cumsum()
    first_parts = parts.cumsum() - parts
    tokens = np.add.reduceat(lengths, first_parts)  # one per span
    return Limits(
        np.arange(tokens.sum()),
        (ends - lengths)[first_parts].repeat(tokens),
        ends[first_parts].repeat(tokens),
        (ends - lengths).repeat(lengths),
    )


def row_tokens(lengths: np.ndarray, layout: Layout) -> np.ndarray:
    """(P,) tokens that each prompt is computed as; ``lengths`` is (P, 1 + K) tokens of prompt and completions."""
    prompt, completions = lengths[:, 0], lengths[:, 1:]
    copies = (completions > 0).sum(1)
    match layout:
        case "shared":
            return prompt + completions.sum(1)
        case "plain":
            return copies * prompt + completions.sum(1)
        case "padded":
            return copies * (prompt + completions.max(1))
