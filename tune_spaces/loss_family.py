"""Losses for pairs with a reference, each with beta in its usual range, and the learning rate."""

from ray import tune

from dpo_ray.launch.sweep import Sweep

SWEEP = Sweep(
    space={
        "loss": tune.choice(
            [
                {"use": "sigmoid", "beta": tune.loguniform(0.01, 0.5)},
                {"use": "robust", "beta": tune.loguniform(0.01, 0.5)},
                {"use": "hinge", "beta": tune.loguniform(0.01, 0.5)},
                {"use": "apo_zero", "beta": tune.loguniform(0.01, 0.5)},
                {"use": "ipo", "beta": tune.loguniform(0.05, 1.0)},
                {"use": "sigmoid_norm", "beta": tune.loguniform(1.0, 10.0)},
            ]
        ),
        "optim.lr": tune.loguniform(1e-6, 5e-5),
    },
    metric="eval/rewards/accuracies",  # losses of different kinds cannot be compared
    mode="max",
    samples=24,
)
