"""Compute dtypes, and bfloat16 matrix products on a CPU."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
"""Torch dtype of each ``model.dtype``."""


@contextlib.contextmanager
def bfloat16_products() -> Iterator[None]:
    """Round inputs of float32 matrix products on a CPU to bfloat16, with float32 accumulation; as fast as bfloat16."""
    mkldnn: Any = torch.backends.mkldnn  # typed as a module without matmul
    settings = mkldnn.matmul
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before
