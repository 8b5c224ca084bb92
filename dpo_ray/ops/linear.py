"""Linear layers on bfloat16 numbers on a CPU, multiplied as float32 and rounded once.

A CPU without matrix units multiplies bfloat16 tensors at half its float32 rate, one with them at several times that
rate. A float32 product that may round its inputs to bfloat16 gets the faster of the two, and inputs that are bfloat16
numbers lose nothing by it.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dpo_ray.objective.precision import bfloat16_products

BLOCK = 1024
"""Tokens that are held as float32 at a time: few enough for the allocator to hand out the same memory again."""


def use_float32_products(model: nn.Module) -> None:
    """Let the linear layers of ``model``, which compute in bfloat16 on a CPU, multiply as float32."""
    for module in model.modules():
        if type(module) is nn.Linear:  # others, such as quantised ones, have products of their own
            module.forward = partial(_linear, module)


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return _Float32Product.apply(x, layer.weight, layer.bias)


class _Float32Product(torch.autograd.Function):
    """``x @ weight.t() + bias`` for x of (..., D); what is kept for the backward pass is bfloat16."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        tokens, transposed = x.flatten(0, -2), weight.float().t()
        out = x.new_empty(tokens.shape[0], weight.shape[0])
        with bfloat16_products():
            for part in _blocks(tokens):
                product = tokens[part].float() @ transposed
                out[part] = product if bias is None else product + bias
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        by_x, by_weight, by_bias = ctx.needs_input_grad
        tokens, upstream, weight_wide = x.flatten(0, -2), grads[0].flatten(0, -2), weight.float()
        grad_x = torch.empty_like(tokens) if by_x else None
        grad_weight = torch.zeros_like(weight_wide) if by_weight else None
        with bfloat16_products():
            for part in _blocks(tokens):
                wide = upstream[part].float()
                if grad_x is not None:
                    grad_x[part] = wide @ weight_wide
                if grad_weight is not None:
                    grad_weight.addmm_(wide.t(), tokens[part].float())
        return (
            None if grad_x is None else grad_x.view(x.shape),
            None if grad_weight is None else grad_weight.to(weight.dtype),
            upstream.sum(0, dtype=torch.float32).to(weight.dtype) if by_bias else None,
        )


def _blocks(tokens: Tensor) -> Iterator[slice]:
    return (slice(start, start + BLOCK) for start in range(0, tokens.shape[0], BLOCK))
