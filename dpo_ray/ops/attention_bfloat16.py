"""Backward pass of attention in products of bfloat16 tensors, for CPUs that have instructions for them.

Logits rounded to bfloat16 would be off by 0.06 at 20. Here each product has two more columns, which subtract a number
per query before the result is rounded: the log-sum-exp from logits, and delta from the gradients of probabilities. So
the rounded result is the logarithm of a probability. It is off by at most 2^-9 of itself: least where the probability
is near 1.

H = query heads, K = key heads, D = head size, Q = queries of the segment, S = its keys
"""

import torch
from torch import Tensor

from dpo_ray.ops.blocks import QUERY_BLOCK, SegmentTensors, mask_probs_, query_blocks, stack


def segment_gradients(tensors: SegmentTensors, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of one segment with respect to query, key and value, per block of queries (arXiv:2205.14135, Alg. 4).

    Returns:
        float32 gradients, sums of products of a block that are rounded to bfloat16.
    """
    query, key, value, grad_out, logsumexp, delta, window = tensors
    heads = len(key)
    grad_query, grad_key, grad_value = (torch.zeros(x.shape, dtype=torch.float32) for x in (query, key, value))
    less_lse, less_delta = _with_subtrahend(query, logsumexp / scale), _with_subtrahend(grad_out, delta)
    wide_key, wide_value = _with_ones(key), _with_ones(value)
    empty = query.new_empty(1, 1, 1)
    for block, visible in query_blocks(query.shape[1], key.shape[1], QUERY_BLOCK):
        q, grad = stack(query[:, block], heads), stack(grad_out[:, block], heads)
        log_p = torch.baddbmm(
            empty, stack(less_lse[:, block], heads), wide_key[:, :, visible], beta=0, alpha=scale
        )  # (K, H / K * q, s)
        p = mask_probs_(log_p.exp_(), len(query), block, visible, window)
        grad_logits = torch.bmm(stack(less_delta[:, block], heads), wide_value[:, :, visible]).mul_(p)
        grad_value[:, visible] += p.transpose(1, 2) @ grad
        grad_key[:, visible] += grad_logits.transpose(1, 2) @ q
        grad_query[:, block] = (grad_logits @ key[:, visible]).view(len(query), -1, query.shape[-1])
    return grad_query.mul_(scale), grad_key.mul_(scale), grad_value


def _with_subtrahend(x: Tensor, subtrahend: Tensor) -> Tensor:
    """(H, Q, D + 2): ``x`` and two columns whose sum is the negative of ``subtrahend``, (H, Q), to 16 bits."""
    high = subtrahend.neg().bfloat16()
    low = -(subtrahend + high).bfloat16()
    return torch.cat((x, high[..., None], low[..., None]), -1)


def _with_ones(x: Tensor) -> Tensor:
    """(K, D + 2, S): the transpose of ``x``, with two rows of ones."""
    return torch.cat((x, x.new_ones(*x.shape[:2], 2)), -1).transpose(1, 2).contiguous()
