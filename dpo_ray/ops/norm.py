"""Root mean square normalization (arXiv:1910.07467) on a CPU, with half of the passes over memory of autograd's.

The output is that of transformers' modules, bit by bit; gradients are float32 until they are rounded once.
"""

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

EPSILONS = ("variance_epsilon", "eps")
"""Names that modules give to the number that is added to the mean square."""


def use_fused_norms(model: nn.Module) -> None:
    """Replace the forward pass of the modules of ``model`` that normalize as ``normalize`` does, in bfloat16."""
    known: dict[tuple[type, float], bool] = {}
    for module in model.modules():
        epsilon = _epsilon(module)
        if epsilon is None:
            continue
        kind = (type(module), epsilon)
        if kind not in known:
            known[kind] = _is_plain(module, epsilon)
        if known[kind]:
            module.forward = partial(_forward, module, module.forward, epsilon)


def normalize(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """``weight * x / sqrt(mean(x^2) + epsilon)`` over the last dimension, rounded to the dtype of x before ``weight``.

    Args:
        x: (..., D) bfloat16.
        weight: (D,)
    """
    return _Normalize.apply(x, weight, epsilon)


def _epsilon(module: nn.Module) -> float | None:
    """The number that is added to the mean square; None if the module is no such normalization."""
    weight = getattr(module, "weight", None)
    if not type(module).__name__.endswith("RMSNorm") or not isinstance(weight, Tensor) or weight.ndim != 1:
        return None
    values = [getattr(module, name) for name in EPSILONS if isinstance(getattr(module, name, None), float)]
    return values[0] if len(list(module.parameters())) == 1 and values else None


def _is_plain(module: nn.Module, epsilon: float) -> bool:
    """True if a module with the same class gives the same numbers; some add 1 to the weight or round elsewhere."""
    probe = copy.deepcopy(module).to_empty(device="cpu").bfloat16()
    generator = torch.Generator().manual_seed(0)
    weight: Any = probe.weight
    with torch.no_grad():
        weight.copy_(torch.randn(weight.shape, generator=generator))
        x = torch.randn(4, len(weight), generator=generator).bfloat16()
        try:
            return torch.equal(probe(x), normalize(x, weight, epsilon))
        except Exception:  # it takes other arguments, such as a gate, or other shapes
            return False


def _forward(module: nn.Module, forward: Any, epsilon: float, x: Tensor) -> Tensor:
    weight: Any = module.weight
    return normalize(x, weight, epsilon) if x.dtype == weight.dtype == torch.bfloat16 else forward(x)


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        wide = x.float()
        inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)  # (..., 1)
        ctx.save_for_backward(x, weight, inverse)
        return wide.mul_(inverse).to(x.dtype).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        normalized, upstream = x.float().mul_(inverse), grads[0].float()
        product = normalized * upstream
        grad_weight = product.flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        # d x = (w g - normalized * mean(w g normalized)) / root mean square
        share = (product @ weight.float()).unsqueeze(-1) / -x.shape[-1]  # (..., 1)
        grad_x = upstream.mul_(weight).addcmul_(normalized, share).mul_(inverse)
        return grad_x.to(x.dtype), grad_weight, None
