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

from dpo_ray.data.packing import Limits, Span, to_device, token_limits
from dpo_ray.ops.attention import Gather

FLEX = "dpo_ray_flex"
"""The name of ``flex_packed_attention`` in transformers' table of attention functions."""
BLOCK = 128
"""Tokens of a block on both sides, flex_attention's own choice."""
# Rows below 128 tokens would go to the kernel for decoding, which has no configuration for some groups of query heads.
KERNEL_OPTIONS: Any = {"FORCE_USE_FLEX_ATTENTION": True}


class Blocks(NamedTuple):
    """Which blocks of keys each block of queries looks at; Q = blocks of queries, K = of the row."""

    partial: np.ndarray
    """(Q, K) bool: some of the block's pairs are seen, and the mask decides which."""
    full: np.ndarray
    """(Q, K) bool: all of them are; no mask is needed."""


def visible_blocks(limits: Limits, keys: int, block: int = BLOCK) -> Blocks:
    """The blocks of a row that hold something to see.

    Args:
        limits: of the T tokens that look.
        keys: tokens of the row, which they look at.
        block: tokens of a block; the last one on either side may be short.
    """
    here, span, prompt_end, part = (limit[:, None] for limit in limits)  # (T, 1)
    begin = np.arange(0, keys, block)  # (K,)
    end = begin + block
    behind = here + 1  # a token sees itself
    prompt_seen = np.minimum(prompt_end, behind)
    seen = ((begin < prompt_seen) & (end > span)) | ((begin < behind) & (end > part))  # (T, K)
    # A first completion follows its prompt: what it sees is one stretch.
    from_span = np.where(part <= prompt_end, behind, prompt_seen)
    whole = ((begin >= span) & (end <= from_span)) | ((begin >= part) & (end <= behind))
    first_of_block = np.arange(0, len(here), block)
    some = np.logical_or.reduceat(seen, first_of_block)
    full = np.logical_and.reduceat(whole, first_of_block)
    return Blocks(some & ~full, full)


def span_mask(spans: Sequence[Span], device: torch.device, queries: np.ndarray | None = None) -> BlockMask:
    """The mask of a row of ``spans`` for flex_attention.

    Args:
        spans: of the row.
        device: where it is wanted.
        queries: positions of the tokens that look, if not all of the row do.
    """
    limits = token_limits(spans)
    keys = len(limits.here)
    limits = limits if queries is None else limits.of(queries)
    partial, full = visible_blocks(limits, keys)
    here, span, prompt_end, part = (to_device(torch.from_numpy(limit.astype(np.int32)), device) for limit in limits)

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        of_prompt = (key >= span[query]) & (key < prompt_end[query])
        return (key <= here[query]) & (of_prompt | (key >= part[query]))

    return BlockMask.from_kv_blocks(
        *_listed(partial, device), *_listed(full, device), BLOCK, visible, seq_lengths=(len(limits.here), keys)
    )


def _listed(blocks: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """(1, 1, Q) how many blocks of keys, and (1, 1, Q, K) which, those that count first."""
    which = np.argsort(~blocks, axis=1, kind="stable").astype(np.int32)
    counts = blocks.sum(1).astype(np.int32)
    return to_device(torch.from_numpy(counts), device)[None, None], to_device(torch.from_numpy(which), device)[
        None, None
    ]


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
    gather: Gather | None = None,
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
        gather: where ranks share the row, what makes keys and values of the row of those of T of its tokens.
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
    if gather is not None:
        key, value = gather(key, value)
    attend = flex_attention if query.device.type == "cpu" else _compiled()
    grouped = query.shape[1] != key.shape[1]
    out = attend(query, key, value, block_mask=spans, scale=scaling, enable_gqa=grouped, kernel_options=KERNEL_OPTIONS)
    return out.transpose(1, 2), None


@functools.cache
def _compiled() -> Any:
    """flex_attention compiled once for rows of any length; uncompiled it would make all T x T scores."""
    # Selective recomputation keeps only results that it sees.
    return torch.compile(flex_attention, dynamic=True, options={"wrap_inductor_compiled_regions": True})
