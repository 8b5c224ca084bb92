"""The optimizer and the learning rate, the latter a pure function of the step."""

import math

import torch
from torch import nn

from dpo_ray.config.schema import OptimConfig


def build_optimizer(policy: nn.Module, optim: OptimConfig) -> torch.optim.AdamW:
    """Fused AdamW; vectors (norms and biases) are not decayed."""
    trained = [p for p in policy.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": optim.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [g for g in groups if g["params"]], lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True
    )


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
