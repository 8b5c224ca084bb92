"""Attention over packed rows: values and gradients against a masked float64 softmax and torch's own kernels."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dpo_ray.data.assignment import shard_row
from dpo_ray.data.packing import Span
from dpo_ray.ops.attention import QUERY_BLOCK, _attend, causal_segments, packed_attention

LENGTH = st.integers(0, 2 * QUERY_BLOCK + 3)
Attend = Callable[[Tensor, Tensor, Tensor, list[Span]], Tensor]
SPANS = st.lists(st.builds(Span, LENGTH.map(lambda n: n + 1), LENGTH, LENGTH), min_size=1, max_size=3)


def inputs(spans: list[Span], heads: int, key_heads: int, dtype: torch.dtype, size: int = 16) -> list[Tensor]:
    """Query, key and value of a row, and a gradient with respect to the output of attention."""
    generator = torch.Generator().manual_seed(sum(map(sum, spans)))
    tokens = sum(map(sum, spans))
    tensors = [2 * torch.randn(1, h, tokens, size, generator=generator) for h in (heads, key_heads, key_heads)]
    return [*(x.to(dtype) for x in tensors), torch.randn(1, tokens, heads, size, generator=generator).to(dtype)]


def packed(q: Tensor, k: Tensor, v: Tensor, spans: list[Span]) -> Tensor:
    """The attention of the policy."""
    return packed_attention(nn.Identity(), q, k, v, None, spans=spans)[0]


def by_torch(q: Tensor, k: Tensor, v: Tensor, spans: list[Span]) -> Tensor:
    """torch's attention and gradients, per segment."""
    parts = [_attend(q, k, v, segment, q.shape[-1] ** -0.5) for segment in causal_segments(spans)]
    return torch.cat(parts, 2).transpose(1, 2)


def by_mask(q: Tensor, k: Tensor, v: Tensor, spans: list[Span]) -> Tensor:
    """Softmax over the whole row with masked logits at minus infinity."""
    tokens = q.shape[2]
    seen = torch.zeros(tokens, tokens, dtype=torch.bool)
    start = 0
    for prompt, first, second in spans:
        end, behind = start + prompt, start + prompt + first
        seen[start : behind + second, start:end] = True
        seen[end:behind, end:behind] = seen[behind : behind + second, behind : behind + second] = True
        start = behind + second
    groups = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(groups, 1).transpose(2, 3) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~seen.tril(), float("-inf"))
    return (scores.softmax(-1) @ v.repeat_interleave(groups, 1)).transpose(1, 2)


def value_and_gradients(attend: Attend, tensors: list[Tensor], spans: list[Span], dtype: torch.dtype) -> list[Tensor]:
    """Output of ``attend`` and gradients with respect to query, key and value, computed in ``dtype``."""
    q, k, v, grad = (x.to(dtype).detach() for x in tensors)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = attend(q, k, v, spans)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def errors(actual: list[Tensor], exact: list[Tensor]) -> list[float]:
    """Norm of the difference relative to the exact norm, or to 1 if that is larger, for value and each gradient."""
    return [float((a.double() - e).norm() / e.norm().clamp(min=1)) for a, e in zip(actual, exact, strict=True)]


@settings(max_examples=30, deadline=None)
@given(SPANS, st.sampled_from([(4, 4), (6, 2), (3, 1)]))
def test_values_and_gradients_are_those_of_a_float64_softmax_over_the_masked_row(
    spans: list[Span], heads: tuple[int, int]
) -> None:
    tensors = inputs(spans, *heads, torch.float32)
    exact = value_and_gradients(by_mask, tensors, spans, torch.float64)
    assert max(errors(value_and_gradients(packed, tensors, spans, torch.float32), exact)) < 1e-5


@settings(max_examples=20, deadline=None)
@given(SPANS, st.sampled_from([1, 2, 3]))
def test_context_parallel_ranks_have_together_the_values_and_gradients_of_the_row(
    spans: list[Span], ranks: int
) -> None:
    split = shard_row(spans, ranks)
    tensors = inputs(list(split.spans), 4, 2, torch.float32)
    exact = value_and_gradients(by_mask, tensors, list(split.spans), torch.float64)

    def sharded(q: Tensor, k: Tensor, v: Tensor, spans: list[Span]) -> Tensor:
        out = torch.zeros_like(q).transpose(1, 2)
        for rank in range(ranks):
            tokens, slices = torch.from_numpy(split.positions[rank]), split.stretches(rank)
            local, _ = packed_attention(nn.Identity(), q[:, :, tokens], k, v, None, spans=spans, query_slices=slices)
            out = out.index_copy(1, tokens, local)
        return out

    assert max(errors(value_and_gradients(sharded, tensors, list(split.spans), torch.float32), exact)) < 1e-5


@pytest.mark.parametrize("spans", [[Span(40, 300, 200)], [Span(300, 20, 30)] * 3])
def test_bfloat16_gradients_are_as_accurate_as_those_of_torchs_kernel(spans: list[Span]) -> None:
    tensors = inputs(spans, 6, 2, torch.bfloat16, size=64)
    exact = value_and_gradients(by_mask, tensors, spans, torch.float64)
    ours, torchs = (
        errors(value_and_gradients(attend, tensors, spans, torch.bfloat16), exact) for attend in (packed, by_torch)
    )
    assert all(own < 1.1 * other for own, other in zip(ours, torchs, strict=True)), (ours, torchs)
    assert max(ours) < 2**-7
