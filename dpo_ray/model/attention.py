"""Attention over packed rows: each span of a row attends to itself, and no time goes into what is masked.

On a CPU every span is two calls of torch's flash kernel: prompt and first completion, causal; second completion over
prompt and itself. Nothing of size T x T is ever made, and half of it never computed.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpo_ray.data.packing import Span

PACKED = "dpo_ray_packed"
"""The name of ``packed_attention`` in transformers' table of attention functions."""


def use_packed_attention() -> str:
    """Enter ``packed_attention`` into transformers' table; returns its name there."""
    from transformers import AttentionInterface

    AttentionInterface.register(PACKED, packed_attention)
    return PACKED


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    spans: Sequence[Span] | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention within the spans of one row, as transformers calls it.

    Args:
        module: the attention layer.
        query: (1, H, T, D).
        key, value: (1, H / groups, T, D).
        attention_mask: not used; the spans say who attends to whom.
        spans: of the row; T tokens in all.
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
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    cuts = [part for span in spans for part in (span.prompt + span.first, span.second) if part]
    parts = iter(zip(query.split(cuts, 2), key.split(cuts, 2), value.split(cuts, 2), strict=True))
    out = []
    for span in spans:
        q, k, v = next(parts)
        out.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling))
        if span.second:
            q, own_k, own_v = next(parts)
            k = torch.cat((k[:, :, : span.prompt], own_k), 2)
            v = torch.cat((v[:, :, : span.prompt], own_v), 2)
            out.append(F.scaled_dot_product_attention(q, k, v, attn_mask=_after_prompt(span, q), scale=scaling))
    return torch.cat(out, 2).transpose(1, 2), None


def _after_prompt(span: Span, like: Tensor) -> Tensor:
    """(second, prompt + second) additive mask: all of the prompt, and earlier tokens of the completion itself."""
    shape = (span.second, span.prompt + span.second)
    return torch.full(shape, float("-inf"), dtype=like.dtype, device=like.device).triu(span.prompt + 1)
