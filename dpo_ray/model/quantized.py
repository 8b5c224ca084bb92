"""Frozen 4-bit base weights for adapters (QLoRA, arXiv:2305.14314), at a quarter of bfloat16's size.

bitsandbytes quantizes and dequantizes. FSDP2 only shards plain parameters, so the packed values and scales of a layer
are stored as the bytes of one flat parameter in the compute dtype.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BLOCK = 64
"""Weights per scale."""


class NF4Linear(nn.Module):
    """A linear layer with an NF4 weight (section 3), dequantized for each product.

    Args:
        linear: the layer to replace; its weight may be on the meta device, to be loaded later.

    Raises:
        ValueError: the size of the weight is not a multiple of BLOCK.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        dtype, device = linear.weight.dtype, linear.weight.device
        if linear.weight.numel() % BLOCK:
            raise ValueError(
                f"model.lora.quantize: a weight of {self.out_features} x {self.in_features} does not divide into "
                f"blocks of {BLOCK}; remove its module from model.lora.targets"
            )
        if device.type == "meta":
            size = linear.weight.numel() // 2 + 4 * (linear.weight.numel() // BLOCK)  # bytes
            packed = torch.empty(size // dtype.itemsize, dtype=dtype, device=device)
        else:
            packed = quantize_nf4(linear.weight.detach())
        self.weight = nn.Parameter(packed, requires_grad=False)
        """Bytes, viewed as ``dtype``: NF4 values, two per byte, followed by one float32 scale per block."""
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """x W^T + b with the dequantized W."""
        product = cast("Tensor", _FrozenProduct.apply(x, self.weight, (self.out_features, self.in_features)))
        return product if self.bias is None else product + self.bias

    def dequantize(self, packed: Tensor) -> Tensor:
        """Dequantized weight, (out, in), from the full ``weight``, which may be sharded in the layer."""
        return dequantize_nf4(packed, (self.out_features, self.in_features))


class _FrozenProduct(torch.autograd.Function):
    """x W^T; backward dequantizes W again instead of saving it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, shape: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(packed)
        ctx.shape = shape
        return F.linear(x, dequantize_nf4(packed, shape).to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = grads
        (packed,) = ctx.saved_tensors
        return grad @ dequantize_nf4(packed, ctx.shape).to(grad.dtype), None, None


def quantize_base(model: nn.Module) -> None:
    """Replace the base layer of every LoRA module with an NF4Linear."""
    from peft.tuners.lora import LoraLayer

    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            linear = cast("nn.Linear", cast("Any", layer).base_layer)
            cast("Any", layer).base_layer = NF4Linear(linear)


def quantize_nf4(weight: Tensor) -> Tensor:
    """Packed NF4 values and scales as a flat tensor of the weight's dtype; see ``NF4Linear.weight``."""
    from bitsandbytes.functional import quantize_4bit

    values, state = quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4", compress_statistics=False)
    packed = torch.cat((values.flatten().view(torch.uint8), state.absmax.view(torch.uint8)))
    return packed.view(weight.dtype)


def dequantize_nf4(packed: Tensor, shape: tuple[int, int]) -> Tensor:
    """Weight of ``shape`` (out, in) from the result of ``quantize_nf4``."""
    from bitsandbytes.functional import QuantState, dequantize_4bit, get_4bit_type

    values = shape[0] * shape[1] // 2
    contents = packed.detach().view(torch.uint8)
    state = QuantState(
        absmax=contents[values:].view(torch.float32),
        shape=torch.Size(shape),
        code=get_4bit_type("nf4", device=packed.device),
        blocksize=BLOCK,
        quant_type="nf4",
        dtype=packed.dtype,
    )
    return dequantize_4bit(contents[:values].view(-1, 1), state)
