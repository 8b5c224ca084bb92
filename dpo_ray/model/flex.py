"""Attention over packed rows on a GPU: flex_attention with a block mask, which skips the blocks nobody sees.

The mask is worked out from the spans on the host, a block at a time; T x T entries exist nowhere.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from dpo_ray.data.packing import Span

FLEX = "dpo_ray_flex"
"""The name of ``flex_packed_attention`` in transformers' table of attention functions."""
BLOCK = 128
"""Tokens of a block on both sides, flex_attention's own choice."""


class Blocks(NamedTuple):
    """Which blocks of keys each block of queries looks at; Q = K = blocks of the row."""

    partial: np.ndarray
    """(Q, K) bool: some of the block's pairs are seen, and the mask decides which."""
    full: np.ndarray
    """(Q, K) bool: all of them are; no mask is needed."""


class Limits(NamedTuple):
    """What token i of a row sees of the tokens up to itself: from ``span`` to ``prompt_end``, and from ``part`` on."""

    span: np.ndarray
    """(T,) first token of its span."""
    prompt_end: np.ndarray
    """(T,) first token behind its span's prompt."""
    part: np.ndarray
    """(T,) first token of its own prompt or completion."""


def token_limits(spans: Sequence[Span]) -> Limits:
    """Who attends to whom in a row of ``spans``, as three numbers a token."""
    lengths = np.array(spans, np.int64).reshape(-1, 3)  # (S, 3)
    ends = lengths.cumsum().reshape(-1, 3)
    starts = ends - lengths
    tokens = lengths.sum(1)
    return Limits(starts[:, 0].repeat(tokens), ends[:, 0].repeat(tokens), starts.ravel().repeat(lengths.ravel()))


def visible_blocks(limits: Limits, block: int = BLOCK) -> Blocks:
    """The blocks of a row that hold something to see.

    Args:
        limits: of the row's T tokens; the last block may be short.
        block: tokens of a block.
    """
    span, prompt_end, part = (limit[:, None] for limit in limits)  # (T, 1)
    tokens = len(limits.span)
    blocks = -(-tokens // block)
    here = np.arange(1, tokens + 1)[:, None]  # a token sees itself
    begin = np.arange(blocks) * block  # (K,)
    end = begin + block
    prompt_seen = np.minimum(prompt_end, here)
    seen = ((begin < prompt_seen) & (end > span)) | ((begin < here) & (end > part))  # (T, K)
    # A first completion follows its prompt: what it sees is one stretch.
    from_span = np.where(part <= prompt_end, here, prompt_seen)
    whole = ((begin >= span) & (end <= from_span)) | ((begin >= part) & (end <= here))
    first_of_block = np.arange(0, tokens, block)
    some = np.logical_or.reduceat(seen, first_of_block)
    full = np.logical_and.reduceat(whole, first_of_block)
    return Blocks(some & ~full, full)


def span_mask(spans: Sequence[Span], device: torch.device) -> BlockMask:
    """The mask of a row of ``spans`` for flex_attention."""
    limits = token_limits(spans)
    partial, full = visible_blocks(limits)
    span, prompt_end, part = (torch.from_numpy(limit.astype(np.int32)).to(device) for limit in limits)

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        of_prompt = (key >= span[query]) & (key < prompt_end[query])
        return (key <= query) & (of_prompt | (key >= part[query]))

    tokens = len(limits.span)
    return BlockMask.from_kv_blocks(
        *_listed(partial, device), *_listed(full, device), BLOCK, visible, seq_lengths=(tokens, tokens)
    )


def _listed(blocks: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """(1, 1, Q) how many blocks of keys, and (1, 1, Q, K) which, those that count first."""
    which = np.argsort(~blocks, axis=1, kind="stable").astype(np.int32)
    counts = blocks.sum(1).astype(np.int32)
    return torch.from_numpy(counts)[None, None].to(device), torch.from_numpy(which)[None, None].to(device)


def use_flex_attention() -> str:
    """Enter ``flex_packed_attention`` into transformers' table; returns its name there."""
    from transformers import AttentionInterface

    AttentionInterface.register(FLEX, flex_packed_attention)
    return FLEX


def flex_packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    spans: BlockMask | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention within the spans of one row, as transformers calls it.

    Args:
        module: the attention layer.
        query: (1, H, T, D).
        key, value: (1, H / groups, T, D).
        attention_mask: not used.
        spans: ``span_mask`` of the row.
        scaling: of the logits; by default 1 / sqrt(D).
        dropout: not used; dropout is off in preference training.
        kwargs: what else the architecture passes.

    Returns:
        (1, T, H, D), and None for the weights.

    Raises:
        NotImplementedError: the architecture's attention is more than softmax of scaled products, it does not hand
            the spans down, or gradients are wanted on a CPU.
    """
    if spans is None or any(kwargs.get(name) is not None for name in ("softcap", "s_aux", "position_bias")):
        raise NotImplementedError(
            f"{type(module).__name__} cannot run on packed rows without a mask; set model.attention: sdpa"
        )
    if query.device.type == "cpu" and query.requires_grad:
        raise NotImplementedError(
            "model.attention: flex has no gradients on a CPU; set model.attention: auto (or sdpa)"
        )
    attend = flex_attention if query.device.type == "cpu" else _compiled()
    grouped = query.shape[1] != key.shape[1]
    out = attend(query, key, value, block_mask=spans, scale=scaling, enable_gqa=grouped)
    return out.transpose(1, 2), None


@functools.cache
def _compiled() -> Any:
    """flex_attention compiled once for rows of any length; uncompiled it would make all T x T scores."""
    # Selective recomputation keeps only results that it sees.
    return torch.compile(flex_attention, dynamic=True, options={"wrap_inductor_compiled_regions": True})
