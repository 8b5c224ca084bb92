"""The training loops as one rank runs them, connected to Ray. Imported by training workers only."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import ray
import ray.train
import torch
import torch.distributed as dist

from dpo_ray.config import Config
from dpo_ray.launch.data import open_pairs
from dpo_ray.launch.reporter import RunReporter
from dpo_ray.launch.rollouts.placement import GpuSlot
from dpo_ray.launch.rollouts.push import PoolReceiver, build_transport
from dpo_ray.parallel.collectives import gather_values
from dpo_ray.sync.ipc import free_cuda_cache
from dpo_ray.train.offline import train_offline
from dpo_ray.train.online import train_online
from dpo_ray.types import RoundData, TokenSample, TrainResult


def offline(config: Config, device: torch.device, reporter: RunReporter, coordinator: Any) -> TrainResult:
    """Trains on the pairs that the driver has tokenized."""
    pairs, held_out = open_pairs(config)
    return train_offline(config, pairs=pairs, held_out=held_out, device=device, reporter=reporter)


class CoordinatorRounds:
    """The Rounds of one training rank, served by the coordinator.

    Args:
        colocated: True if engines use this rank's GPU while it waits for them.
    """

    def __init__(self, coordinator: Any, rank: int, *, colocated: bool) -> None:
        self.coordinator, self.rank, self.colocated = coordinator, rank, colocated
        self.pending: Any = None

    def take(self, round: int, *, wait_s: float) -> RoundData | None:
        """The pairs of a round; None if they are not ready after ``wait_s`` seconds: call again."""
        if self.pending is None:
            self._free_gpu()
            self.pending = self.coordinator.take.remote(round)
        ready, _ = ray.wait([self.pending], timeout=wait_s)
        if not ready:
            return None
        self.pending = None
        return ray.get(ready[0])

    def held_out(self, version: int) -> Sequence[TokenSample]:
        """Completions of the held-out prompts by the engines' current weights."""
        self._free_gpu()
        return ray.get(self.coordinator.held_out.remote(version))

    def scored(self, version: int, policy: np.ndarray, reference: np.ndarray | None) -> None:
        """Sends the log-probabilities of the held-out completions, from rank 0."""
        if self.rank == 0:
            ray.get(self.coordinator.scored.remote(version, policy, reference))

    def _free_gpu(self) -> None:
        if self.colocated:
            free_cuda_cache()
            dist.barrier()


def online(config: Config, device: torch.device, reporter: RunReporter, coordinator: Any) -> TrainResult:
    """Trains in rounds, whose pairs the coordinator collects."""
    assert config.online is not None
    rank, on_gpus = ray.train.get_context().get_world_rank(), device.type == "cuda"
    colocated = on_gpus and config.cluster.colocate
    sync = build_transport(config, on_gpus=on_gpus)
    if colocated:
        ray.get(coordinator.place_engines.remote(_gather_gpu_slots()))
    receiver = PoolReceiver(
        coordinator,
        config.online.sync_timeout_s,
        workers_per_engine=config.cluster.gpus_per_engine if on_gpus else 1,
        replays=sync.replays,
    )
    sync.connect(receiver if rank == 0 else None)
    rounds = CoordinatorRounds(coordinator, rank, colocated=colocated)
    try:
        return train_online(config, rounds=rounds, sync=sync, device=device, reporter=reporter)
    finally:
        sync.close()


def _gather_gpu_slots() -> list[GpuSlot]:
    """The GPUs of all ranks. A collective."""
    context = ray.get_runtime_context()
    (gpu,) = context.get_accelerator_ids()["GPU"]
    return gather_values(GpuSlot(context.get_node_id(), str(gpu)))
