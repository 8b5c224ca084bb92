"""A space for online runs."""

from ray import tune

from dpo_ray.launch.sweep import Sweep

SWEEP = Sweep(
    space={"optim.lr": tune.loguniform(1e-4, 1e-2), "online.sampling.top_p": tune.choice([0.9, 1.0])}, samples=2
)
