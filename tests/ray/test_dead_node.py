"""A node of the cluster dies with its engines: the fleet places them on the nodes that are left."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster as Nodes

from tests.ray.test_fleet import fleet_of, membership, serving, until, update

pytestmark = pytest.mark.slow


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Nodes]:
    """A cluster whose head, which runs the fleet, has room for one engine of three CPUs."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    cluster = Nodes(initialize_head=True, head_node_args={"num_cpus": 3})
    ray.init(cluster.address, log_to_driver=False, configure_logging=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def node_of(engine: Any) -> str:
    """Ray's id of the node on which an engine runs."""
    return ray.get(engine.handle.__ray_call__.remote(lambda actor: ray.get_runtime_context().get_node_id()))


def test_the_engines_of_a_dead_node_are_placed_on_another_and_get_the_weights(nodes: Nodes, tmp_path: Path) -> None:
    lost = nodes.add_node(num_cpus=3)
    with fleet_of(tmp_path, 2, engine_timeout_s=5.0, cpus=6) as fleet:
        update(fleet, 1, [ray.put("weights")], "weights")
        serving(fleet, "0.1", "1.1")
        places = {member.id: node_of(member.engine) for member in membership(fleet).members}
        assert len(set(places.values())) == 2
        dead = next(id for id, place in places.items() if place == lost.node_id)

        nodes.remove_node(lost, allow_graceful=False)
        left = until(lambda: len((now := membership(fleet)).members) == 1 and now)
        assert [member.id for member in left.members] == [id for id in places if id != dead], "the other one serves on"
        assert left.error is None

        replacement = nodes.add_node(num_cpus=3)
        now = until(lambda: len((now := membership(fleet)).members) == 2 and now)
        (placed,) = [member for member in now.members if member.id not in places]
        assert placed.version == 1, "with the weights of the update before it started"
        assert node_of(placed.engine) == replacement.node_id
