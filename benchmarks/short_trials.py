"""A search space for trials of a dozen steps, in which only higher learning rates than those of whole runs learn."""

from ray import tune

from dpo_ray.launch.sweep import Sweep

SWEEP = Sweep(
    space={"loss.beta": tune.loguniform(0.05, 0.5), "optim.lr": tune.loguniform(3e-6, 3e-4)},
    metric="eval/rewards/accuracies",
    samples=8,
)
