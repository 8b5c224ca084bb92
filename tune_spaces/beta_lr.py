"""beta and the learning rate, the two settings that matter most for DPO."""

from ray import tune

from dpo_ray.launch.sweep import Sweep

SWEEP = Sweep(
    space={"loss.beta": tune.loguniform(0.01, 0.5), "optim.lr": tune.loguniform(1e-6, 5e-5)},
    metric="eval/rewards/accuracies",
    mode="max",
    samples=4,
)
