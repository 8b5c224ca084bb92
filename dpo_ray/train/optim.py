"""Optimizers by name, and the learning rate as a pure function of the progress of the run.

A new optimizer is a function here and an entry in ``OPTIMIZERS``, with its name in ``config/schema.py``; your own is
``optim.use: my_lab.optim:make``. Per-shard optimizer state must be DTensors placed like the parameters; otherwise a
checkpoint holds the state of one rank only.
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
    """Fused AdamW (arXiv:1711.05101)."""
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, amsgrad=amsgrad, fused=True)


def adamw_8bit(
    groups: Iterable[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float, block_size: int = 256
) -> torch.optim.Optimizer:
    """AdamW with eight-bit moments (arXiv:2110.02861): 2 bytes per parameter instead of 8.

    Args:
        block_size: parameters that share a scale.
    """
    from torchao.optim import AdamW8bit
    from torchao.optim.subclass_8bit import OptimState8bit

    # Asynchronous checkpoints copy the state with these operators, which torchao does not implement.
    @OptimState8bit.implements(torch.ops.aten.clone.default)
    def clone(func: Any, types: Any, args: Any, kwargs: Any) -> OptimState8bit:
        (state,) = args
        return OptimState8bit(state.codes.clone(), state.scale.clone(), state.qmap, state.signed, dtype=state.dtype)

    @OptimState8bit.implements(torch.ops.aten.zeros_like.default)
    def zeros_like(func: Any, types: Any, args: Any, kwargs: Any) -> OptimState8bit:
        (state,) = args
        device = (kwargs or {}).get("device", state.device)
        return OptimState8bit.zeros(state.shape, state.signed, state.block_size, device, dtype=state.dtype)

    return AdamW8bit(groups, lr=lr, betas=betas, eps=eps, block_size=block_size)


OPTIMIZERS: Mapping[str, Callable[..., torch.optim.Optimizer]] = {"adamw": adamw, "adamw_8bit": adamw_8bit}


def bind_optimizer(optim: OptimConfig) -> Callable[[list[dict[str, Any]]], torch.optim.Optimizer]:
    """The configured optimizer as a function of parameter groups.

    Raises:
        ValueError: the name is unknown, or an argument is unknown or missing.
    """
    return bind(optim.use, optim.args, OPTIMIZERS, kind="optimizer", lr=optim.lr, betas=optim.betas, eps=optim.eps)


def build_optimizer(policy: nn.Module, optim: OptimConfig) -> torch.optim.Optimizer:
    """The configured optimizer of the trainable parameters; vectors (norms and biases) have no weight decay."""
    trained = [p for p in policy.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": optim.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return bind_optimizer(optim)([g for g in groups if g["params"]])


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets the learning rate of all parameter groups; in place if the optimizer keeps it as a tensor."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def learning_rate(optim: OptimConfig, *, step: int, position: float, warmed: float, total: float) -> float:
    """Learning rate of optimizer step ``step``, counted from 0.

    The same curves as transformers' schedules of these names: linear warm-up from 0 over ``warmup_steps``, then linear
    or cosine decay to 0 at ``total``, or constant.

    Args:
        position: passes over the data before this step, so that the decay does not depend on the size of steps.
        warmed: the position at the end of warm-up.
        total: the position at the end of the run.
    """
    if step < optim.warmup_steps:
        return optim.lr * step / optim.warmup_steps
    progress = min(1.0, (position - warmed) / (total - warmed)) if total > warmed else 1.0
    match optim.schedule:
        case "linear":
            return optim.lr * (1 - progress)
        case "cosine":
            return optim.lr * 0.5 * (1 + math.cos(math.pi * progress))
        case "constant":
            return optim.lr
