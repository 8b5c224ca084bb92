"""beta and the learning rate of an online run, by the judge's score of held-out prompts.

``sweep.constraint`` bounds the distance from the reference, for example ``{metric: kl, max: 10}``.
"""

from ray import tune

from dpo_ray.launch.sweep import Sweep

SWEEP = Sweep(
    space={"loss.beta": tune.loguniform(0.02, 0.5), "optim.lr": tune.loguniform(1e-6, 5e-5)},
    metric="heldout/score",
    mode="max",
    samples=4,
)
