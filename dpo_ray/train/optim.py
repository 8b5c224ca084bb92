"""Optimizers, one dictionary, and the learning rate, a pure function of the step.

A new optimizer is a function here and an entry in ``OPTIMIZERS``, with its name in ``config/schema.py``; one of your
own is ``optim.use: my_lab.optim:make``. State that is kept apart for each rank's shard must be in DTensors of the
parameters' placement, or a checkpoint holds one rank's.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dpo_ray.config.schema import OptimConfig
from dpo_ray.plugins import bind


def adamw(
    groups: Iterable[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float, amsgrad: bool = False
) -> torch.optim.Optimizer:
    """AdamW (arXiv:1711.05101), a few kernels for all parameters."""
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, amsgrad=amsgrad, fused=True)


def adamw_8bit(
    groups: Iterable[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float, block_size: int = 256
) -> torch.optim.Optimizer:
    """AdamW with both averages in eight bits (arXiv:2110.02861): 2 bytes a parameter instead of 8.

    Args:
        block_size: parameters that share a scale.
    """
    from torchao.optim import AdamW8bit
    from torchao.optim.subclass_8bit import OptimState8bit

    # What an asynchronous checkpoint copies with, and torchao leaves out.
    @OptimState8bit.implements(torch.ops.aten.clone.default)
    def clone(func: Any, types: Any, args: Any, kwargs: Any) -> OptimState8bit:
        (held,) = args
        return OptimState8bit(held.codes.clone(), held.scale.clone(), held.qmap, held.signed, dtype=held.dtype)

    @OptimState8bit.implements(torch.ops.aten.zeros_like.default)
    def zeros_like(func: Any, types: Any, args: Any, kwargs: Any) -> OptimState8bit:
        (held,) = args
        device = (kwargs or {}).get("device", held.device)
        return OptimState8bit.zeros(held.shape, held.signed, held.block_size, device, dtype=held.dtype)

    return AdamW8bit(groups, lr=lr, betas=betas, eps=eps, block_size=block_size)


OPTIMIZERS: Mapping[str, Callable[..., torch.optim.Optimizer]] = {"adamw": adamw, "adamw_8bit": adamw_8bit}


def bind_optimizer(optim: OptimConfig) -> Callable[[list[dict[str, Any]]], torch.optim.Optimizer]:
    """The configured optimizer as a function of parameter groups.

    Raises:
        ValueError: the name is unknown, or an argument is not taken or is missing.
    """
    return bind(optim.use, optim.args, OPTIMIZERS, kind="optimizer", lr=optim.lr, betas=optim.betas, eps=optim.eps)


def build_optimizer(policy: nn.Module, optim: OptimConfig) -> torch.optim.Optimizer:
    """The configured optimizer of what is trained in ``policy``; vectors (norms and biases) are not decayed."""
    trained = [p for p in policy.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": optim.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return bind_optimizer(optim)([g for g in groups if g["params"]])


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Make ``lr`` the rate of all parameters; where the optimizer holds it as a tensor, in place."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def learning_rate(optim: OptimConfig, step: int, total_steps: int) -> float:
    """Learning rate of optimizer step ``step``, counted from 0.

    The same curves as transformers' schedules of these names: a rise from 0 over ``warmup_steps``, then a straight line
    or half a cosine down to 0 at ``total_steps``, or no change.
    """
    if step < optim.warmup_steps:
        return optim.lr * step / optim.warmup_steps
    progress = min(1.0, (step - optim.warmup_steps) / max(1, total_steps - optim.warmup_steps))
    match optim.schedule:
        case "linear":
            return optim.lr * (1 - progress)
        case "cosine":
            return optim.lr * 0.5 * (1 + math.cos(math.pi * progress))
        case "constant":
            return optim.lr
