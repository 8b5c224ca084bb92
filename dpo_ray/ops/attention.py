"""Attention over packed rows with torch's own kernels: masked query-key blocks are never computed.

A span is two causal segments: the prompt with the first completion, and the second completion, which also attends to
the prompt. Each segment is one kernel call, so no (T, T) tensor exists and half of it is never computed.

T = tokens of the row, H = query heads, K = key heads, D = head size
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpo_ray.data.packing import Span
from dpo_ray.objective.precision import bfloat16_products

PACKED = "dpo_ray_packed"
"""Name of ``packed_attention`` in transformers' ``AttentionInterface``."""
GatherKV = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Context parallelism: (keys, values) of the local tokens, (1, K, t, D) -> those of the row, (1, K, T, D)."""
QUERY_BLOCK = 128
"""Queries per block of the backward pass on a CPU; probabilities exist for one block at a time."""


@torch.compiler.disable(reason="spans differ per row, and torch would recompile for each")
def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    spans: Sequence[Span] | None = None,
    query_slices: Sequence[slice] | None = None,
    gather_kv: GatherKV | None = None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention within the spans of one row, with the signature that transformers calls.

    Args:
        query: (1, H, T, D); with context parallelism (1, H, t, D), like key and value.
        key, value: (1, K, T, D).
        attention_mask: ignored in favour of ``spans``.
        spans: spans of the row, T tokens in total.
        query_slices: the local tokens as slices of the row; None if all tokens are local.
        gather_kv: gathers keys and values over the context-parallel ranks; None if all tokens are local.
        scaling: scale of the logits; defaults to 1 / sqrt(D).
        kwargs: see ``validate_attention_call``; ``dropout`` is off in preference training and ignored.

    Returns:
        (1, T, H, D), and None in place of the attention weights.

    Raises:
        NotImplementedError: see ``validate_attention_call``.
    """
    validate_attention_call(module, spans, kwargs)
    assert spans is not None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if gather_kv is not None:
        key, value = gather_kv(key, value)
    segments = tuple(causal_segments(spans, query_slices))
    if query.device.type == "cpu" and query.shape[-1] == value.shape[-1]:
        out = _SegmentAttention.apply(query[0], key[0], value[0], segments, scale)[None]
    else:
        out = torch.cat([_attend(query, key, value, segment, scale) for segment in segments], 2)
    return out.transpose(1, 2), None


def validate_attention_call(module: nn.Module, spans: object, kwargs: Mapping[str, Any]) -> None:
    """Raise NotImplementedError if an architecture needs more than softmax attention or does not pass ``spans`` on."""
    if spans is None or any(kwargs.get(name) is not None for name in ("softcap", "s_aux", "position_bias")):
        raise NotImplementedError(
            f"{type(module).__name__} cannot run on packed rows without a mask; set model.attention: sdpa"
        )


class Segment(NamedTuple):
    """Consecutive tokens that attend causally to each other, and fully to a prompt before them."""

    prompt: slice
    """Prompt tokens, as a slice of the row; empty if the prompt is part of the segment."""
    own: slice
    """The segment's own tokens, as a slice of the row."""
    queries: slice
    """Slice of the local queries: the last tokens of ``own``, or all of them."""

    def keys(self, row: Tensor) -> Tensor:
        """Entries of the prompt and of the segment, (..., S, D), of a tensor over the row, (..., T, D)."""
        own = row[..., self.own, :]
        return own if self.prompt.start == self.prompt.stop else torch.cat((row[..., self.prompt, :], own), -2)


def causal_segments(spans: Sequence[Span], query_slices: Sequence[slice] | None = None) -> Iterator[Segment]:
    """Segments of a row in the order of the queries; together they cover all queries; see ``packed_attention``."""
    offset = 0
    for local in query_slices or [slice(0, sum(map(sum, spans)))]:
        for prompt, own in _prompts_and_segments(spans):
            start, stop = max(own.start, local.start), min(own.stop, local.stop)
            if start < stop:
                first = offset + start - local.start
                yield Segment(prompt, slice(own.start, stop), slice(first, first + stop - start))
        offset += local.stop - local.start


def _prompts_and_segments(spans: Sequence[Span]) -> Iterator[tuple[slice, slice]]:
    """(prompt, own) of each segment, as slices of the row; see ``Segment``."""
    start = 0
    for span in spans:
        first, end = start + span.prompt + span.first, start + sum(span)
        yield slice(start, start), slice(start, first)
        yield slice(start, start + span.prompt), slice(first, end)
        start = end


def _attend(query: Tensor, key: Tensor, value: Tensor, segment: Segment, scale: float) -> Tensor:
    q, k, v = query[:, :, segment.queries], segment.keys(key), segment.keys(value)
    mask = _bottom_right_causal_mask(q, k)
    if mask is not None:
        # No fused kernel takes a mask with grouped heads: the fallback materializes all logits.
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
    )


def _bottom_right_causal_mask(query: Tensor, key: Tensor) -> Tensor | None:
    """(queries, keys) additive mask, causal from the bottom right corner; None if square, where kernels need none."""
    queries, keys = query.shape[-2], key.shape[-2]
    if queries == keys:
        return None
    mask = torch.full((queries, keys), float("-inf"), dtype=query.dtype, device=query.device)
    return mask.triu(keys - queries + 1)


class _SegmentAttention(torch.autograd.Function):
    """Attention over the segments of a row on a CPU: torch's flash kernel forward, blocked matrix products backward.

    The backward pass of torch's kernel takes three times its forward pass, this one about one and a half times.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, segments: Sequence[Segment], scale: float
    ) -> Tensor:
        out = torch.empty_like(query)  # (H, T, D)
        logsumexp = query.new_empty(query.shape[:2], dtype=torch.float32)  # (H, T)
        groups = query.shape[0] // key.shape[0]
        for segment in segments:
            q = query[:, segment.queries]
            k, v = (segment.keys(x).repeat_interleave(groups, 0) for x in (key, value))
            mask = _bottom_right_causal_mask(q, k)
            attended, normalizers = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q[None], k[None], v[None], 0.0, mask is None, attn_mask=mask, scale=scale
            )
            out[:, segment.queries], logsumexp[:, segment.queries] = attended[0], normalizers[0]
        ctx.save_for_backward(query, key, value, out, logsumexp)
        ctx.segments, ctx.scale = segments, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dtype = grads[0].dtype
        # bfloat16 numbers multiply faster as float32 tensors than as bfloat16 tensors, and with less rounding.
        query, key, value, out, logsumexp, grad_out = (tensor.float() for tensor in (*ctx.saved_tensors, *grads))
        grad_query, grad_key, grad_value = (torch.zeros_like(x) for x in (query, key, value))
        delta = (grad_out * out).sum(-1)  # (H, T)
        with bfloat16_products() if dtype == torch.bfloat16 else contextlib.nullcontext():
            for segment in ctx.segments:
                q, grad, lse, shift = (x[:, segment.queries] for x in (query, grad_out, logsumexp, delta))
                grad_query[:, segment.queries], *grad_kv = _segment_gradients(
                    q, grad, lse, shift, segment.keys(key), segment.keys(value), ctx.scale
                )
                for total, part in zip((grad_key, grad_value), grad_kv, strict=True):
                    prompt = segment.prompt.stop - segment.prompt.start
                    total[:, segment.prompt] += part[:, :prompt]
                    total[:, segment.own] += part[:, prompt:]
        return grad_query.to(dtype), grad_key.to(dtype), grad_value.to(dtype), None, None


def _segment_gradients(
    query: Tensor, grad_out: Tensor, logsumexp: Tensor, delta: Tensor, key: Tensor, value: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of one segment with respect to query, key and value, per block of queries (arXiv:2205.14135, Alg. 4).

    Args:
        query, grad_out: (H, Q, D).
        logsumexp: (H, Q) log-sum-exp of the logits.
        delta: (H, Q) grad_out * out, summed over D.
        key, value: (K, S, D); the last Q entries belong to the queries.
    """
    grad_query, grad_key, grad_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
    queries, keys = query.shape[1], key.shape[1]
    for start in range(0, queries, QUERY_BLOCK):
        block = slice(start, min(start + QUERY_BLOCK, queries))
        size = block.stop - start
        visible = slice(keys - queries + block.stop)
        q, grad, lse, shift = (  # (K, H / K * size, D or 1): query heads with the same key head are stacked
            x[:, block].reshape(key.shape[0], size * query.shape[0] // key.shape[0], -1)
            for x in (query, grad_out, logsumexp, delta)
        )
        p = torch.baddbmm(lse, q, key[:, visible].transpose(1, 2), beta=-1, alpha=scale).exp_()
        p.view(-1, size, p.shape[-1])[:, :, -size:].tril_()
        grad_value[:, visible].baddbmm_(p.transpose(1, 2), grad)
        grad_logits = torch.baddbmm(shift, grad, value[:, visible].transpose(1, 2), beta=-1).mul_(p)
        grad_key[:, visible].baddbmm_(grad_logits.transpose(1, 2), q, alpha=scale)
        grad_query[:, block] = (grad_logits @ key[:, visible]).mul_(scale).view(-1, size, query.shape[-1])
    return grad_query, grad_key, grad_value
