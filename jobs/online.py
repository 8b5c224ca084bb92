"""Iterative and online DPO: rounds of generate, judge, select, train.

python -m jobs.online CONFIG.yaml [key=value ...]
python -m jobs.online jobs/demo.yaml online.rounds=3 online.judge.use=my_lab.judges:mine
"""

from dpo_ray.config import ONLINE, config_from_argv

if __name__ == "__main__":
    config = config_from_argv(__doc__, ONLINE)

    from dpo_ray.launch.command import run_command, run_on_cluster

    run_command(run_on_cluster, "dpo_ray.launch.online:run_online", config, engines=config.cluster.rollout_engines)
