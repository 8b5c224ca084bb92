"""DPO on a fixed preference set.

python -m jobs.offline CONFIG.yaml [key=value ...]
python -m jobs.offline jobs/offline_demo.yaml optim.lr=1e-6 loss.beta=0.05
"""

from dpo_ray.config import OFFLINE, config_from_argv

if __name__ == "__main__":
    config = config_from_argv(__doc__, OFFLINE)

    from dpo_ray.launch.command import run_command, run_on_cluster

    run_command(run_on_cluster, "dpo_ray.launch.offline:run_offline", config)
