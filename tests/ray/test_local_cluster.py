"""The private cluster of a run on one machine."""

import subprocess
import sys

from tests.ray.commands import clean_environment

CODE = """
from dpo_ray.config.schema import ClusterConfig
from dpo_ray.launch.cluster import ray_cluster

with ray_cluster(ClusterConfig(), engines=0):
    import ray
    from ray.util.state import get_actor, list_placement_groups

    @ray.remote
    class Actor:
        def ping(self): ...

    actor = Actor.remote()
    ray.get(actor.ping.remote())
    here = {"address": ray.get_runtime_context().gcs_address, "timeout": 30}
    print(get_actor(actor._actor_id.hex(), **here).state, list_placement_groups(**here))
"""


def test_it_serves_the_state_api_with_which_ray_train_frees_the_resources_of_a_killed_run() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE], env=clean_environment(), capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "ALIVE []\n", done.stderr
