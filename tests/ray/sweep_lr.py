"""A space of the learning rate alone, which leaves the loss of a clone's first step as it is."""

from ray import tune

from dpo_ray.launch.sweep import Sweep

SWEEP = Sweep(space={"optim.lr": tune.loguniform(1e-4, 1e-2)}, metric="eval/loss", mode="min", samples=2)
