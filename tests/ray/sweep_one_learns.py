"""A space whose first trial learns and whose others do not: asha stops the first of them that report after it."""

from ray import tune

from dpo_ray.launch.sweep import Sweep

SWEEP = Sweep(
    space={"optim.lr": tune.grid_search([3e-3, 1e-6, 1e-7, 1e-8, 1e-9, 1e-10])}, metric="eval/loss", mode="min"
)
