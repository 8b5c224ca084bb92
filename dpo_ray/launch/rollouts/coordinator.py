"""The coordinator: one actor that owns the engines, the judge and the stream of rounds.

Text, scores and token ids pass through it; tensors never do. Training workers request rounds from it: the first request
for a round starts its collection, and all workers get the same data.
"""

import json
import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from dpo_ray.config import Config
from dpo_ray.launch.cluster import Cluster
from dpo_ray.launch.rollouts.placement import GpuSlot, colocated_placements, dedicated_placement
from dpo_ray.launch.rollouts.pool import EngineFailed, RolloutPool
from dpo_ray.launch.run_dir import log_to_run
from dpo_ray.rollout.collect import prompts_of_round, seed_of, select_pairs
from dpo_ray.rollout.judges import build_judge, check_scores
from dpo_ray.rollout.records import RoundStore
from dpo_ray.rollout.selectors import build_selector
from dpo_ray.rollout.stream import RoundStream
from dpo_ray.storage import write_atomically
from dpo_ray.types import CompletionGroup, NonRetryableError, Prompt, RoundData, TokenSample

logger = logging.getLogger(__name__)

HELD_OUT_ROUND = 2**20
"""Round number from which the seeds of held-out completions are derived: the same at every evaluation."""
SPARE_THREADS = 8
"""Threads besides one per training worker, whose call may block while it waits for a round."""
JUDGE_ATTEMPTS = 2


class JudgeFailed(NonRetryableError):
    """The judge hung, died or raised."""


class JudgeActor:
    """The judge in its own process, so that a judge that hangs can be killed."""

    def __init__(self, config: dict[str, Any]) -> None:
        parsed = Config.model_validate(config)
        log_to_run(parsed.run.path, "judge")
        assert parsed.online is not None
        self.judge = build_judge(parsed.online.judge)

    def score(self, groups: list[CompletionGroup]) -> list[list[float]]:
        """Scores of every completion of every group."""
        return check_scores(groups, self.judge(groups))


class Coordinator:
    """See the module. Has one thread per training worker and SPARE_THREADS.

    ``generating`` and ``pushing``, guarded by ``pool_state``, keep generation and weight pushes from overlapping.

    Args:
        prompts: the training prompts.
        held_out: the held-out prompts.
        status_actor: handle of the StatusActor.
    """

    def __init__(
        self,
        config: dict[str, Any],
        cluster: Cluster,
        prompts: list[Prompt],
        held_out: list[Prompt],
        status_actor: Any,
        extension: str,
    ) -> None:
        self.config = Config.model_validate(config)
        log_to_run(self.config.run.path, "coordinator")
        assert self.config.online is not None
        self.online = self.config.online
        self.prompts, self.held_out_prompts, self.status_actor = prompts, held_out, status_actor
        self.pool = RolloutPool(self.config, cluster, extension)
        self.pool_state = threading.Condition()
        self.generating = self.pushing = False
        self.selector = build_selector(self.online.select)
        self.store = RoundStore(self.config.run.path)
        self.collector = ThreadPoolExecutor(1, "collect")
        self.stream: RoundStream[Future[RoundData]] = RoundStream(
            lambda round: self.collector.submit(self._collect, round),
            lambda collection: collection.result(),
            max_lag=self.online.max_lag,
            rounds=self.online.rounds,
        )
        self.evaluations: dict[int, list[tuple[CompletionGroup, float]]] = {}
        self.evaluation_lock = threading.Lock()
        self.judge_actor: Any = None
        self.started: Future[None] = Future()
        self.gpu_slots: Sequence[GpuSlot] = ()
        self.placing = threading.Lock()

    def start(self) -> None:
        """Start the judge and the engines; ``begin_push`` waits until the engines are up.

        Colocated engines are started by ``place_engines``, when the GPUs of the training workers are known.
        """
        size = self.config.cluster
        try:
            self._start_judge()
            if not (size.colocate and self.pool.cluster.on_gpus):
                self.pool.start([dedicated_placement(size, on_gpus=self.pool.cluster.on_gpus)] * size.rollout_engines)
        except BaseException as error:
            self.started.set_exception(error)
        else:
            self.started.set_result(None)

    def close(self) -> None:
        """Shut down the engines and the judge."""
        self.pool.close()
        if self.judge_actor is not None:
            ray.kill(self.judge_actor)

    # ----------------------------------------------------------------------------------- called by the training workers

    def place_engines(self, slots: Sequence[GpuSlot]) -> None:
        """Start the engines on the training workers' GPUs, or move them to the GPUs of restarted workers.

        Every rank calls this before it allocates GPU memory: the engines measure free memory as they start, then sleep.
        """
        with self.placing:
            if slots == self.gpu_slots:
                with self.pool_state:  # generation for the workers before the restart may still run
                    self.pool_state.wait_for(lambda: not self.generating, timeout=self.online.generate_timeout_s)
                self.pool.sleep()
                return
            self.pool.close()
            self.gpu_slots = ()
            try:
                self.pool.start(colocated_placements(self.config.cluster, slots))
            except ValueError as error:
                raise EngineFailed(str(error)) from None
            self.pool.sleep()
            self.gpu_slots = slots

    def take(self, round: int) -> RoundData:
        """The pairs of a round; blocks until they are ready."""
        data = self.stream.take(round)
        if self.config.cluster.colocate:
            # Engines are awake after a push, and only generation puts them to sleep; a round on disk needs none.
            with self.placing:
                self.pool.sleep()
        return data

    def held_out(self, version: int) -> list[TokenSample]:
        """Judged completions of the held-out prompts by the engines' current weights; empty if already recorded."""
        with self.evaluation_lock:
            # Decided once per version: every rank must get the same answer, even after rank 0 has recorded it.
            if version not in self.evaluations:
                on_record = self._evaluation(version).exists()
                self.evaluations = {version: [] if on_record else self._complete_held_out()}
            groups = self.evaluations[version]
        return [TokenSample(group.prompt_token_ids, group.completions[0].token_ids) for group, _ in groups]

    def scored(self, version: int, policy: np.ndarray, reference: np.ndarray | None) -> None:
        """Write ``evaluations/VERSION.jsonl``: the completions, their scores and their log-probabilities."""
        lines = [
            {
                "prompt": [dict(message) for message in group.prompt.messages],
                "completion": group.completions[0].text,
                "tokens": len(group.completions[0].token_ids),
                "finished": group.completions[0].finished,
                "score": score,
                "policy_logp": float(policy[i]),
                "reference_logp": None if reference is None else float(reference[i]),
            }
            for i, (group, score) in enumerate(self.evaluations[version])
        ]
        file = self._evaluation(version)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, (json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        self.status_actor.metrics.remote({"heldout/score": float(np.mean([line["score"] for line in lines]))})

    def begin_push(self) -> list[Any]:
        """Return all engines, idle until ``pushed``; waits until they are up and a running collection is finished.

        A push that a dead trainer left unfinished needs no clean-up: the next push starts over.
        """
        self.started.result()
        with self.pool_state:
            if not self.pool_state.wait_for(lambda: not self.generating, timeout=self.online.generate_timeout_s):
                raise TimeoutError(
                    f"a push waited {self.online.generate_timeout_s:.0f} s for the engines to finish a collection "
                    "(online.generate_timeout_s)"
                )
            self.pushing = True
        self.pool.weights = None
        return list(self.pool.engines)

    def replace(self, index: int) -> Any:
        """Replace an engine that is dead or half loaded when a push starts; returns the new engine."""
        return self.pool.replace(index)

    def pushed(self, version: int, buckets: list[list[Any] | None], digest: str, without: Sequence[int]) -> None:
        """Record the version that the engines hold, and the references from which a new engine can load it.

        Args:
            buckets: one element: the references, or None if the transport cannot replay the push.
            without: indices of the engines that the push left out.
        """
        self.pool.weights = version, buckets[0], digest
        self.pool.lost = set(without)
        with self.pool_state:
            self.pushing = False
            self.pool_state.notify_all()

    # -------------------------------------------------------------------------------------------------- the collection

    def _collect(self, round: int) -> RoundData:
        """A round's pairs: read from disk if the round is finished, else generated, judged, selected and saved."""
        if self.store.finished(round):
            logger.info("round %d was collected before; using its files", round)
            return self.store.read(round)
        prompts = prompts_of_round(
            self.prompts, seed=self.config.run.seed, round=round, per_round=self.online.prompts_per_round
        )
        started = time.perf_counter()
        groups = self._generate(prompts, round, candidates=self.online.candidates)
        generated = time.perf_counter()
        scores = self._judge(groups)
        judged = time.perf_counter()
        self.store.write(
            round,
            groups,
            scores,
            select_pairs(groups, scores, self.selector),
            timings={"generate_s": generated - started, "judge_s": judged - generated},
            weights_digest=self.pool.weights[2] if self.pool.weights else None,
            seed=self.config.run.seed,
            sampling=self.online.sampling.model_dump(mode="json"),
        )
        return self.store.read(round)

    def _evaluation(self, version: int) -> Path:
        return self.config.run.path / "evaluations" / f"{version:06d}.jsonl"

    def _complete_held_out(self) -> list[tuple[CompletionGroup, float]]:
        if not self.held_out_prompts:
            return []
        groups = self._generate(self.held_out_prompts, HELD_OUT_ROUND, candidates=1, phase="evaluating")
        return [
            (group, row[0])
            for group, row in zip(groups, self._judge(groups), strict=True)
            if group.completions[0].token_ids
        ]

    def _generate(
        self, prompts: Sequence[Prompt], round: int, *, candidates: int, phase: str = "generating"
    ) -> list[CompletionGroup]:
        seeds = [seed_of(self.config.run.seed, round, prompt.index) for prompt in prompts]
        self.status_actor.phase.remote(phase, 0, len(prompts))
        with self.pool_state:
            # A push may itself wait for a collection.
            timeout = self.online.sync_timeout_s + self.online.generate_timeout_s
            if not self.pool_state.wait_for(lambda: not self.pushing and not self.generating, timeout=timeout):
                raise TimeoutError(
                    f"waited {timeout:.0f} s for a push of weights or a collection to end "
                    "(online.sync_timeout_s + online.generate_timeout_s)"
                )
            self.generating = True
        try:
            if self.config.cluster.colocate:
                self.pool.wake()
            groups = self.pool.generate(
                prompts,
                seeds,
                candidates=candidates,
                timeout_s=self.online.generate_timeout_s,
                progress=lambda done, total: self.status_actor.phase.remote(phase, done, total),
            )
            if self.config.cluster.colocate:
                self.pool.sleep()
            return groups
        finally:
            with self.pool_state:
                self.generating = False
                self.pool_state.notify_all()

    def _start_judge(self) -> None:
        if self.judge_actor is not None:
            ray.kill(self.judge_actor)
        self.judge_actor = ray.remote(num_cpus=0)(JudgeActor).remote(self.config.model_dump(mode="json"))

    def _judge(self, groups: list[CompletionGroup]) -> list[list[float]]:
        """Scores from the judge's process; a judge that hangs, dies or raises is restarted and called once more.

        Raises:
            JudgeFailed: the judge failed twice.
        """
        self.status_actor.phase.remote("judging", 0, 0)
        timeout = self.online.judge_timeout_s
        problem = ""
        for _ in range(JUDGE_ATTEMPTS):
            try:
                return ray.get(self.judge_actor.score.remote(groups), timeout=timeout)
            except GetTimeoutError:
                problem = f"returned no scores for {len(groups)} prompts in {timeout:.0f} s (online.judge_timeout_s)"
            except RayActorError:
                problem = "died"
            except RayTaskError as error:
                problem = f"raised {error.cause!r}"
            logger.warning("judge %r %s; restarting it", self.online.judge.use, problem)
            self._start_judge()
        raise JudgeFailed(f"judge {self.online.judge.use!r} {problem}, twice; its log is {Path('logs') / 'judge.log'}")
