"""Linear layers that multiply in eight-bit floating point (arXiv:2209.05433), by torchao.

Weights, gradients and what is saved stay as they are; the factors of each product are scaled and rounded on its way,
each token and each output by a scale of its own. One scale a tensor would be faster and could gather weights in eight
bits, but it makes a completion's log-probability depend on the pairs in its row, and the reference is scored in others.
"""

from dataclasses import replace

import torch
from torch import nn

CAPABILITY = (9, 0)
"""The first CUDA GPUs with kernels for a scale a row: Hopper."""
MULTIPLE = 16
"""The kernels take matrices whose sides are multiples of this."""


def validate_float8_device(device: torch.device) -> None:
    """Raise a ValueError when ``device`` does not multiply eight-bit floats."""
    if device.type != "cuda":
        raise ValueError(f"model.fp8: a {device.type} does not multiply eight-bit floats; set model.fp8: false")
    found = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and found < CAPABILITY:
        raise ValueError(
            f"model.fp8: {torch.cuda.get_device_name(device)} has compute capability {found[0]}.{found[1]}; eight-bit "
            f"products by rows need {CAPABILITY[0]}.{CAPABILITY[1]}; set model.fp8: false"
        )


def use_float8(layers: nn.Module, *, emulate: bool = False) -> None:
    """Let the linear layers in ``layers`` multiply in eight bits, in all three products.

    Args:
        layers: the decoder layers: the head is not among them.
        emulate: multiply the rounded numbers in full precision, on any device.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    # Rows have any length, which is the inner side of the products that give the gradients of weights.
    config = replace(Float8LinearConfig.from_recipe_name("rowwise"), pad_inner_dim=True, emulate=emulate)
    convert_to_float8_training(layers, config=config, module_filter_fn=_fits)


def _fits(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and not (module.in_features % MULTIPLE or module.out_features % MULTIPLE)
