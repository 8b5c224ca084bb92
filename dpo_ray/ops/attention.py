"""Attention over packed rows: each span of a row attends to itself, and no time goes into what is masked.

A span is two stretches of causal attention: prompt and first completion; second completion over prompt and itself.
Nothing of size T x T is ever made, and half of it never computed.

T = tokens of the row, H = query heads, K = key heads, D = size of a head
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpo_ray.data.packing import Span
from dpo_ray.objective.precision import bfloat16_products

PACKED = "dpo_ray_packed"
"""The name of ``packed_attention`` in transformers' table of attention functions."""
Gather = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Keys and values, (1, K, t, D), of some tokens of a row -> (1, K, T, D) of all, where other ranks have the rest."""
BLOCK = 128
"""Queries whose probabilities exist at a time in the backward pass on a CPU."""


def use_packed_attention() -> str:
    """Enter ``packed_attention`` into transformers' table; returns its name there."""
    from transformers import AttentionInterface

    AttentionInterface.register(PACKED, packed_attention)
    return PACKED


@torch.compiler.disable(reason="each row has spans of its own, and each would be compiled")
def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    spans: Sequence[Span] | None = None,
    pieces: Sequence[slice] | None = None,
    gather: Gather | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention within the spans of one row, as transformers calls it.

    Args:
        module: the attention layer.
        query: (1, H, T, D).
        key, value: (1, K, T, D).
        attention_mask: not used; the spans say who attends to whom.
        spans: of the row; T tokens in all, unless ranks share it.
        pieces: where ranks share the row, which of its tokens these T are.
        gather: where ranks share the row, what makes keys and values of the row of those of T of its tokens.
        scaling: of the logits; by default 1 / sqrt(D).
        dropout: not used; dropout is off in preference training.
        kwargs: what else the architecture passes.

    Returns:
        (1, T, H, D), and None for the weights.

    Raises:
        NotImplementedError: the architecture's attention is more than softmax of scaled products, or it does not hand
            the spans down.
    """
    if spans is None or any(kwargs.get(name) is not None for name in ("softcap", "s_aux", "position_bias")):
        raise NotImplementedError(
            f"{type(module).__name__} cannot run on packed rows without a mask; set model.attention: sdpa"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if gather is not None:
        key, value = gather(key, value)
    found = tuple(stretches(spans, pieces))
    if query.device.type == "cpu" and query.shape[-1] == value.shape[-1]:
        out = _SpanAttention.apply(query[0], key[0], value[0], found, scale)[None]
    else:
        out = torch.cat([_attend(query, key, value, stretch, scale) for stretch in found], 2)
    return out.transpose(1, 2), None


class Stretch(NamedTuple):
    """Tokens that attend causally to themselves and to tokens before them."""

    prompt: slice
    """Of the row; empty where the prompt is part of what follows."""
    own: slice
    """Of the row."""
    queries: slice
    """Which queries are the last of ``own``; all of it where the queries are those of the row."""

    def keys(self, of: Tensor) -> Tensor:
        """(..., tokens of the prompt + tokens of its own, D) of a tensor over the row, (..., T, D)."""
        own = of[..., self.own, :]
        return own if self.prompt.start == self.prompt.stop else torch.cat((of[..., self.prompt, :], own), -2)


def stretches(spans: Sequence[Span], pieces: Sequence[slice] | None = None) -> Iterator[Stretch]:
    """The stretches of a row, in the order of its queries; together they cover them.

    Args:
        spans: of the row.
        pieces: which tokens of the row the queries are, one piece after another; by default all.
    """
    before = 0
    for piece in pieces or [slice(0, sum(map(sum, spans)))]:
        for prompt, own in _causal(spans):
            start, stop = max(own.start, piece.start), min(own.stop, piece.stop)
            if start < stop:
                at = before + start - piece.start
                yield Stretch(prompt, slice(own.start, stop), slice(at, at + stop - start))
        before += piece.stop - piece.start


def _causal(spans: Sequence[Span]) -> Iterator[tuple[slice, slice]]:
    """A prompt and what attends to it and causally to itself; the prompt is empty where it is part of the latter."""
    start = 0
    for span in spans:
        first, end = start + span.prompt + span.first, start + sum(span)
        yield slice(start, start), slice(start, first)
        yield slice(start, start + span.prompt), slice(first, end)
        start = end


def _attend(query: Tensor, key: Tensor, value: Tensor, stretch: Stretch, scale: float) -> Tensor:
    q, k, v = query[:, :, stretch.queries], stretch.keys(key), stretch.keys(value)
    mask = _after_prompt(q, k)
    if mask is not None:
        # With a mask no fused kernel takes grouped heads: all scores would be made.
        k, v = (of.repeat_interleave(q.shape[1] // of.shape[1], 1) for of in (k, v))
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
    )


def _after_prompt(query: Tensor, key: Tensor) -> Tensor | None:
    """(queries, keys) additive, where the last keys are the queries' own: they and all before; None where square."""
    queries, keys = query.shape[-2], key.shape[-2]
    if queries == keys:
        return None
    full = torch.full((queries, keys), float("-inf"), dtype=query.dtype, device=query.device)
    return full.triu(keys - queries + 1)


class _SpanAttention(torch.autograd.Function):
    """Attention over the stretches of a row on a CPU: torch's flash kernel forward, blocks of matrix products backward.

    The kernel's own backward pass takes three times its forward; this one about one and a half.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, found: Sequence[Stretch], scale: float) -> Tensor:
        out = torch.empty_like(query)  # (H, T, D)
        normalizers = query.new_empty(query.shape[:2], dtype=torch.float32)  # (H, T) log-sum-exp of the scores
        groups = query.shape[0] // key.shape[0]
        for stretch in found:
            q = query[:, stretch.queries]
            k, v = (stretch.keys(of).repeat_interleave(groups, 0) for of in (key, value))
            mask = _after_prompt(q, k)
            attended, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q[None], k[None], v[None], 0.0, mask is None, attn_mask=mask, scale=scale
            )
            out[:, stretch.queries], normalizers[:, stretch.queries] = attended[0], sums[0]
        ctx.save_for_backward(query, key, value, out, normalizers)
        ctx.found, ctx.scale = found, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dtype = grads[0].dtype
        # Products of bfloat16 numbers held as float32 take less time than those of bfloat16 tensors, and round less.
        query, key, value, out, normalizers, grad_out = (tensor.float() for tensor in (*ctx.saved_tensors, *grads))
        grad_query, grad_key, grad_value = (torch.zeros_like(of) for of in (query, key, value))
        shift = (grad_out * out).sum(-1)  # (H, T)
        with bfloat16_products() if dtype == torch.bfloat16 else contextlib.nullcontext():
            for stretch in ctx.found:
                q, upstream, sums, shifts = (of[:, stretch.queries] for of in (query, grad_out, normalizers, shift))
                grad_query[:, stretch.queries], *of_keys = _stretch_gradients(
                    q, upstream, sums, shifts, stretch.keys(key), stretch.keys(value), ctx.scale
                )
                for whole, part in zip((grad_key, grad_value), of_keys, strict=True):
                    before = stretch.prompt.stop - stretch.prompt.start
                    whole[:, stretch.prompt] += part[:, :before]
                    whole[:, stretch.own] += part[:, before:]
        return grad_query.to(dtype), grad_key.to(dtype), grad_value.to(dtype), None, None


def _stretch_gradients(
    query: Tensor, grad_out: Tensor, normalizers: Tensor, shift: Tensor, key: Tensor, value: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by query, key and value of one stretch, a block of queries at a time (arXiv:2205.14135, Algorithm 4).

    Args:
        query, grad_out: (H, Q, D).
        normalizers: (H, Q) log-sum-exp of the scores.
        shift: (H, Q) what the gradients by all scores of a query have in common: grad_out * out, summed over D.
        key, value: (K, S, D), the last Q of which belong to the queries.
        scale: of the scores.
    """
    grad_query, grad_key, grad_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
    queries, keys = query.shape[1], key.shape[1]
    for first in range(0, queries, BLOCK):
        block = slice(first, min(first + BLOCK, queries))
        size = block.stop - first
        seen = slice(keys - queries + block.stop)
        q, upstream, zero, shifts = (  # (K, H / K * size, D or 1): heads that share keys, one after another
            of[:, block].reshape(key.shape[0], size * query.shape[0] // key.shape[0], -1)
            for of in (query, grad_out, normalizers, shift)
        )
        p = torch.baddbmm(zero, q, key[:, seen].transpose(1, 2), beta=-1, alpha=scale).exp_()
        p.view(-1, size, p.shape[-1])[:, :, -size:].tril_()
        grad_value[:, seen].baddbmm_(p.transpose(1, 2), upstream)
        grad_scores = torch.baddbmm(shifts, upstream, value[:, seen].transpose(1, 2), beta=-1).mul_(p)
        grad_key[:, seen].baddbmm_(grad_scores.transpose(1, 2), q, alpha=scale)
        grad_query[:, block] = (grad_scores @ key[:, seen]).mul_(scale).view(-1, size, query.shape[-1])
    return grad_query, grad_key, grad_value
