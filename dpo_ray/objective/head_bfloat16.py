"""Softmax over the vocabulary in products of bfloat16 tensors, for CPUs that have instructions for them.

Logits rounded to bfloat16 would be off by 0.06 at 20. Here the logit of the label is computed in float32 and subtracted
from all logits before they are rounded, and the sum does not contain the label. So rounding affects the odds of other
tokens against the label, and their logarithms. A log-probability is off by at most a few times 2^-9 of itself, with a
random sign: by 0.001 nats on average where it is -3.

n = tokens of one chunk, D = hidden size, V = vocabulary
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dpo_ray.objective.head_products import VOCABULARY_BLOCK

MOST = 2.0**60
"""Largest sum of exponentials: gradients of logits, which are this times too large until they are divided by it, stay
far from the ends of float32."""


class LabelSoftmax(NamedTuple):
    """Softmax relative to the label of each token."""

    exponentials: Tensor
    """(n, V) bfloat16 exp(logit - the label's logit rounded to bfloat16), a transposed view."""
    label: Tensor
    """(n,) that of the label, float32."""
    others: Tensor
    """(n,) sum over all other tokens, float32."""


def label_softmax(hidden: Tensor, weight: Tensor, labels: Tensor) -> LabelSoftmax | None:
    """Exponentials of the logits of hidden states (n, D), with the head's weights (V, D), both bfloat16.

    Returns:
        None if a label is less probable than 1 / MOST, about -42 nats, or if a number is NaN.
    """
    label_logits = (hidden.float() * weight[labels].float()).sum(-1)
    shift = label_logits.bfloat16()
    exponentials = hidden.new_empty(len(weight), len(hidden))
    others = label_logits.new_zeros(len(hidden))
    tokens = torch.arange(len(hidden))
    start = 0
    for out, rows in zip(exponentials.split(VOCABULARY_BLOCK), weight.split(VOCABULARY_BLOCK), strict=True):
        torch.addmm(-shift, rows, hidden.t(), out=out)
        inside = (labels >= start) & (labels < start + len(rows))
        out[labels[inside] - start, tokens[inside]] = -torch.inf
        others += out.exp_().sum(0, dtype=torch.float32)
        start += len(rows)
    if not (others < MOST).all():
        return None
    label = (label_logits - shift).exp_()
    exponentials[labels, tokens] = label.bfloat16()
    return LabelSoftmax(exponentials.t(), label, others)
