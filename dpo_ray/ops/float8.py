"""Float8 linear layers (arXiv:2209.05433), by torchao.

Weights, gradients and saved activations keep their dtype; the inputs of each product are scaled and rounded on the fly,
with one scale per token and per output feature. A single scale per tensor would be faster and could all-gather weights
in float8, but the log-probability of a completion would then depend on the other pairs in its row, and the policy and
the reference see different rows.
"""

from dataclasses import replace

import torch
from torch import nn

MIN_CAPABILITY = (9, 0)
"""First CUDA compute capability with row-wise scaled kernels: Hopper."""
ALIGNMENT = 16
"""The kernels need matrices with both sides a multiple of this."""


def validate_float8_device(device: torch.device) -> None:
    """Raise a ValueError if ``device`` has no float8 matrix products."""
    if device.type != "cuda":
        raise ValueError(f"model.fp8: a {device.type} has no float8 matrix products; set model.fp8: false")
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and capability < MIN_CAPABILITY:
        raise ValueError(
            f"model.fp8: {torch.cuda.get_device_name(device)} has compute capability {capability[0]}.{capability[1]}; "
            f"row-wise float8 products need {MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]}; set model.fp8: false"
        )


def use_float8(layers: nn.Module, *, emulate: bool = False) -> None:
    """Convert the linear layers in ``layers`` to float8, in the forward product and both backward products.

    Args:
        layers: the decoder layers, without the head.
        emulate: multiply the rounded numbers in full precision, on any device.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    # The inner dimension of weight-gradient products is the length of the row, which can be any number.
    config = replace(Float8LinearConfig.from_recipe_name("rowwise"), pad_inner_dim=True, emulate=emulate)
    convert_to_float8_training(layers, config=config, module_filter_fn=_is_aligned_linear)


def _is_aligned_linear(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and not (module.in_features % ALIGNMENT or module.out_features % ALIGNMENT)
