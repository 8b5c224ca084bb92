"""Blocks of queries of one segment: attention holds the logits of one block at a time.

H = query heads, K = key heads, D = head size, Q = queries of the segment, S = its keys, q = queries of a block,
s = keys that they see
"""

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

QUERY_BLOCK = 128
"""Queries per block of bfloat16 products on a CPU; probabilities exist for one block at a time."""
FLOAT_QUERY_BLOCK = 64
"""The same for float32 products, whose probabilities take twice the memory."""


class SegmentTensors(NamedTuple):
    """Tensors of one segment for its backward pass."""

    query: Tensor
    """(H, Q, D)"""
    key: Tensor
    """(K, S, D); the last Q entries belong to the queries."""
    value: Tensor
    """(K, S, D)"""
    grad_out: Tensor
    """(H, Q, D)"""
    logsumexp: Tensor
    """(H, Q) log-sum-exp of the logits, including the sink; float32."""
    delta: Tensor
    """(H, Q) grad_out * out, summed over D; float32."""
    window: int
    """As in ``Segment``."""


def query_blocks(queries: int, keys: int, size: int) -> Iterator[tuple[slice, slice]]:
    """Blocks of queries, each with the keys up to its last query, as slices; the last keys belong to the queries."""
    for start in range(0, queries, size):
        stop = min(start + size, queries)
        yield slice(start, stop), slice(keys - queries + stop)


def stack(x: Tensor, key_heads: int) -> Tensor:
    """(H, q) or (H, q, D) -> (K, H / K * q, 1 or D): query heads with the same key head are stacked."""
    return x.reshape(key_heads, x.shape[0] // key_heads * x.shape[1], -1)


def mask_probs_(p: Tensor, heads: int, block: slice, visible: slice, window: int) -> Tensor:
    """Zero, in place, the probabilities of keys after the query or outside its window.

    Args:
        p: (K, H / K * q, s) probabilities.
        heads: H.
        block, visible: as in ``query_blocks``.
        window: as in ``Segment``.
    """
    size = block.stop - block.start
    by_head = p.view(heads, size, -1)
    by_head[:, :, -size:].tril_()
    first = visible.stop - size - window + 1  # first key of the first query
    if window and first + size > 1:
        by_head[:, :, : first + size].triu_(first)
    return p
