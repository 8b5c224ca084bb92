"""A sweep: many short offline runs over a search space, compared on held-out pairs.

    python -m jobs.sweep CONFIG.yaml SPACE [key=value ...]
    python -m jobs.sweep jobs/offline_demo.yaml beta_lr sweep.samples=8

SPACE is a module of tune_spaces.
"""

import sys

from dpo_ray.config import SWEEP, config_from_argv

if __name__ == "__main__":
    given = sys.argv[1:]
    space = given[1] if len(given) > 1 else ""
    arguments = given if {"-h", "--help"} & set(given) else given[:1] + given[2:]
    config = config_from_argv(__doc__, SWEEP, arguments)

    from dpo_ray.launch.cluster import runs_that_fit
    from dpo_ray.launch.command import run_command, run_on_cluster
    from dpo_ray.launch.spaces import find_space

    def sweep() -> None:
        find_space(space)
        fitting = runs_that_fit(config.cluster)
        run_on_cluster("dpo_ray.launch.sweep:run_sweep", config, space, local_runs=fitting)

    run_command(sweep)
