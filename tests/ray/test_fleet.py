"""The fleet's actor on a cluster: processes, signals, placement groups and object references."""

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray.util.placement_group import placement_group_table

from dpo_ray.launch.cluster import Cluster, same_node
from dpo_ray.launch.rollouts.fleet import FleetActor
from dpo_ray.launch.rollouts.remote_engine import StoredMessage
from dpo_ray.rollout.engine import Request, RequestTimedOut
from dpo_ray.rollout.membership import Membership
from dpo_ray.types import Probe, Prompt
from tests.ray.fakes import LOGPS, FakeEngineActor, Sender, UnbuildableEngineActor

pytestmark = pytest.mark.usefixtures("joined_cluster")

PROBE = Probe((1, 2, 3), LOGPS, tolerance=0.1)
PATIENCE_S = 60.0


@contextlib.contextmanager
def fleet_of(
    folder: Path,
    engines: int,
    actor_class: type = FakeEngineActor,
    *,
    engine_timeout_s: float = 60.0,
    cpus: int = 8,
) -> Iterator[Any]:
    """A fleet of engines of three CPUs each on a cluster with ``cpus``; nothing may be left of it."""
    config = {
        "run": {"dir": str(folder)},
        "model": {"path": "tiny"},
        "cluster": {"rollout_engines": engines, "cpus_per_engine": 3, "start_timeout_s": 60},
        "online": {"prompts": "p.jsonl", "engine_timeout_s": engine_timeout_s, "sync_timeout_s": 20},
    }
    options = {"num_cpus": 0, "max_restarts": -1, "max_concurrency": 1000, "scheduling_strategy": same_node()}
    actor = ray.remote(FleetActor).options(**options)
    fleet: Any = actor.remote(config, Cluster(gpus=0, cpus=cpus), actor_class=actor_class, worker_extension="none")
    try:
        yield fleet
    finally:
        ray.get(fleet.close.remote(), timeout=PATIENCE_S)
        ray.kill(fleet)
    until(lambda: ray.available_resources().get("CPU") == cpus)
    assert not [group for group in placement_group_table().values() if group["state"] != "REMOVED"]


def until(ready: Callable[[], Any]) -> Any:
    """Wait for a result that is true."""
    deadline = time.monotonic() + PATIENCE_S
    while not (result := ready()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return result


def membership(fleet: Any) -> Membership:
    """The membership; a fleet that is restarting is asked again."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            return ray.get(fleet.membership.remote(-1, 0.0), timeout=PATIENCE_S)
        except ray.exceptions.RayActorError:
            assert time.monotonic() < deadline
            time.sleep(0.2)


def serving(fleet: Any, *ids: str) -> dict[str, int]:
    """Wait until exactly these engines serve; returns their processes."""
    now = until(lambda: (now := membership(fleet)) and [m.id for m in now.members] == list(ids) and now)
    return {member.id: ray.get(member.engine.handle.pid.remote(), timeout=PATIENCE_S) for member in now.members}


def update(fleet: Any, version: int, refs: list[Any], digest: str) -> None:
    ray.get(fleet.begin_update.remote(version, collective=False), timeout=PATIENCE_S)
    for ref in refs:
        ray.get(fleet.load.remote(StoredMessage(ref)), timeout=PATIENCE_S)
    ray.get(fleet.end_update.remote(digest, PROBE), timeout=PATIENCE_S)


def test_engines_that_are_killed_or_stopped_are_replaced_and_a_fleet_that_dies_starts_new_ones(tmp_path: Path) -> None:
    with fleet_of(tmp_path, 3, engine_timeout_s=5.0) as fleet:  # the cluster has room for two
        update(fleet, 1, [ray.put("all "), ray.put("weights")], "all weights")
        before = until(lambda: len((now := membership(fleet)).members) == 2 and now)
        first, second = (member.id for member in before.members)
        pids = serving(fleet, first, second)

        os.kill(pids[first], signal.SIGKILL)
        ray.get(fleet.suspect.remote(first, "ActorDiedError"), timeout=PATIENCE_S)
        assert [member.id for member in membership(fleet).members] == [second]
        # Its place may go to the third engine, which has waited for it.
        after = until(lambda: len((now := membership(fleet)).members) == 2 and now)
        other = next(member.id for member in after.members if member.id != second)
        assert other != first

        os.kill(pids[second], signal.SIGSTOP)
        now = until(lambda: len((now := membership(fleet)).members) == 2 and second not in str(now.members) and now)
        assert now.error is None
        until(lambda: not psutil.pid_exists(pids[second]))

        old = {ray.get(member.engine.handle.pid.remote()) for member in now.members}
        os.kill(ray.get(fleet.__ray_call__.remote(lambda actor: os.getpid()), timeout=PATIENCE_S), signal.SIGKILL)
        until(lambda: not any(psutil.pid_exists(pid) for pid in old))
        restarted = until(lambda: (now := membership(fleet)).needs_weights and now)
        assert restarted.epoch > now.epoch
        assert restarted.members == ()
        update(fleet, 2, [ray.put("weights")], "weights")
        until(lambda: [member.version for member in membership(fleet).members] == [2, 2])


def test_messages_whose_owner_died_cost_no_engine_and_errors_of_requests_arrive_as_they_are(tmp_path: Path) -> None:
    with fleet_of(tmp_path, 2) as fleet:
        sender: Any = ray.remote(num_cpus=0)(Sender).remote()
        (ref,) = ray.get(sender.put.remote("weights"), timeout=PATIENCE_S)
        update(fleet, 1, [ref], "weights")
        engine = until(lambda: len((now := membership(fleet)).members) == 2 and now).members[0].engine

        for candidates, error in ((0, ValueError), (1, RequestTimedOut)):
            request = Request(Prompt(0, (), (1,)), None, candidates, 0, 1.0)  # pyrefly: ignore
            with pytest.raises(error):
                asyncio.run(asyncio.wait_for(engine.generate(request), PATIENCE_S))

        ray.kill(sender)
        pids = serving(fleet, "0.1", "1.1")
        os.kill(pids["1.1"], signal.SIGKILL)
        until(lambda: len(membership(fleet).members) == 1)
        until(lambda: "1.2" in ray.get(fleet.statuses.remote(), timeout=PATIENCE_S))
        os.kill(pids["0.1"], signal.SIGKILL)
        now = until(lambda: (now := membership(fleet)).needs_weights and now)
        assert now.error is None
        update(fleet, 2, [ray.put("other weights")], "other weights")
        serving(fleet, "0.2", "1.2")


def test_an_engine_that_cannot_be_built_ends_the_run_with_its_error_and_the_place_of_its_log(tmp_path: Path) -> None:
    with fleet_of(tmp_path, 2, UnbuildableEngineActor) as fleet:
        error = until(lambda: membership(fleet).error)
        assert "no such model: tiny" in error
        assert str(tmp_path) in error
        assert "engine-*.log" in error
