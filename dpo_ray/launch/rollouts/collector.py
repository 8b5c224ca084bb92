"""The collector as a Ray actor. It owns nothing: its state is the ledger, so Ray may restart it at any moment."""

import asyncio
import math
import os
import pickle
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from ray.exceptions import RayError

from dpo_ray.config import Config
from dpo_ray.config.rounds import JudgeConfig
from dpo_ray.launch.rollouts.judge_actor import RemoteJudge
from dpo_ray.launch.run_dir import log_to_run
from dpo_ray.rollout.collector import Collector, Progress
from dpo_ray.rollout.dispatch import Dispatcher
from dpo_ray.rollout.engine import EngineStatus
from dpo_ray.rollout.evaluation import Evaluation, EvaluationStore
from dpo_ray.rollout.judges.calls import Capacity
from dpo_ray.rollout.judging import JudgePool
from dpo_ray.rollout.ledger import Ledger
from dpo_ray.rollout.selectors import build_selector, select_pairs
from dpo_ray.rollout.sources import unjudged
from dpo_ray.types import Metrics

SEQUENCES_PER_ENGINE = 2048
"""Completions in flight per engine: twice those that vLLM generates at a time on the largest GPUs by default (1,024),
since others wait for the judge."""
SHOW_INTERVAL_S = 0.2
STATUS_TIMEOUT_S = 5.0


class CollectorActor:
    """Ray actor that runs one ``Collector``.

    Args:
        prompt_file: path of a pickled (training prompts, held-out prompts).
        handles: pickled (FleetActor handle, judge key -> list of RemoteJudge, StatusActor handle).
    """

    def __init__(
        self,
        config: dict[str, Any],
        prompt_file: Path,
        handles: bytes,
    ) -> None:
        self.config = Config.model_validate(config)
        log_to_run(self.config.run.path, "collector")
        self.prompt_file = prompt_file
        self.fleet, self.judges, self.status_actor = pickle.loads(handles)
        self.evaluations = EvaluationStore(self.config.run.path)
        self._shown = 0.0
        self._started: asyncio.Future[Collector] | None = None
        self._background: list[asyncio.Task[None]] = []

    async def ping(self) -> int:
        """The id of this process; returns at once."""
        return os.getpid()

    async def poll(self, version: int, *, round: int | None, evaluations: Sequence[int], wait_s: float) -> Progress:
        """See ``Collector.poll``."""
        try:
            collector = await self._collector()
            for task in self._background:
                if task.done():
                    task.result()
            return await collector.poll(version, round=round, evaluations=evaluations, wait_s=wait_s)
        except Exception as error:
            return Progress(error=f"{type(error).__name__}: {error}")

    async def record(self, evaluation: Evaluation, policy: np.ndarray | None, reference: np.ndarray | None) -> Metrics:
        """Write an evaluation to the run directory; returns its metrics."""
        as_list = lambda logps: None if logps is None else logps.tolist()  # noqa: E731
        metrics = self.evaluations.write(evaluation, as_list(policy), as_list(reference))
        self.status_actor.metrics.remote(metrics)
        return metrics

    async def _collector(self) -> Collector:
        """The collector, built by the first call; other calls wait for it."""
        if self._started is None:
            self._started = asyncio.ensure_future(self._start())
        return await asyncio.shield(self._started)

    async def _start(self) -> Collector:
        online = self.config.online
        assert online is not None
        pools: dict[str, JudgePool] = {}
        for key, replicas in self.judges.items():
            # A judge with both purposes has one queue: its calls are limited together.
            same = next((pool for other, pool in pools.items() if self.judges[other] is replicas), None)
            pools[key] = same or await _pool(online.judges[key], replicas)
        engines = Dispatcher(self.fleet.membership.remote, self.fleet.suspect.remote)
        distinct = {id(pool): pool for pool in pools.values()}.values()
        work = (engines.follow(), *(pool.run() for pool in distinct))
        self._background = [asyncio.ensure_future(endless) for endless in work]
        prompts, held_out = pickle.loads(self.prompt_file.read_bytes())
        sequences = self.config.cluster.rollout_engines * SEQUENCES_PER_ENGINE
        return Collector(
            online,
            seed=self.config.run.seed,
            keep_rounds=self.config.kept_rounds,
            prompts=prompts,
            held_out=held_out,
            ledger=Ledger(self.config.run.path),
            engines=engines,
            judge=pools["judge"].score if "judge" in pools else unjudged,
            eval_judge=pools["eval_judge"].score if "eval_judge" in pools else unjudged,
            select=partial(select_pairs, build_selector(online.select)),
            in_flight=math.ceil(sequences / online.candidates),
            statuses=self._statuses,
            progress=self._show,
        )

    async def _statuses(self) -> Mapping[str, EngineStatus]:
        """The statuses of all engines; none if the fleet does not answer."""
        try:
            async with asyncio.timeout(STATUS_TIMEOUT_S):
                return await self.fleet.statuses.remote()
        except (TimeoutError, RayError):
            return {}

    def _show(self, phase: str, done: int, total: int) -> None:
        """Update the status, not for each of hundreds of groups per second."""
        if done == total or time.monotonic() > self._shown + SHOW_INTERVAL_S:
            self._shown = time.monotonic()
            self.status_actor.phase.remote(phase, done, total)


async def _pool(config: JudgeConfig, replicas: Sequence[RemoteJudge]) -> JudgePool:
    """The replicas of a judge as one, when they are ready."""
    capacities = [await replica.ready() for replica in replicas]
    return JudgePool(
        replicas,
        batch=config.groups_per_call,
        capacity=Capacity(config.concurrency)
        if config.concurrency
        else min(capacities, key=lambda each: each.requests),
        timeout_s=config.timeout_s,
        retries=config.retries,
    )
