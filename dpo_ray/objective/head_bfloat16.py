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

MAX_RELATIVE_SUM = 2.0**60
"""Largest accepted sum over the vocabulary of exp(logit - label's logit). Gradients of logits are divided by this sum
only after the matrix products; up to this limit they stay within the range of float32."""


class LabelSoftmax(NamedTuple):
    """Unnormalized softmax of each token's logits, relative to the logit of its label."""

    exponentials: Tensor
    """(n, V) bfloat16 exp(logit - the label's logit rounded to bfloat16), a transposed view."""
    label: Tensor
    """(n,) float32 exponential of the label: about 1, by the rounding of its logit."""
    others: Tensor
    """(n,) float32 sum of the exponentials of all other tokens."""


def label_softmax(hidden: Tensor, weight: Tensor, labels: Tensor) -> LabelSoftmax | None:
    """Softmax over the vocabulary, relative to the logit of each label.

    Args:
        hidden: (n, D) bfloat16 hidden states.
        weight: (V, D) bfloat16 weights of the head.
        labels: (n,) token ids.

    Returns:
        None if a label is less probable than 1 / MAX_RELATIVE_SUM, about -42 nats, or if a number is NaN.
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
    if not (others < MAX_RELATIVE_SUM).all():
        return None
    label = (label_logits - shift).exp_()
    exponentials[labels, tokens] = label.bfloat16()
    return LabelSoftmax(exponentials.t(), label, others)
