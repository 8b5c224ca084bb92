"""Decoder layers compiled by torch. Independent of pydantic, which the GPU benchmark does without."""

from collections.abc import Iterable
from typing import Any

import torch

RECOMPILE_LIMIT = 32
"""Variants of a layer that torch compiles before it would run it uncompiled: kinds of attention, with and without
gradient, each first for the length of one row and then for rows of any length."""


def compile_layers(layers: Iterable[Any], device: torch.device) -> None:
    """Compile each layer's forward; to be called before FSDP adds its hooks, which cannot be compiled."""
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, RECOMPILE_LIMIT)
    # In modules that FSDP manages, dynamic=True makes the number of heads a symbol, for which flex_attention has no
    # kernel on GPUs. Without it, torch finds out which sizes vary when it sees the second row.
    dynamic = True if device.type == "cpu" else None
    for layer in layers:
        layer.forward = torch.compile(layer.forward, dynamic=dynamic)
