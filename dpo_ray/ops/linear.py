"""bfloat16 linear layers on a CPU: multiplied as float32, rounded once.

A CPU without matrix units multiplies bfloat16 tensors at half its float32 rate; with matrix units, at several times
that rate. A float32 product that may round its inputs to bfloat16 gets the faster of the two, and is exact for inputs
that are bfloat16 numbers.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dpo_ray.objective.precision import bfloat16_products

BLOCK = 1024
"""Tokens per block; only one block exists in float32 at a time, in memory that the allocator reuses."""


def use_float32_products(model: nn.Module) -> None:
    """Let the bfloat16 linear layers of ``model`` multiply as float32."""
    for module in model.modules():
        if type(module) is nn.Linear:  # subclasses, such as quantized layers, have their own product
            module.forward = partial(_linear, module)


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return _Float32Product.apply(x, layer.weight, layer.bias)


class _Float32Product(torch.autograd.Function):
    """``x @ weight.t() + bias``, x: (..., D); the tensors saved for the backward pass are bfloat16."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        tokens, transposed = x.flatten(0, -2), weight.float().t()
        out = x.new_empty(tokens.shape[0], weight.shape[0])
        with bfloat16_products():
            for block, result in zip(tokens.split(BLOCK), out.split(BLOCK), strict=True):
                product = block.float() @ transposed
                result.copy_(product if bias is None else product + bias)
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        tokens, upstream, weight_f32 = x.flatten(0, -2), grads[0].flatten(0, -2), weight.float()
        grad_x = torch.empty_like(tokens) if needs_x else None
        grad_weight = torch.zeros_like(weight_f32) if needs_weight else None
        with bfloat16_products():
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
        )
