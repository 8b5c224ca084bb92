"""Attention over packed rows: values and gradients against a masked float64 softmax and torch's own kernels."""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dpo_ray.data.assignment import shard_row
from dpo_ray.data.packing import Span
from dpo_ray.objective.precision import PATHS, ProductPath
from dpo_ray.ops.attention import _attend, causal_segments, packed_attention
from dpo_ray.ops.blocks import QUERY_BLOCK
from dpo_ray.ops.flex import flex_packed_attention
from dpo_ray.ops.windows import Window

LENGTH = st.integers(0, 2 * QUERY_BLOCK + 3)
Attend = Callable[[Tensor, Tensor, Tensor, list[Span]], Tensor]
SPAN = st.builds(lambda prompt, rest: Span.of(prompt + 1, *rest), LENGTH, st.lists(LENGTH, max_size=3))
SPANS = st.lists(SPAN, min_size=1, max_size=2)


def inputs(spans: list[Span], heads: int, key_heads: int, dtype: torch.dtype, size: int = 16) -> list[Tensor]:
    """Query, key and value of a row, and a gradient with respect to the output of attention."""
    generator = torch.Generator().manual_seed(sum(map(sum, spans)))
    tokens = sum(map(sum, spans))
    tensors = [2 * torch.randn(1, h, tokens, size, generator=generator) for h in (heads, key_heads, key_heads)]
    return [*(x.to(dtype) for x in tensors), torch.randn(1, tokens, heads, size, generator=generator).to(dtype)]


WINDOWS = st.one_of(st.none(), st.builds(Window, st.sampled_from([3, QUERY_BLOCK, 300]), st.booleans()))


def layer(window: Window | None) -> nn.Module:
    """An attention layer as ``layer_window`` sees it."""
    module = nn.Identity()
    chunk = window.size if window is not None and window.chunked else None
    kind = "full_attention" if chunk is None else "chunked_attention"
    module.config = SimpleNamespace(layer_types=[kind], attention_chunk_size=chunk)  # type: ignore[assignment]
    module.layer_idx = 0  # type: ignore[assignment]
    return module


def packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans: list[Span],
    *,
    window: Window | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    path: ProductPath = "rounded",
) -> Tensor:
    """The attention of the policy."""
    sliding = None if window is None or window.chunked else window.size
    return packed_attention(
        layer(window),
        q,
        k,
        v,
        None,
        spans=spans,
        sliding_window=sliding,
        softcap=softcap,
        s_aux=sinks,
        product_path=path,
    )[0]


def by_torch(q: Tensor, k: Tensor, v: Tensor, spans: list[Span]) -> Tensor:
    """torch's attention and gradients, per segment."""
    parts = [_attend(q, k, v, segment, q.shape[-1] ** -0.5) for segment in causal_segments(spans)]
    return torch.cat(parts, 2).transpose(1, 2)


def by_mask(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans: list[Span],
    *,
    window: Window | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Softmax over the whole row with masked logits at minus infinity, and the sinks as one more key."""
    tokens = q.shape[2]
    seen, position = torch.zeros(tokens, tokens, dtype=torch.bool), torch.zeros(tokens, dtype=torch.int64)
    start = 0
    for prompt, *completions in spans:
        seen[start : start + prompt + sum(completions), start : start + prompt] = True
        position[start : start + prompt] = torch.arange(prompt)
        start += prompt
        for completion in completions:
            own = slice(start, start + completion)
            seen[own, own], position[own] = True, torch.arange(prompt, prompt + completion)
            start += completion
    if window is not None:
        query, key = position[:, None], position[None]
        seen &= (query // window.size == key // window.size) if window.chunked else (query - key < window.size)
    groups = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(groups, 1).transpose(2, 3) * q.shape[-1] ** -0.5
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    scores = scores.masked_fill(~seen.tril(), float("-inf"))
    if sinks is not None:
        scores = torch.cat((scores, sinks[None, :, None, None].expand(1, -1, tokens, 1)), -1)
    return (scores.softmax(-1)[..., :tokens] @ v.repeat_interleave(groups, 1)).transpose(1, 2)


def value_and_gradients(attend: Attend, tensors: list[Tensor], spans: list[Span], dtype: torch.dtype) -> list[Tensor]:
    """Output of ``attend`` and gradients with respect to query, key and value, computed in ``dtype``."""
    q, k, v, grad = (x.to(dtype).detach() for x in tensors)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = attend(q, k, v, spans)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def errors(actual: list[Tensor], exact: list[Tensor]) -> list[float]:
    """Norm of the difference relative to the exact norm, or to 1 if that is larger, for value and each gradient."""
    return [float((a.double() - e).norm() / e.norm().clamp(min=1)) for a, e in zip(actual, exact, strict=True)]


@settings(max_examples=20, deadline=None)
@given(SPANS, st.sampled_from([(2, 2), (4, 2), (3, 1)]), WINDOWS, st.sampled_from([None, 1.5]))
def test_values_and_gradients_are_those_of_a_float64_softmax_over_the_masked_row(
    spans: list[Span], heads: tuple[int, int], window: Window | None, softcap: float | None
) -> None:
    tensors = inputs(spans, *heads, torch.float32)
    ours, oracle = (partial(attend, window=window, softcap=softcap) for attend in (packed, by_mask))
    exact = value_and_gradients(oracle, tensors, spans, torch.float64)
    assert max(errors(value_and_gradients(ours, tensors, spans, torch.float32), exact)) < 1e-5


@pytest.mark.parametrize("window", [None, Window(7)])
def test_values_and_gradients_with_sinks_are_those_of_a_float64_softmax_with_one_more_key(window: Window) -> None:
    spans = [Span.of(20, 140, 9), Span.of(1, 3, 2)]
    tensors, sinks = inputs(spans, 4, 2, torch.float32), torch.tensor([-3.0, 0.0, 2.0, 9.0])

    def results(attend: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        sink = sinks.to(dtype, copy=True).requires_grad_()
        values = value_and_gradients(partial(attend, window=window, sinks=sink), tensors, spans, dtype)
        attend(*(x.to(dtype) for x in tensors[:3]), spans, window=window, sinks=sink).square().sum().backward()
        assert sink.grad is not None
        return [*values, sink.grad]

    assert max(errors(results(packed, torch.float32), results(by_mask, torch.float64))) < 1e-5


def test_capped_logits_over_values_of_another_size_than_keys_need_padded_batches() -> None:
    q, k, v, _ = inputs([Span.of(2, 3)], 2, 2, torch.float32)
    with pytest.raises(NotImplementedError, match=r"caps its logits .*; set model\.attention: padded"):
        packed(q, k, v[..., :8], [Span.of(2, 3)], softcap=1.5)


@pytest.mark.parametrize("attend", [packed_attention, flex_packed_attention])
def test_a_mask_of_the_layers_own_is_rejected(attend: Callable[..., Any]) -> None:
    q, k, v, _ = inputs([Span.of(3, 2)], 2, 2, torch.float32)
    with pytest.raises(NotImplementedError, match=r"Identity has a mask of its own, .* model\.attention: padded"):
        attend(layer(None), q, k, v, torch.zeros(1, 2, 5, 5), spans=[Span.of(3, 2)])


def test_keys_outside_the_window_are_not_computed() -> None:
    spans = [Span.of(2000, 1000, 1000)]
    computed = [
        sum(
            (s.queries.stop - s.queries.start) * (s.prompt.stop - s.prompt.start + s.own.stop - s.own.start)
            for s in causal_segments(spans, None, window)
        )
        for window in (Window(100), Window(100, chunked=True))
    ]
    assert computed[0] <= 4000 * (100 + QUERY_BLOCK)
    assert computed[1] == 4000 * 100


@settings(max_examples=20, deadline=None)
@given(SPANS, st.sampled_from([1, 2, 3]), WINDOWS)
def test_context_parallel_ranks_have_together_the_values_and_gradients_of_the_row(
    spans: list[Span], ranks: int, window: Window | None
) -> None:
    split = shard_row(spans, ranks)
    tensors = inputs(list(split.spans), 4, 2, torch.float32)
    exact = value_and_gradients(partial(by_mask, window=window), tensors, list(split.spans), torch.float64)
    sliding = None if window is None or window.chunked else window.size

    def sharded(q: Tensor, k: Tensor, v: Tensor, spans: list[Span]) -> Tensor:
        out = torch.zeros_like(q).transpose(1, 2)
        for rank in range(ranks):
            tokens, slices = torch.from_numpy(split.positions[rank]), split.stretches(rank)
            local, _ = packed_attention(
                layer(window), q[:, :, tokens], k, v, None, spans=spans, query_slices=slices, sliding_window=sliding
            )
            out = out.index_copy(1, tokens, local)
        return out

    assert max(errors(value_and_gradients(sharded, tensors, list(split.spans), torch.float32), exact)) < 1e-5


@pytest.mark.parametrize("spans", [[Span.of(40, 300, 200)], [Span.of(300, 20, 30)] * 3])
def test_bfloat16_gradients_are_as_accurate_as_those_of_torchs_kernel(spans: list[Span]) -> None:
    tensors = inputs(spans, 6, 2, torch.bfloat16, size=64)
    exact = value_and_gradients(by_mask, tensors, spans, torch.float64)
    ours, torchs = (
        errors(value_and_gradients(attend, tensors, spans, torch.bfloat16), exact) for attend in (packed, by_torch)
    )
    assert all(own < 1.1 * other for own, other in zip(ours, torchs, strict=True)), (ours, torchs)
    assert max(ours) < 2**-7


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [None, Window(150)])
def test_bfloat16_gradients_of_every_path_differ_from_float64_by_a_few_roundings(
    path: ProductPath, softcap: float | None, window: Window | None
) -> None:
    spans = [Span.of(40, 300, 200)]
    tensors = inputs(spans, 6, 2, torch.bfloat16, size=64)
    oracle, attend = (partial(f, window=window, softcap=softcap) for f in (by_mask, partial(packed, path=path)))
    exact = value_and_gradients(oracle, tensors, spans, torch.float64)
    ours = value_and_gradients(attend, tensors, spans, torch.bfloat16)
    # At most 2^-9 each: output, probability, gradient of the probability and of the logit, and the gradient itself.
    assert max(errors(ours, exact)) < 5 * 2**-9


def test_large_logits_cost_bfloat16_products_no_accuracy() -> None:
    spans = [Span.of(40, 300, 200)]
    query, *others = inputs(spans, 6, 2, torch.bfloat16, size=64)
    tensors = [8 * query, *others]
    exact = value_and_gradients(by_mask, tensors, spans, torch.float64)
    ours = value_and_gradients(partial(packed, path="bfloat16"), tensors, spans, torch.bfloat16)
    # Logits near 100 rounded to bfloat16 would be off by a quarter, and probabilities by 28 %.
    assert max(errors(ours, exact)) < 2**-6
