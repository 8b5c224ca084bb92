"""Frozen weights in four bits (QLoRA, arXiv:2305.14314): what adapters are added to, at a quarter of bfloat16's size.

bitsandbytes quantises and restores; how the numbers are held is ours, because FSDP2 shards plain parameters: packed
values and scales of a layer are the bytes of one flat parameter in the compute dtype, which is sharded and gathered as
it is.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BLOCK = 64
"""Weights that share a scale."""


class NF4Linear(nn.Module):
    """A linear layer whose weight is held as NF4 values (Section 3) and restored for each product.

    Args:
        linear: the layer it stands for; its weight may be on the meta device, to be filled later.

    Raises:
        ValueError: the weight does not divide into blocks.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        dtype, device = linear.weight.dtype, linear.weight.device
        if linear.weight.numel() % BLOCK:
            raise ValueError(
                f"model.lora.quantize: a weight of {self.out_features} x {self.in_features} does not divide into "
                f"blocks of {BLOCK}; leave its module out of model.lora.targets"
            )
        if device.type == "meta":
            size = linear.weight.numel() // 2 + 4 * (linear.weight.numel() // BLOCK)  # bytes
            held = torch.empty(size // dtype.itemsize, dtype=dtype, device=device)
        else:
            held = pack(linear.weight.detach())
        self.weight = nn.Parameter(held, requires_grad=False)
        """NF4 values, two a byte, and behind them a float32 scale for each block: bytes, whatever their dtype says."""
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """x W^T + b, W as the four bits have it."""
        product = cast("Tensor", _FrozenProduct.apply(x, self.weight, (self.out_features, self.in_features)))
        return product if self.bias is None else product + self.bias

    def restore(self, held: Tensor) -> Tensor:
        """(out, in) the weight as the four bits have it.

        Args:
            held: ``weight`` in full.
        """
        return unpack(held, (self.out_features, self.in_features))


class _FrozenProduct(torch.autograd.Function):
    """x W^T, with W restored in the backward pass again instead of kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, held: Tensor, shape: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(held)
        ctx.shape = shape
        return F.linear(x, unpack(held, shape).to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = grads
        (held,) = ctx.saved_tensors
        return grad @ unpack(held, ctx.shape).to(grad.dtype), None, None


def quantize_base(model: nn.Module) -> None:
    """Hold in four bits what adapters have been added to."""
    from peft.tuners.lora import LoraLayer

    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            linear = cast("nn.Linear", cast("Any", layer).base_layer)
            cast("Any", layer).base_layer = NF4Linear(linear)


def pack(weight: Tensor) -> Tensor:
    """Four bits of each entry and the scales, as a flat tensor of the weight's dtype; see ``NF4Linear.weight``."""
    from bitsandbytes.functional import quantize_4bit

    values, state = quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4", compress_statistics=False)
    held = torch.cat((values.flatten().view(torch.uint8), state.absmax.view(torch.uint8)))
    return held.view(weight.dtype)


def unpack(held: Tensor, shape: tuple[int, int]) -> Tensor:
    """The weight that ``pack`` was given, as far as four bits have it.

    Args:
        held: what ``pack`` gave.
        shape: (out, in)
    """
    from bitsandbytes.functional import QuantState, dequantize_4bit, get_4bit_type

    values = shape[0] * shape[1] // 2
    contents = held.detach().view(torch.uint8)
    state = QuantState(
        absmax=contents[values:].view(torch.float32),
        shape=torch.Size(shape),
        code=get_4bit_type("nf4", device=held.device),
        blocksize=BLOCK,
        quant_type="nf4",
        dtype=held.dtype,
    )
    return dequantize_4bit(contents[:values].view(-1, 1), state)
