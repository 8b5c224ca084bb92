"""Attention over packed rows with torch's own kernels: masked query-key blocks are never computed.

A span is causal segments: the prompt with the first completion, and each further completion, which also attends to the
prompt. Each segment is one kernel call, so no (T, T) tensor exists and half of it is never computed. Layers with
local attention split segments further, so that keys outside the window are not computed.

T = tokens of the row, H = query heads, K = key heads, D = head size
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpo_ray.data.packing import Span
from dpo_ray.objective.precision import ProductPath, rounded_inputs
from dpo_ray.ops import attention_bfloat16
from dpo_ray.ops.blocks import FLOAT_QUERY_BLOCK, QUERY_BLOCK, SegmentTensors, mask_probs_, query_blocks, stack
from dpo_ray.ops.windows import Window, layer_window

PACKED = "dpo_ray_packed"
"""Name of ``packed_attention`` in transformers' ``AttentionInterface``."""
MASKED = "dpo_ray_masked"
"""Name of torch's sdpa with a dense mask over the packed row."""
GatherKV = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Context parallelism: (keys, values) of the local tokens, (1, K, t, D) -> those of the row, (1, K, T, D)."""


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
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    product_path: ProductPath = "rounded",
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention within the spans of one row, with the signature that transformers calls.

    Args:
        query: (1, H, T, D); with context parallelism (1, H, t, D), like key and value.
        key, value: (1, K, T, D).
        attention_mask: must be None; ``spans`` determine the keys that a query attends to.
        spans: spans of the row, T tokens in total.
        query_slices: the local tokens as slices of the row; None if all tokens are local.
        gather_kv: gathers keys and values over the context-parallel ranks; None if all tokens are local.
        scaling: scale of the logits; defaults to 1 / sqrt(D).
        sliding_window: see ``layer_window``.
        softcap: logits x become softcap * tanh(x / softcap), before the mask (Gemma 2, arXiv:2408.00118, section 2).
        s_aux: (H,) sinks: logits of one more key per head, without a value (gpt-oss, arXiv:2508.10925, section 2.2).
        product_path: path of the backward pass of bfloat16 tensors on a CPU; see ``Products``.
        kwargs: see ``validate_attention_call``; ``dropout`` is off in preference training and ignored.

    Returns:
        (1, T, H, D), and None in place of the attention weights.

    Raises:
        NotImplementedError: see ``validate_attention_call``.
    """
    validate_attention_call(module, spans, attention_mask, kwargs)
    assert spans is not None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if gather_kv is not None:
        key, value = gather_kv(key, value)
    segments = tuple(causal_segments(spans, query_slices, layer_window(module, sliding_window)))
    if query.device.type == "cpu" and query.shape[-1] == value.shape[-1]:
        out = _SegmentAttention.apply(query[0], key[0], value[0], s_aux, segments, scale, softcap, product_path)[None]
    elif softcap is not None or s_aux is not None:
        raise NotImplementedError(
            f"{type(module).__name__} caps its logits or has sinks, which packed rows allow on CPUs only, with keys "
            "and values of one size; set model.attention: padded"
        )
    else:
        out = torch.cat([_attend(query, key, value, segment, scale) for segment in segments], 2)
    return out.transpose(1, 2), None


def validate_attention_call(
    module: nn.Module, spans: object, attention_mask: Tensor | None, kwargs: Mapping[str, Any]
) -> None:
    """Raise NotImplementedError if an architecture needs more than softmax attention or does not pass ``spans`` on."""
    if attention_mask is not None:  # transformers creates none for attention of other names than its own
        raise NotImplementedError(
            f"{type(module).__name__} has a mask of its own, which packed rows cannot have; set model.attention: padded"
        )
    if spans is None or kwargs.get("position_bias") is not None:
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
    window: int = 0
    """Each query attends to at most this many of the keys, the last ones; 0 is no limit."""

    def keys(self, row: Tensor) -> Tensor:
        """Entries of the prompt and of the segment, (..., S, D), of a tensor over the row, (..., T, D)."""
        own = row[..., self.own, :]
        return own if self.prompt.start == self.prompt.stop else torch.cat((row[..., self.prompt, :], own), -2)


def causal_segments(
    spans: Sequence[Span], query_slices: Sequence[slice] | None = None, window: Window | None = None
) -> Iterator[Segment]:
    """Segments of a row in the order of the queries; together they cover all queries; see ``packed_attention``."""
    offset = 0
    for local in query_slices or [slice(0, sum(map(sum, spans)))]:
        for prompt, own in _prompts_and_segments(spans):
            start, stop = max(own.start, local.start), min(own.stop, local.stop)
            if start < stop:
                first = offset + start - local.start
                segment = Segment(prompt, slice(own.start, stop), slice(first, first + stop - start))
                yield from [segment] if window is None else _local_segments(segment, window)
        offset += local.stop - local.start


def _local_segments(segment: Segment, window: Window) -> Iterator[Segment]:
    """Split a segment by queries, each part with the keys of its window."""
    (prompt, own, queries, _), size = segment, window.size
    behind_prompt = prompt.stop - prompt.start  # position of the first of the segment's own tokens
    end = behind_prompt + own.stop - own.start
    first = start = end - (queries.stop - queries.start)
    while start < end:
        if window.chunked:
            stop = min((start // size + 1) * size, end)
        else:  # up to ``size``, tokens attend to all earlier ones, and kernels need no mask
            stop = min(size if start < size else start + QUERY_BLOCK, end)
        seen = window.start(start)
        yield Segment(
            slice(prompt.start + min(seen, behind_prompt), prompt.stop),
            slice(own.start + max(seen - behind_prompt, 0), own.start + stop - behind_prompt),
            slice(queries.start + start - first, queries.start + stop - first),
            0 if window.chunked else size,
        )
        start = stop


def _prompts_and_segments(spans: Sequence[Span]) -> Iterator[tuple[slice, slice]]:
    """(prompt, own) of each segment, as slices of the row; see ``Segment``."""
    start = 0
    for span in spans:
        prompt_end = end = start + span.prompt
        yield slice(start, start), slice(start, end := end + sum(span.completions[:1]))
        for completion in span.completions[1:]:
            yield slice(start, prompt_end), slice(end, end := end + completion)
        start = end


def _attend(query: Tensor, key: Tensor, value: Tensor, segment: Segment, scale: float) -> Tensor:
    q, k, v = query[:, :, segment.queries], segment.keys(key), segment.keys(value)
    mask = _bottom_right_causal_mask(q, k, segment.window)
    if mask is not None:
        # No fused kernel takes a mask with grouped heads: the fallback materializes all logits.
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
    )


def _bottom_right_causal_mask(query: Tensor, key: Tensor, window: int) -> Tensor | None:
    """(queries, keys) additive mask, causal from the bottom right corner; None if square, where kernels need none."""
    queries, keys = query.shape[-2], key.shape[-2]
    if queries == keys and not 0 < window < keys:
        return None
    hidden = _hidden(queries, keys, window, query.device)
    return torch.zeros(hidden.shape, dtype=query.dtype, device=query.device).masked_fill_(hidden, float("-inf"))


def _hidden(queries: int, keys: int, window: int, device: torch.device) -> Tensor:
    """(queries, keys) bool: keys behind the query, or out of its window; the last key is that of the last query."""
    distance = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
    return (distance < 0) | (distance >= window) if window else distance < 0


class _SegmentAttention(torch.autograd.Function):
    """Attention over the segments of a row on a CPU: torch's flash kernel forward, blocked matrix products backward.

    The backward pass of torch's kernel takes three times its forward pass, this one about one and a half times. A sink
    only scales the result and adds to the normalizer.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None,
        segments: Sequence[Segment],
        scale: float,
        softcap: float | None,
        path: ProductPath,
    ) -> Tensor:
        out = torch.empty_like(query)  # (H, T, D)
        logsumexp = query.new_empty(query.shape[:2], dtype=torch.float32)  # (H, T)
        groups = query.shape[0] // key.shape[0]
        for segment in segments:
            q, k, v = query[:, segment.queries], segment.keys(key), segment.keys(value)
            if softcap is None:
                k, v = (x.repeat_interleave(groups, 0) for x in (k, v))
                mask = _bottom_right_causal_mask(q, k, segment.window)
                attended, normalizers = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                    q[None], k[None], v[None], 0.0, mask is None, attn_mask=mask, scale=scale
                )
                out[:, segment.queries], logsumexp[:, segment.queries] = attended[0], normalizers[0]
            else:
                q, k, v = q.float(), k.float(), v.float()
                out[:, segment.queries], logsumexp[:, segment.queries] = _capped_segment(
                    q, k, v, segment.window, scale, softcap
                )
        if sinks is not None:
            with_sinks = torch.logaddexp(logsumexp, sinks.float()[:, None])
            out.mul_((logsumexp - with_sinks).exp_()[..., None])
            logsumexp = with_sinks
        ctx.save_for_backward(query, key, value, out, logsumexp, sinks)
        ctx.segments, ctx.scale, ctx.softcap, ctx.path = segments, scale, softcap, path
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, out, logsumexp, sinks = ctx.saved_tensors
        dtype = out.dtype
        tensors.append(grads[0])
        delta = (grads[0].float() * out).sum(-1)  # (H, T)
        gradients: Callable[[SegmentTensors, float], tuple[Tensor, Tensor, Tensor]]
        if dtype == torch.bfloat16 and ctx.path == "bfloat16" and ctx.softcap is None:
            gradients = attention_bfloat16.segment_gradients
        else:
            gradients = partial(_segment_gradients, softcap=ctx.softcap)
            tensors = [tensor.float() for tensor in tensors]
        query, key, value, grad_out = tensors
        grad_query, grad_key, grad_value = (torch.zeros(x.shape, dtype=torch.float32) for x in (query, key, value))
        with rounded_inputs(ctx.path) if dtype == torch.bfloat16 else contextlib.nullcontext():
            for segment in ctx.segments:
                queries = segment.queries
                of_segment = SegmentTensors(
                    query[:, queries], segment.keys(key), segment.keys(value), grad_out[:, queries],
                    logsumexp[:, queries], delta[:, queries], segment.window,
                )  # fmt: skip
                grad_query[:, queries], *grad_kv = gradients(of_segment, ctx.scale)
                for total, part in zip((grad_key, grad_value), grad_kv, strict=True):
                    prompt = segment.prompt.stop - segment.prompt.start
                    total[:, segment.prompt] += part[:, :prompt]
                    total[:, segment.own] += part[:, prompt:]
        grad_sinks = None
        if sinks is not None:
            grad_sinks = -((sinks.float()[:, None] - logsumexp).exp_() * delta).sum(1).to(sinks.dtype)
        return grad_query.to(dtype), grad_key.to(dtype), grad_value.to(dtype), grad_sinks, *[None] * 4


def _capped_segment(
    query: Tensor, key: Tensor, value: Tensor, window: int, scale: float, softcap: float
) -> tuple[Tensor, Tensor]:
    """(H, Q, D) attention of one segment with capped logits, and (H, Q) log-sum-exp; see ``_segment_gradients``."""
    out, logsumexp = torch.empty_like(query), query.new_empty(query.shape[:2])
    for block, visible in query_blocks(query.shape[1], key.shape[1], FLOAT_QUERY_BLOCK):
        q = query[:, block]
        logits = stack(q, len(key)) @ key[:, visible].transpose(1, 2)
        logits.mul_(scale / softcap).tanh_().mul_(softcap)
        by_head = logits.view(len(query), q.shape[1], -1)
        by_head.masked_fill_(_hidden(q.shape[1], by_head.shape[2], window, q.device), float("-inf"))
        lse = logits.logsumexp(-1, keepdim=True)
        out[:, block] = (logits.sub_(lse).exp_() @ value[:, visible]).view_as(q)
        logsumexp[:, block] = lse.view(q.shape[:2])
    return out, logsumexp


def _segment_gradients(
    tensors: SegmentTensors, scale: float, *, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """``attention_bfloat16.segment_gradients`` in products of float32 tensors."""
    query, key, value, grad_out, logsumexp, delta, window = tensors
    grad_query, grad_key, grad_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
    for block, visible in query_blocks(query.shape[1], key.shape[1], FLOAT_QUERY_BLOCK):
        q, grad, lse, shift = (stack(x[:, block], len(key)) for x in (query, grad_out, logsumexp, delta))
        visible_keys = key[:, visible].transpose(1, 2)
        if softcap is None:
            slope = None
            p = torch.baddbmm(lse, q, visible_keys, beta=-1, alpha=scale).exp_()
        else:
            capped = (q @ visible_keys).mul_(scale / softcap).tanh_()
            p = torch.exp(softcap * capped - lse)
            slope = capped.square_().neg_().add_(1)  # d tanh(x) / dx
        mask_probs_(p, len(query), block, visible, window)
        grad_value[:, visible].baddbmm_(p.transpose(1, 2), grad)
        grad_logits = torch.baddbmm(shift, grad, value[:, visible].transpose(1, 2), beta=-1).mul_(p)
        if slope is not None:
            grad_logits.mul_(slope)
        grad_key[:, visible].baddbmm_(grad_logits.transpose(1, 2), q, alpha=scale)
        grad_query[:, block] = (grad_logits @ key[:, visible]).mul_(scale).view(len(query), -1, query.shape[-1])
    return grad_query, grad_key, grad_value
