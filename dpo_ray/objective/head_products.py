"""The matrix products of the head: inputs rounded to the dtype of the hidden states, accumulation in float32.

n = tokens of one chunk, D = hidden size, V = vocabulary rows on this rank
"""

import contextlib
from functools import cached_property

import torch
from torch import Tensor

from dpo_ray.objective.precision import ProductPath, Products, rounded_inputs

VOCABULARY_BLOCK = 4096
"""Rows of the head whose logits, or gradients of logits, are computed and used while in the cache."""


class HeadProducts:
    """Products with one head.

    Logits rounded to bfloat16 would be off by about 0.05 nats per token (a spacing of 0.125 at a logit of 20): half a
    nat of noise in the log-probability of 100 tokens. So they are float32 here on every path; see ``head_bfloat16``.

    Args:
        weight: (V, D), in the dtype of the hidden states.
        paths: paths on a CPU whose weights are bfloat16; without effect otherwise.
    """

    def __init__(self, weight: Tensor, paths: Products) -> None:
        self.weight, self.on_gpu = weight, weight.is_cuda
        self.is_bfloat16 = weight.dtype == torch.bfloat16
        self.paths = paths
        self.in_bfloat16 = self.is_bfloat16 and not self.on_gpu and paths.logits == "bfloat16"
        """True if softmax may take the path of ``head_bfloat16``."""

    def logits(self, hidden: Tensor) -> Tensor:
        """(n, V) float32 logits of hidden states (n, D)."""
        if self.is_bfloat16 and self.on_gpu:
            return torch.mm(hidden.to(self.weight.dtype), self.weight.t(), out_dtype=torch.float32)
        with self._precision(self.paths.logits):
            return hidden.to(self.float_weight.dtype) @ self.float_weight.t()

    @cached_property
    def float_weight(self) -> Tensor:
        """The weights, on a CPU in float32 if they are bfloat16."""
        return self.weight.float() if self.is_bfloat16 and not self.on_gpu else self.weight

    def hidden_grad(self, logits_grad: Tensor) -> Tensor:
        """(n, D) gradient with respect to hidden states, float32, of the one with respect to logits, (n, V).

        Args:
            logits_grad: float32 or bfloat16.
        """
        if not self.is_bfloat16:
            return logits_grad @ self.weight
        if self.on_gpu:
            return torch.mm(logits_grad.to(self.weight.dtype), self.weight, out_dtype=torch.float32)
        if self.paths.head_grad != "bfloat16":
            with self._precision(self.paths.head_grad):
                return logits_grad.float() @ self.float_weight
        total = torch.zeros(len(logits_grad), self.weight.shape[1], device=logits_grad.device)
        for part, rows in zip(logits_grad.split(VOCABULARY_BLOCK, 1), self.weight.split(VOCABULARY_BLOCK), strict=True):
            total += part.bfloat16() @ rows
        return total

    def add_weight_grad(self, total: Tensor, logits_grad: Tensor, hidden: Tensor) -> None:
        """Add the gradient with respect to the weights to ``total``, (V, D) float32.

        Args:
            logits_grad: (n, V), float32 or bfloat16.
            hidden: (n, D) hidden states, scaled; float32.
        """
        if self.is_bfloat16 and self.on_gpu:
            a, b = logits_grad.t().to(self.weight.dtype), hidden.to(self.weight.dtype)
            torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
        elif self.is_bfloat16 and self.paths.head_grad == "bfloat16":
            rounded = hidden.bfloat16()
            parts = zip(logits_grad.split(VOCABULARY_BLOCK, 1), total.split(VOCABULARY_BLOCK), strict=True)
            for part, rows in parts:
                rows += part.bfloat16().t() @ rounded
        else:
            with self._precision(self.paths.head_grad):
                total.addmm_(logits_grad.t().to(hidden.dtype), hidden)

    def _precision(self, path: ProductPath) -> contextlib.AbstractContextManager[None]:
        return rounded_inputs(path) if self.is_bfloat16 else contextlib.nullcontext()
