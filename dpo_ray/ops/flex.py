"""Attention over packed rows on a GPU: flex_attention with a block mask that skips blocks without visible keys.

The block mask is computed from the spans on the host, per block; no (T, T) tensor exists anywhere.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from dpo_ray.data.packing import Limits, Span, to_device, token_limits
from dpo_ray.ops.attention import GatherKV, validate_attention_call
from dpo_ray.ops.windows import Window, layer_window

FLEX = "dpo_ray_flex"
"""Name of ``flex_packed_attention`` in transformers' ``AttentionInterface``."""
BLOCK = 128
"""Queries and keys per block, flex_attention's default."""
# Rows below 128 tokens would get the decoding kernel, which has no configuration for some numbers of query heads.
KERNEL_OPTIONS: Any = {"FORCE_USE_FLEX_ATTENTION": True}


class VisibleBlocks(NamedTuple):
    """Blocks of keys that each block of queries attends to; Q, K = number of query and key blocks."""

    partial: np.ndarray
    """(Q, K) bool: some queries of the block attend to some of its keys; the mask is evaluated."""
    full: np.ndarray
    """(Q, K) bool: all queries attend to all keys; no mask is needed."""


def visible_blocks(limits: Limits, keys: int, block: int = BLOCK) -> VisibleBlocks:
    """Blocks of a row with visible keys.

    Args:
        limits: limits of the T queries.
        keys: keys, one per token of the row.
        block: queries and keys per block; the last block of either may be shorter.
    """
    position, span, prompt_end, part = (limit[:, None] for limit in limits)  # (T, 1)
    start = np.arange(0, keys, block)  # (K,)
    stop = start + block
    causal_end = position + 1  # a token attends to itself
    prompt_visible_end = np.minimum(prompt_end, causal_end)
    in_prompt = (start < prompt_visible_end) & (stop > span) & (span < prompt_visible_end)
    some = in_prompt | ((start < causal_end) & (stop > part))  # (T, K)
    # A first completion follows its prompt directly: the keys that it attends to are one range.
    range_end = np.where(part <= prompt_end, causal_end, prompt_visible_end)
    every = ((start >= span) & (stop <= range_end)) | ((start >= part) & (stop <= causal_end))
    block_starts = np.arange(0, len(position), block)
    some = np.logical_or.reduceat(some, block_starts)
    every = np.logical_and.reduceat(every, block_starts)
    return VisibleBlocks(some & ~every, every)


def local_limits(limits: Limits, window: Window) -> Limits:
    """Limits of the tokens of a row in a layer with local attention: ``span`` and ``part`` move to the window."""
    prompt = np.where(limits.in_completion, limits.prompt_end - limits.span, 0)
    start = window.start(limits.seen - 1)  # (T,) first visible position in prompt and completion
    return limits._replace(
        span=np.minimum(limits.span + start, limits.prompt_end), part=limits.part + np.maximum(start - prompt, 0)
    )


def span_masks(
    spans: Sequence[Span],
    windows: Iterable[Window | None],
    device: torch.device,
    queries: np.ndarray | None = None,
) -> dict[Window | None, BlockMask]:
    """``span_mask`` for each distinct window of a model's layers."""
    return {window: span_mask(spans, device, queries, window) for window in windows}


def span_mask(
    spans: Sequence[Span], device: torch.device, queries: np.ndarray | None = None, window: Window | None = None
) -> BlockMask:
    """flex_attention's block mask of a row.

    Args:
        queries: (t,) positions of the local tokens in the row; None for all tokens.
        window: of the layer; None for full causal attention.
    """
    limits = token_limits(spans)
    if window is not None:
        limits = local_limits(limits, window)
    keys = len(limits.here)
    limits = limits if queries is None else limits.of(queries)
    blocks = visible_blocks(limits, keys)
    position, span, prompt_end, part = (to_device(torch.from_numpy(limit.astype(np.int32)), device) for limit in limits)

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        in_prompt = (key >= span[query]) & (key < prompt_end[query])
        return (key <= position[query]) & (in_prompt | (key >= part[query]))

    partial, full = _block_indices(blocks.partial, device), _block_indices(blocks.full, device)
    return BlockMask.from_kv_blocks(*partial, *full, BLOCK, visible, seq_lengths=(len(limits.here), keys))


def _block_indices(blocks: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """(1, 1, Q) number of key blocks of each query block, and (1, 1, Q, K) their indices, padded by the others."""
    indices = np.argsort(~blocks, axis=1, kind="stable").astype(np.int32)
    counts = blocks.sum(1).astype(np.int32)
    counts, indices = (to_device(torch.from_numpy(x), device)[None, None] for x in (counts, indices))
    return counts, indices


def flex_packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    spans: Mapping[Window | None, BlockMask] | None = None,
    gather_kv: GatherKV | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """``packed_attention`` with ``span_masks`` of the row as ``spans``; arguments and shapes are the same.

    Raises:
        NotImplementedError: see ``validate_attention_call``; also raised for gradients on a CPU.
    """
    validate_attention_call(module, spans, attention_mask, kwargs)
    assert spans is not None
    if query.device.type == "cpu" and query.requires_grad:
        raise NotImplementedError(
            "model.attention: flex has no gradients on a CPU; set model.attention: auto (or sdpa)"
        )
    if gather_kv is not None:
        key, value = gather_kv(key, value)
    attend: Any = flex_attention if query.device.type == "cpu" else _compiled_flex_attention()
    out = attend(
        query,
        key,
        value,
        score_mod=None if softcap is None else _softcap(softcap),
        block_mask=spans[layer_window(module, sliding_window)],
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
        kernel_options=KERNEL_OPTIONS,
        return_aux=None if s_aux is None else AuxRequest(lse=True),
    )
    if s_aux is not None:
        out, aux = out
        # A sink has no value: it only adds to the normalizer.
        out = out * torch.sigmoid(aux.lse - s_aux[:, None])[..., None].to(out.dtype)
    return out.transpose(1, 2), None


@functools.cache
def _softcap(softcap: float) -> Callable[..., Tensor]:
    """flex_attention's modification of logits; the same function for equal caps, so that it is compiled once."""
    constant = str(softcap)  # a captured float would be an argument of the kernel, which takes none

    def capped(logit: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        cap = float(constant)
        return cap * torch.tanh(logit / cap)

    return capped


@functools.cache
def _compiled_flex_attention() -> Any:
    """flex_attention, compiled once for rows of any length; uncompiled it would materialize all (T, T) logits."""
    # Wrapping makes the compiled kernel one operation, whose result selective checkpointing can save.
    return torch.compile(flex_attention, dynamic=True, options={"wrap_inductor_compiled_regions": True})
