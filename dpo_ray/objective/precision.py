"""Compute dtypes, and the ways in which a CPU can compute the matrix products of bfloat16 tensors."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
"""Torch dtype of each ``model.dtype``."""

ProductPath = Literal["bfloat16", "rounded", "float32"]
"""A way to multiply bfloat16 tensors on a CPU, from the least to the most exact. All accumulate in float32.

bfloat16: as they are; the result is rounded to bfloat16, a relative error of at most 2^-9 per element.
rounded: as float32 tensors whose values the CPU may round to bfloat16, with float32 results. Exact up to float32 for
    inputs that are bfloat16 numbers.
float32: as float32 tensors.
"""
PATHS: tuple[ProductPath, ...] = ("float32", "rounded", "bfloat16")
"""All paths, the most exact first."""


@dataclass(frozen=True, slots=True)
class Products:
    """The path of each class of products in a model that computes in bfloat16 on a CPU.

    The fastest path differs between CPUs by a factor of a hundred; ``ops/calibration.py`` measures it.
    """

    linear: ProductPath = "rounded"
    """Linear layers: outputs and both gradients, which all paths round to bfloat16 in the end."""
    logits: ProductPath = "rounded"
    """The head's logits. With bfloat16, the label's logit is subtracted before they are rounded; a log-probability is
    then off by a few times 2^-9 of itself (``head_bfloat16.py``). ``rounded`` for heads with a bias, a scale or a cap,
    and for heads that are sharded over the vocabulary."""
    head_grad: ProductPath = "rounded"
    """Gradients of the head with respect to hidden states and weights. With bfloat16, each chunk of tokens is rounded
    before the float32 sum over chunks."""
    attention: ProductPath = "rounded"
    """Backward pass of attention; its forward pass is torch's flash kernel. With bfloat16, logarithms of probabilities,
    probabilities and gradients of both are rounded; not the logits (``ops/attention_bfloat16.py``)."""

    @classmethod
    def forced(cls, path: ProductPath) -> "Products":
        """``path`` for all classes."""
        return cls(path, path, path, path)


ROUNDED = Products()
"""The path ``rounded`` for all classes, which is never much slower than float32."""


@contextlib.contextmanager
def rounded_inputs(path: ProductPath) -> Iterator[None]:
    """Within the context, float32 products on a CPU may round their inputs to bfloat16, if ``path`` is not float32."""
    if path == "float32":
        yield
        return
    mkldnn: Any = torch.backends.mkldnn  # typed as a module without matmul
    settings = mkldnn.matmul
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before
