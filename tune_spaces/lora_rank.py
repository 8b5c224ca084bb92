"""Rank of the adapters, with a constant ratio of alpha to rank, and the learning rate."""

from ray import tune

from dpo_ray.launch.sweep import Sweep

SWEEP = Sweep(
    space={
        "model.lora": tune.choice([{"rank": rank, "alpha": 2 * rank} for rank in (4, 8, 16, 32, 64)]),
        "optim.lr": tune.loguniform(1e-5, 1e-3),
    },
    metric="eval/rewards/accuracies",
    mode="max",
    samples=12,
)
