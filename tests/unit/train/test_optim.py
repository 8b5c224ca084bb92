"""The learning rate against transformers' schedules, and which parameters decay."""

import pytest
import torch
from transformers import get_scheduler

from dpo_ray.config.schema import OptimConfig
from dpo_ray.train.optim import build_optimizer, learning_rate


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [0, 4])
def test_the_curves_are_those_of_transformers(schedule: str, warmup: int) -> None:
    optim = OptimConfig(lr=1e-3, schedule=schedule, warmup_steps=warmup)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=20)
    for step in range(20):
        assert learning_rate(optim, step, 20) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-9, abs=1e-15), step
        optimizer.step()
        scheduler.step()


def test_only_matrices_decay() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
    matrices, vectors = build_optimizer(module, OptimConfig(weight_decay=0.1)).param_groups
    assert (len(matrices["params"]), matrices["weight_decay"]) == (1, 0.1)
    assert (len(vectors["params"]), vectors["weight_decay"]) == (3, 0.0)
