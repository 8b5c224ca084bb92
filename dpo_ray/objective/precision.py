"""Compute dtypes, and how matrix products of bfloat16 numbers run on a CPU."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
"""``model.dtype`` as torch dtypes."""


@contextlib.contextmanager
def bfloat16_products() -> Iterator[None]:
    """Let float32 matrix products on a CPU round their inputs, not their sums, to bfloat16: as fast as bfloat16."""
    mkldnn: Any = torch.backends.mkldnn  # as imported, an object with more attributes than the module declares
    settings = mkldnn.matmul
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before
