"""The engines as rank 0 sees them: a client of the fleet that survives its restarts, on a real cluster."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from dpo_ray.launch.rollouts import weights
from dpo_ray.launch.rollouts.weights import FleetEngines
from dpo_ray.types import EngineLost, Probe
from tests.ray.fakes import RecordingFleet

pytestmark = pytest.mark.usefixtures("joined_cluster")

PROBE = Probe((1, 2, 3), (-1.0, -2.0), 0.1)
BUCKETS = [np.full(200_000, fill, dtype=np.float32) for fill in (1, 2)]  # large enough for the object store


def start_fleet(folder: Path, dies_at: str = "", *, restarts: int = -1, answers_in_s: float = 0.0) -> Any:
    options = ray.remote(RecordingFleet).options(num_cpus=0, max_restarts=restarts)
    return options.remote(str(folder / "died"), dies_at, answers_in_s)


def publish(engines: FleetEngines, version: int, *, collective: bool = False) -> list[str]:
    members = engines.begin_update(version, collective=collective)
    for bucket in BUCKETS:
        engines.load(bucket)
    engines.end_update("digest", PROBE)
    return list(members)


def check(fleet: Any, version: int, *, collective: bool = False) -> None:
    begin, *loads, end = ray.get(fleet.seen.remote(), timeout=30)
    assert begin == ("begin", version, collective)
    assert [name for name, _ in loads] == ["load"] * len(BUCKETS)
    assert all(np.array_equal(got, sent) for (_, got), sent in zip(loads, BUCKETS, strict=True))
    assert end == ("end", "digest", PROBE)


@pytest.mark.parametrize("dies_at", ["", "begin", "load", "end"])
def test_a_fleet_gets_the_whole_update_also_if_it_restarts_at_any_call(tmp_path: Path, dies_at: str) -> None:
    fleet = start_fleet(tmp_path, dies_at)
    engines = FleetEngines(fleet, 30, workers_per_engine=1)
    assert publish(engines, 3) == ["0.1", "1.1"]
    assert (tmp_path / "died").exists() == bool(dies_at)
    check(fleet, 3)
    publish(engines, 4)
    check(fleet, 4)
    ray.kill(fleet)


def test_a_fleet_that_restarts_between_two_calls_gets_the_whole_update(tmp_path: Path) -> None:
    fleet = start_fleet(tmp_path)
    engines = FleetEngines(fleet, 30, workers_per_engine=1)
    engines.begin_update(3, collective=False)
    engines.load(BUCKETS[0])
    ray.kill(fleet, no_restart=False)
    while not _answers(fleet):
        pass
    engines.load(BUCKETS[1])
    engines.end_update("digest", PROBE)
    check(fleet, 3)
    ray.kill(fleet)


def _answers(fleet: Any) -> bool:
    try:
        return ray.get(fleet.seen.remote(), timeout=30) == []
    except ray.exceptions.RayActorError:
        return False


def test_a_collective_update_must_begin_again_if_the_fleet_restarts(tmp_path: Path) -> None:
    fleet = start_fleet(tmp_path, "load")
    engines = FleetEngines(fleet, 30, workers_per_engine=1)
    with pytest.raises(EngineLost, match=r"RayActorError|ActorUnavailable|ActorDied"):
        publish(engines, 3, collective=True)
    assert publish(engines, 3, collective=True) == ["0.1", "1.1"]
    check(fleet, 3, collective=True)
    ray.kill(fleet)


def test_an_engine_that_the_fleet_lost_is_lost_for_the_sender(tmp_path: Path) -> None:
    fleet = start_fleet(tmp_path)
    engines = FleetEngines(fleet, 30, workers_per_engine=1)
    engines.begin_update(3, collective=True)
    engines.fleet = another = start_fleet(tmp_path)
    with pytest.raises(EngineLost, match="no update has begun") as raised:
        engines.load(BUCKETS[0])
    assert type(raised.value) is EngineLost, "every rank can unpickle it"
    ray.kill(fleet)
    ray.kill(another)


def test_a_fleet_that_hangs_or_does_not_come_up_is_a_timeout_that_names_the_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "ANSWER_S", 0.0)
    hanging, dead = start_fleet(tmp_path, answers_in_s=60), start_fleet(tmp_path)
    with pytest.raises(TimeoutError, match=r"begin_update .* did not answer in 1 s \(online\.sync_timeout_s\)"):
        publish(FleetEngines(hanging, 1, workers_per_engine=1), 3)
    ray.kill(hanging)
    ray.kill(dead)
    with pytest.raises(TimeoutError, match=r"begin_update .* was not up in 1 s \(online\.sync_timeout_s\)"):
        publish(FleetEngines(dead, 1, workers_per_engine=1), 3)
