"""The learning rate against transformers' schedules, which parameters decay, and optimizers by name."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import get_scheduler

from dpo_ray.config import schema
from dpo_ray.config.schema import OptimConfig
from dpo_ray.train.optim import OPTIMIZERS, bind_optimizer, build_optimizer, set_learning_rate
from dpo_ray.train.state import TrainState
from tests.pair_list import PairList


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [0, 4])
def test_learning_rate_schedules_equal_those_of_transformers(schedule: str, warmup: int) -> None:
    optim = OptimConfig(lr=1e-3, schedule=schedule, warmup_steps=warmup)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=20)
    state = TrainState(torch.nn.Identity(), optimizer)
    for step in range(20):  # two epochs of ten steps
        lr = state.next_learning_rate(optim, position=step / 10, total=2.0)
        assert lr == pytest.approx(scheduler.get_last_lr()[0], rel=1e-9, abs=1e-15), step
        state.count_step((), PairList(()))
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize(("warmup", "resumed_lr"), [(0, [0.5, 0.25]), (2, [2 / 3, 1 / 3]), (6, [4 / 6, 5 / 6])])
def test_steps_of_twice_the_size_continue_the_schedule_by_pairs(warmup: int, resumed_lr: list[float]) -> None:
    # Four of eight steps, then two of four: a warm-up that has ended does not start again, another one is completed.
    optim = OptimConfig(lr=1.0, warmup_steps=warmup)
    state = TrainState(torch.nn.Identity(), torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))]))
    lr = []
    for position in (0, 1 / 8, 2 / 8, 3 / 8, 4 / 8, 6 / 8):
        lr.append(state.next_learning_rate(optim, position=position, total=1.0))
        state.count_step((), PairList(()))
    assert lr[4:] == pytest.approx(resumed_lr)


def test_settings_of_the_optimizer_may_change_when_its_averages_are_loaded() -> None:
    def state(**settings: Any) -> TrainState:
        module = torch.nn.Linear(4, 4)
        return TrainState(
            module, build_optimizer(module, OptimConfig(**settings)), torch.ones(2), warmed=0.3, consumed=2**40 + 1
        )

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        saved, resumed = state(betas=(0.8, 0.9), weight_decay=0.1), state(betas=(0.5, 0.7), weight_decay=0.2, eps=1e-3)
        saved.policy(torch.ones(4)).sum().backward()
        saved.optimizer.step()
        loaded = saved.state_dict()
        resumed.warmed = resumed.consumed = 0
        resumed.log_ratio_totals.zero_()
        resumed.load_state_dict(loaded)
    finally:
        dist.destroy_process_group()
    assert (resumed.warmed, resumed.consumed, resumed.log_ratio_totals.tolist()) == (0.3, 2**40 + 1, [1, 1])
    matrices, vectors = resumed.optimizer.param_groups
    assert (matrices["betas"], matrices["eps"], matrices["weight_decay"]) == ((0.5, 0.7), 1e-3, 0.2)
    assert vectors["weight_decay"] == 0.0
    for before, after in zip(saved.policy.parameters(), resumed.policy.parameters(), strict=True):
        assert torch.equal(saved.optimizer.state[before]["exp_avg"], resumed.optimizer.state[after]["exp_avg"])


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
