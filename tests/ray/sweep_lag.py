"""A space whose trials need different engines."""

from ray import tune

from dpo_ray.launch.sweep import Sweep

SWEEP = Sweep(space={"online.max_lag": tune.grid_search([0, 1])}, samples=2)
