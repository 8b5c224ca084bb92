"""Colocated engines under the coordinator, with a pool that records its calls."""

import threading
from collections.abc import Sequence
from typing import Any

import pytest

from dpo_ray.config import Config
from dpo_ray.launch.rollouts.coordinator import Coordinator
from dpo_ray.launch.rollouts.placement import EnginePlacement, GpuSlot
from dpo_ray.launch.rollouts.pool import EngineFailed
from dpo_ray.rollout.stream import RoundStream
from dpo_ray.types import RoundData

SLOTS = [GpuSlot("node a", "0"), GpuSlot("node a", "1")]


class Pool:
    """Records its calls; raises on start if ``full``."""

    def __init__(self, *, full: bool = False) -> None:
        self.calls: list[str] = []
        self.full = full

    def start(self, places: Sequence[EnginePlacement]) -> None:
        """Records the nodes."""
        if self.full:
            raise ValueError("no room")
        self.calls.append(f"start on {', '.join(str(place.node) for place in places)}")

    def sleep(self) -> None:
        """Records the call."""
        self.calls.append("sleep")

    def close(self) -> None:
        """Records the call."""
        self.calls.append("close")


def coordinator(pool: Any, *, colocate: bool) -> Coordinator:
    """A coordinator without actors, log files or prompts."""
    made = Coordinator.__new__(Coordinator)
    made.config = Config.model_validate(
        {
            "model": {"path": "tiny"},
            "cluster": {"train_workers": 2, "rollout_engines": 2, "colocate": colocate},
            "online": {"prompts": "p.jsonl"},
        }
    )
    assert made.config.online is not None
    made.online, made.pool, made.gpu_slots, made.placing = made.config.online, pool, (), threading.Lock()
    made.pool_state, made.generating = threading.Condition(), False
    read = lambda round: RoundData(round, (), (), round)  # noqa: E731
    stream: Any = RoundStream(read, lambda data: data, max_lag=0, rounds=3)  # as if all rounds were on disk
    made.stream = stream
    return made


@pytest.mark.parametrize("colocate", [True, False])
def test_colocated_engines_sleep_before_training_on_a_round_from_disk(colocate: bool) -> None:
    pool = Pool()
    assert coordinator(pool, colocate=colocate).take(0).index == 0
    assert pool.calls == (["sleep"] if colocate else [])


def test_colocated_engines_start_once_and_again_where_the_workers_have_moved() -> None:
    pool = Pool()
    made = coordinator(pool, colocate=True)
    made.place_engines(SLOTS)
    made.place_engines(SLOTS)  # the other rank
    assert pool.calls == ["close", "start on node a, node a", "sleep", "sleep"]
    pool.calls.clear()
    made.place_engines([GpuSlot("node b", "0"), GpuSlot("node b", "1")])
    assert pool.calls == ["close", "start on node b, node b", "sleep"]


def test_gpus_too_small_for_an_engine_fail_the_run_at_every_attempt() -> None:
    made = coordinator(Pool(full=True), colocate=True)
    for _ in range(2):
        with pytest.raises(EngineFailed, match="no room"):
            made.place_engines(SLOTS)
