"""The learning rate against transformers' schedules, which parameters decay, and optimizers by name."""

import pytest
import torch
from transformers import get_scheduler

from dpo_ray.config import schema
from dpo_ray.config.schema import OptimConfig
from dpo_ray.train.optim import OPTIMIZERS, bind_optimizer, build_optimizer, learning_rate, set_learning_rate


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [0, 4])
def test_learning_rate_schedules_equal_those_of_transformers(schedule: str, warmup: int) -> None:
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


def test_the_schema_knows_the_optimizers() -> None:
    assert set(schema.OPTIMIZERS) == set(OPTIMIZERS)


def test_a_custom_optimizer_gets_the_arguments_that_its_signature_names() -> None:
    optim = OptimConfig(use="torch.optim:SGD", args={"momentum": 0.5}, lr=0.25)
    (group,) = build_optimizer(torch.nn.Linear(4, 4, bias=False), optim).param_groups
    assert (group["lr"], group["momentum"]) == (0.25, 0.5)


def test_an_unknown_argument_is_rejected_before_anything_is_loaded() -> None:
    with pytest.raises(ValueError, match=r"optimizer 'adamw' takes no argument 'momentum'; its signature is adamw\("):
        bind_optimizer(OptimConfig(args={"momentum": 0.5}))


def test_eight_bit_state_takes_a_quarter_and_follows_the_learning_rate() -> None:
    pytest.importorskip("torchao")
    module = torch.nn.Linear(64, 64, bias=False)
    before = module.weight.detach().clone()
    optimizer = build_optimizer(module, OptimConfig(use="adamw_8bit", lr=1.0))
    set_learning_rate(optimizer, 0.125)
    module.weight.grad = torch.ones_like(module.weight)
    with torch.compiler.set_stance("force_eager"):
        optimizer.step()
    # The first step of Adam has the size of the learning rate, whatever the gradient.
    assert (before - module.weight - 0.125).abs().max() < 1e-4
    state = optimizer.state[module.weight]
    assert (state["exp_avg"].codes.dtype, state["exp_avg_sq"].codes.dtype) == (torch.uint8, torch.uint8)
    assert state["exp_avg"].scale.numel() == 64 * 64 // 256
