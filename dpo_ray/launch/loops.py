"""The training loops as one rank runs them, connected to Ray. Imported by training workers only."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import ray
import ray.train
import torch
import torch.distributed as dist
from ray.exceptions import GetTimeoutError, RayActorError

from dpo_ray.config import Config
from dpo_ray.launch.data import open_pairs
from dpo_ray.launch.reporter import RunReporter
from dpo_ray.launch.rollouts.actors import Rollouts
from dpo_ray.launch.rollouts.weights import FleetEngines, begin_timeout_s, build_transport
from dpo_ray.parallel.collectives import broadcast_from_rank0, gather_or_raise, gather_values
from dpo_ray.rollout.collector import Progress
from dpo_ray.rollout.evaluation import Evaluation, EvaluationStore
from dpo_ray.rollout.late_judging import RoundSamples
from dpo_ray.rollout.ledger import Ledger, RoundData
from dpo_ray.rollout.placement import GpuSlot
from dpo_ray.rollout.selectors import build_selector, select_pairs
from dpo_ray.storage import error_summary
from dpo_ray.sync.ipc import free_cuda_cache
from dpo_ray.train.offline import train_offline
from dpo_ray.train.online import train_online
from dpo_ray.train.shared import SharedParts
from dpo_ray.types import Metrics, TrainResult

ANSWER_TIMEOUT_S = 60.0
"""Longest wait for one answer of the collector, beyond the wait that was asked for."""

COLOCATED_PAUSE_S = 0.2
"""Pause between two questions while engines work on the workers' GPUs."""


def offline(config: Config, device: torch.device, reporter: RunReporter, rollouts: None) -> TrainResult:
    """Trains on the pairs that the driver has tokenized."""
    pairs, held_out = open_pairs(config)
    return train_offline(config, pairs=pairs, held_out=held_out, device=device, reporter=reporter)


class CollectorRounds:
    """The Rounds of one training rank: rank 0 asks the collector, every rank reads its pairs from the ledger.

    A collector that died or hangs is restarted by others; it is asked again for ``cluster.start_timeout_s``.

    Args:
        colocated: True if engines use this rank's GPU while it waits for them.
        report: called on rank 0 with each evaluation: rounds before it, and its metrics.
    """

    def __init__(
        self, config: Config, rollouts: Rollouts, report: Callable[[int, Metrics], None], *, colocated: bool
    ) -> None:
        assert config.online is not None
        self.rollouts, self.report, self.colocated = rollouts, report, colocated
        self.select = partial(select_pairs, build_selector(config.online.select))
        self.max_failed_share = config.online.max_failed_share
        self.ledger, self.evaluations = Ledger(config.run.path), EvaluationStore(config.run.path)
        self.patience_s = config.cluster.start_timeout_s
        # The fleet's own limit expires first, and replaces an engine instead of ending the run.
        self.sleep_timeout_s = config.online.sync_timeout_s + ANSWER_TIMEOUT_S
        self.freed_for: int | None = None

    def poll(self, version: int, *, round: int | None, evaluations: Sequence[int], wait_s: float) -> Progress:
        if self.colocated and self.freed_for != version:
            free_cuda_cache()
            dist.barrier()
            self.freed_for = version
        return broadcast_from_rank0(lambda: self._poll(version, round, evaluations, wait_s))

    def read(self, round: int) -> RoundData:
        data = self.ledger.read(round)
        # Ranks may briefly see different states of a shared disk, and must take the same way.
        judged, reference = broadcast_from_rank0(lambda: (data.judged, data.reference))
        return dataclasses.replace(data, judged=judged, reference=reference)

    def samples(self, round: int) -> RoundSamples:
        return self.ledger.samples(round)

    def judge(self, round: int, scores: Sequence[float]) -> RoundData:
        share = self.max_failed_share
        self._on_rank0(lambda: self.ledger.judge(round, scores, self.select, max_failed_share=share))
        return self.read(round)

    def write_reference(self, round: int, logps: np.ndarray) -> None:
        self._on_rank0(lambda: self.ledger.write_reference(round, logps))

    def recorded(self, version: int) -> bool:
        return broadcast_from_rank0(lambda: self.evaluations.recorded(version))

    def metrics_of(self, version: int) -> Metrics:
        return broadcast_from_rank0(lambda: self.evaluations.read(version))

    def record(self, evaluation: Evaluation, policy: np.ndarray | None, reference: np.ndarray | None) -> Metrics:
        record = self.rollouts.collector.record
        metrics = broadcast_from_rank0(lambda: self._ask(lambda: record.remote(evaluation, policy, reference), 0.0))
        if dist.get_rank() == 0:
            self.report(evaluation.version, metrics)
        return metrics

    def _on_rank0(self, write: Callable[[], None]) -> None:
        """Writes on rank 0; an error is raised on all ranks."""
        gather_or_raise(lambda: write() if dist.get_rank() == 0 else None)

    def _poll(self, version: int, round: int | None, evaluations: Sequence[int], wait_s: float) -> Progress:
        poll = self.rollouts.collector.poll
        try:
            ask = lambda: poll.remote(version, round=round, evaluations=list(evaluations), wait_s=wait_s)  # noqa: E731
            progress = self._ask(ask, wait_s)
            if not self.colocated:
                return progress
            # Training, and receiving an evaluation, need the engines' memory: only when all is there do they sleep.
            if (round is not None and not progress.finished) or len(progress.evaluations) < len(evaluations):
                time.sleep(COLOCATED_PAUSE_S)
                return dataclasses.replace(progress, finished=False, evaluations=())
            ray.get(self.rollouts.fleet.sleep.remote(), timeout=self.sleep_timeout_s)
            return progress
        except Exception as error:  # every rank must get it, or the others wait for this one
            return Progress(error=error_summary(error))

    def _ask(self, call: Callable[[], Any], wait_s: float) -> Any:
        deadline = time.monotonic() + self.patience_s
        while True:
            try:
                return ray.get(call(), timeout=wait_s + ANSWER_TIMEOUT_S)
            except (RayActorError, GetTimeoutError) as error:
                if time.monotonic() > deadline:
                    raise TimeoutError(
                        f"the collector did not answer in {self.patience_s:.0f} s (cluster.start_timeout_s): {error}"
                    ) from None
                time.sleep(1.0)


def online(
    config: Config,
    device: torch.device,
    reporter: RunReporter,
    rollouts: Rollouts,
    shared: SharedParts | None = None,
) -> TrainResult:
    """Trains in rounds, which the collector collects."""
    assert config.online is not None
    rank, on_gpus = ray.train.get_context().get_world_rank(), device.type == "cuda"
    colocated = on_gpus and config.cluster.colocate
    sync = build_transport(config, on_gpus=on_gpus)
    if colocated:
        place_timeout_s = 2 * config.cluster.start_timeout_s + config.online.sync_timeout_s + ANSWER_TIMEOUT_S
        ray.get(rollouts.fleet.place_engines.remote(_gather_gpu_slots()), timeout=place_timeout_s)
    engines = FleetEngines(
        rollouts.fleet,
        config.online.sync_timeout_s,
        begin_timeout_s=begin_timeout_s(config),
        workers_per_engine=config.cluster.gpus_per_engine if on_gpus else 1,
    )
    sync.connect(engines if rank == 0 else None)
    try:
        if rank == 0:  # those that were recorded before a kill, and perhaps not reported
            store = EvaluationStore(config.run.path)
            for version in filter(store.recorded, range(config.online.rounds + 1)):
                reporter.round_evaluation(version, store.read(version))
        rounds = CollectorRounds(config, rollouts, reporter.round_evaluation, colocated=colocated)
        fixed = open_pairs(config)[0] if config.online.source.mix else None
        return train_online(
            config, rounds=rounds, fixed=fixed, sync=sync, device=device, reporter=reporter, shared=shared
        )
    finally:
        engines.close()  # first: a publish in the background then ends soon
        sync.close()


def _gather_gpu_slots() -> list[GpuSlot]:
    """The GPUs of all ranks. A collective."""
    context = ray.get_runtime_context()
    (gpu,) = context.get_accelerator_ids()["GPU"]
    return gather_values(GpuSlot(context.get_node_id(), str(gpu)))
