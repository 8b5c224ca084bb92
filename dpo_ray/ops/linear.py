"""bfloat16 linear layers on a CPU, on the path that is the fastest there.

A CPU with bfloat16 instructions multiplies bfloat16 tensors at up to four times its float32 rate; one without, at half
of that rate or at a hundredth. There, layers multiply as float32 and round once; exact for inputs that are bfloat16
numbers.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dpo_ray.objective.precision import ProductPath, rounded_inputs

BLOCK = 1024
"""Tokens per block; only one block exists in float32 at a time, in memory that the allocator reuses."""


def use_products(model: nn.Module, path: ProductPath) -> None:
    """Let the bfloat16 linear layers of ``model`` multiply on ``path``; bfloat16 is torch's own product."""
    if path == "bfloat16":
        return
    for module in model.modules():
        if type(module) is nn.Linear:  # subclasses, such as quantized layers, have their own product
            module.forward = partial(_linear, module, path)


def _linear(layer: nn.Linear, path: ProductPath, x: Tensor) -> Tensor:
    return _Float32Product.apply(x, layer.weight, layer.bias, path)


class _Float32Product(torch.autograd.Function):
    """``x @ weight.t() + bias``, x: (..., D); the tensors saved for the backward pass are bfloat16."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, path: ProductPath) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.path = path
        tokens, transposed = x.flatten(0, -2), weight.float().t()
        out = x.new_empty(tokens.shape[0], weight.shape[0])
        with rounded_inputs(path):
            for block, result in zip(tokens.split(BLOCK), out.split(BLOCK), strict=True):
                product = block.float() @ transposed
                result.copy_(product if bias is None else product + bias)
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        tokens, upstream, weight_f32 = x.flatten(0, -2), grads[0].flatten(0, -2), weight.float()
        grad_x = torch.empty_like(tokens) if needs_x else None
        grad_weight = torch.zeros_like(weight_f32) if needs_weight else None
        with rounded_inputs(ctx.path):
            for start in range(0, tokens.shape[0], BLOCK):
                block = slice(start, start + BLOCK)
                upstream_f32 = upstream[block].float()
                if grad_x is not None:
                    grad_x[block] = upstream_f32 @ weight_f32
                if grad_weight is not None:
                    grad_weight.addmm_(upstream_f32.t(), tokens[block].float())
        return (
            None if grad_x is None else grad_x.view(x.shape),
            None if grad_weight is None else grad_weight.to(weight.dtype),
            upstream.sum(0, dtype=torch.float32).to(weight.dtype) if needs_bias else None,
            None,
        )
