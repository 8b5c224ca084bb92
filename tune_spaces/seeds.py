"""Repeats of one configuration with other seeds: the noise that every other sweep is subject to."""

from ray import tune

from dpo_ray.launch.sweep import Sweep

SWEEP = Sweep(space={"run.seed": tune.grid_search(list(range(64)))}, mode="max", samples=4)
