"""A search space: configuration keys and the ray.tune domains that they are drawn from."""

from ray import tune

from dpo_ray.launch.sweep import Sweep

SWEEP = Sweep(
    space={
        "loss.beta": tune.loguniform(0.02, 0.5),
        "optim.lr": tune.loguniform(5e-6, 1e-4),
        "optim.warmup_steps": tune.choice([0, 2]),
    },
    metric="eval/rewards/accuracies",
    mode="max",
    samples=4,
)
