"""What one rank of a run does, in terms of Ray. Only training workers import it, and with it all that trains."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import ray
import ray.train
import torch
import torch.distributed as dist

from dpo_ray.config import Config
from dpo_ray.launch.preparation import open_pairs
from dpo_ray.launch.rollouts.placement import GpuSlot
from dpo_ray.launch.rollouts.push import PoolReceiver, build_transport
from dpo_ray.launch.status import RunReporter
from dpo_ray.sync.ipc import free_cuda_cache
from dpo_ray.train.offline import train_offline
from dpo_ray.train.online import train_online
from dpo_ray.types import RoundData, TokenSample, TrainResult


def offline(config: Config, device: torch.device, reporter: RunReporter, handles: dict[str, Any]) -> TrainResult:
    """A fixed preference set, tokenised before."""
    pairs, held_out = open_pairs(config)
    return train_offline(config, pairs=pairs, held_out=held_out, device=device, reporter=reporter)


class CoordinatorRounds:
    """The Rounds of one training rank, asked of the coordinator.

    Args:
        shared: whether engines use this rank's GPU while it waits for them.
    """

    def __init__(self, coordinator: Any, rank: int, *, shared: bool) -> None:
        self.coordinator, self.rank, self.shared = coordinator, rank, shared
        self.asked: Any = None

    def take(self, round: int, *, wait_s: float) -> RoundData | None:
        """The pairs of a round; None where they are not there after ``wait_s`` seconds, to be asked for again."""
        if self.asked is None:
            self._make_room()
            self.asked = self.coordinator.take.remote(round)
        ready, _ = ray.wait([self.asked], timeout=wait_s)
        if not ready:
            return None
        self.asked = None
        return ray.get(ready[0])

    def held_out(self, version: int) -> Sequence[TokenSample]:
        """Completions of the held-out prompts."""
        self._make_room()
        return ray.get(self.coordinator.held_out.remote(version))

    def scored(self, version: int, policy: np.ndarray, reference: np.ndarray | None) -> None:
        """Hand the log-probabilities over, once."""
        if self.rank == 0:
            ray.get(self.coordinator.scored.remote(version, policy, reference))

    def _make_room(self) -> None:
        if self.shared:
            free_cuda_cache()
            dist.barrier()


def online(config: Config, device: torch.device, reporter: RunReporter, handles: dict[str, Any]) -> TrainResult:
    """Rounds, whose pairs come from the coordinator."""
    assert config.online is not None
    coordinator, rank = handles["coordinator"], ray.train.get_context().get_world_rank()
    on_gpus = device.type == "cuda"
    shared = on_gpus and config.cluster.colocate
    sync = build_transport(config, on_gpus=on_gpus)
    if shared:
        ray.get(coordinator.seat.remote(_gpu_slots()))
    receiver = PoolReceiver(
        coordinator,
        config.online.sync_timeout_s,
        workers_per_engine=config.cluster.gpus_per_engine if on_gpus else 1,
        replays=sync.replays,
    )
    sync.connect(receiver if rank == 0 else None)
    rounds = CoordinatorRounds(coordinator, rank, shared=shared)
    try:
        return train_online(config, rounds=rounds, sync=sync, device=device, reporter=reporter)
    finally:
        sync.close()


def _gpu_slots() -> list[GpuSlot]:
    """The GPUs of all ranks. A collective."""
    here = ray.get_runtime_context()
    (gpu,) = here.get_accelerator_ids()["GPU"]
    seats: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(seats, GpuSlot(here.get_node_id(), str(gpu)))
    return seats
