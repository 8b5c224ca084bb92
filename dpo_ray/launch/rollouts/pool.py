"""The pool of vLLM engines: one Ray actor per engine, in its own placement group or on the training workers' GPUs."""

import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from dpo_ray.config import Config
from dpo_ray.launch.cluster import Cluster
from dpo_ray.launch.rollouts.engine_actor import EngineActor
from dpo_ray.launch.rollouts.placement import EnginePlacement
from dpo_ray.rollout.vllm_engine import engine_environment
from dpo_ray.storage import error_summary
from dpo_ray.types import CompletionGroup, NonRetryableError, Prompt

logger = logging.getLogger(__name__)

CHUNKS_PER_ENGINE = 4
"""A round is split into about this many chunks per engine: enough to balance their speeds and to show progress."""
MIN_CHUNK_COMPLETIONS = 128
"""Smaller chunks would leave an engine's batches half empty."""
ENGINE_ATTEMPTS = 2
"""Attempts per chunk: if a second engine dies on the same prompts, the prompts are the cause."""


class EngineFailed(NonRetryableError):
    """An engine could not be started, or the same prompts killed two engines."""


class EnginesLost(RuntimeError):
    """No engine with the policy's weights is left; the training workers restart and push them again."""


class RolloutPool:
    """The engines, and the distribution of prompts over them. Not thread-safe.

    Args:
        worker_extension: import path of the transport's receiving end.
    """

    def __init__(self, config: Config, cluster: Cluster, worker_extension: str) -> None:
        self.config, self.cluster, self.worker_extension = config, cluster, worker_extension
        self.placements: list[EnginePlacement] = []
        self.groups: list[Any] = []
        self.engines: list[Any] = []
        self.lost: set[int] = set()
        """Engines that died since the last push or were left out of it; the next push replaces them."""
        self.weights: tuple[int, list[Any] | None, str] | None = None
        """Version, bucket references and digest of the last push; the references are None if it cannot be replayed."""

    def start(self, placements: Sequence[EnginePlacement]) -> None:
        """Start one engine per placement and wait for all.

        Raises:
            EngineFailed: an engine was not up after ``cluster.start_timeout_s``.
        """
        size = self.config.cluster
        self.placements = list(placements)
        self.groups = [
            placement_group([dict(b) for b in placement.bundles], strategy="PACK", name=f"dpo_ray-engine-{index}")
            for index, placement in enumerate(placements)
            if placement.bundles
        ]
        waited_for = [group.ready() for group in self.groups]
        _, missing = ray.wait(waited_for, num_returns=len(waited_for), timeout=size.start_timeout_s)
        if missing:
            raise EngineFailed(
                f"{len(missing)} of {len(waited_for)} engines got no resources in {size.start_timeout_s:.0f} s "
                "(cluster.start_timeout_s): other work holds the cluster's CPUs or GPUs"
            )
        self.engines = [self._start_engine(index) for index in range(len(placements))]
        for index, engine in enumerate(self.engines):
            self._await_ready(index, engine)

    def _start_engine(self, index: int) -> Any:
        size, online, placement = self.config.cluster, self.config.online, self.placements[index]
        assert online is not None
        on_cpu = not self.cluster.on_gpus
        environment = engine_environment(online.engine, on_cpu=on_cpu, threads=size.cpus_per_engine)
        actor = ray.remote(EngineActor).options(
            num_cpus=placement.num_cpus,
            num_gpus=placement.num_gpus,
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                self.groups[index], placement_group_bundle_index=0, placement_group_capture_child_tasks=True
            )
            if placement.node is None
            else NodeAffinitySchedulingStrategy(placement.node, soft=False),
            runtime_env={"env_vars": environment | placement.environment},
        )
        return actor.remote(
            self.config.model_dump(mode="json"),
            index,
            on_cpu=on_cpu,
            executor=placement.executor,
            worker_extension=self.worker_extension,
        )

    def _await_ready(self, index: int, engine: Any) -> None:
        timeout = self.config.cluster.start_timeout_s
        logs = self.config.run.path / "logs" / f"engine-{index}.log"
        try:
            ray.get(engine.ready.remote(), timeout=timeout)
        except GetTimeoutError:
            raise EngineFailed(
                f"engine {index} was not up after {timeout:.0f} s (cluster.start_timeout_s); see {logs}"
            ) from None
        except RayActorError as error:
            raise EngineFailed(f"engine {index} failed to start: {error_summary(error)}; see {logs}") from None

    def replace(self, index: int) -> Any:
        """Replace a dead engine for a push that is about to send weights; waits until the new engine is up.

        Raises:
            EngineFailed: the new engine did not start.
        """
        engine = self._start_another(index)
        self._await_ready(index, engine)
        self.lost.discard(index)
        return engine

    def _start_another(self, index: int) -> Any:
        """Replace a dead engine without waiting for the new one, which counts as lost until it has weights."""
        logger.warning("engine %d died; starting another in its place", index)
        self.lost.add(index)
        with contextlib.suppress(Exception):
            ray.kill(self.engines[index])
        engine = self.engines[index] = self._start_engine(index)
        return engine

    def _rejoin(self, index: int) -> Any:
        """Replace a dead engine and send the weights of the last push to the new one.

        Returns:
            Object reference of the digest of the weights that it received.
        """
        assert self.weights is not None
        version, buckets, _ = self.weights
        engine = self._start_another(index)
        engine.start_update.remote()
        for bucket in buckets or ():
            engine.load.remote(bucket)
        return engine.finish_update.remote(version)

    def _rejoined(self, index: int, digest: Any) -> bool:
        """True if the new engine is up with the weights of the last push.

        Raises:
            EngineFailed: the weights that it received differ from those pushed.
        """
        assert self.weights is not None
        try:
            found = ray.get(digest)
        except RayError as error:
            logger.warning("engine %d could not be replaced: %s", index, error_summary(error))
            return False
        version, _, pushed = self.weights
        if found != pushed:
            raise EngineFailed(f"engine {index} received weights of digest {found}; version {version} has {pushed}")
        self.lost.discard(index)
        return True

    def generate(
        self,
        prompts: Sequence[Prompt],
        seeds: Sequence[int],
        *,
        candidates: int,
        timeout_s: float,
        progress: Callable[[int, int], None],
    ) -> list[CompletionGroup]:
        """Generate one group per prompt, in order; the prompts are split over all engines.

        The prompts of a dead engine are queued again, once. If the transport can replay the last push, a new engine
        joins as soon as it has the weights; otherwise the next push replaces the dead engine.

        Args:
            progress: called with the number of finished and of all prompts.

        Raises:
            TimeoutError: not all prompts were done in ``timeout_s``.
            EngineFailed: the same prompts killed two engines.
            EnginesLost: no engine is left, and none is about to join.
        """
        deadline = time.monotonic() + timeout_s
        results: list[list[CompletionGroup] | None] = []
        queue: deque[tuple[int, slice, int]] = deque()
        for number, part in enumerate(_chunks(len(prompts), len(self.engines), candidates)):
            queue.append((number, part, 1))
            results.append(None)
        idle, running = [index for index in range(len(self.engines)) if index not in self.lost], {}
        joining: dict[Any, int] = {}
        while queue or running:
            if not idle and not running and not joining:
                raise EnginesLost(f"all {len(self.engines)} engines died before they had written all candidates")
            while queue and idle:
                number, part, attempt = queue.popleft()
                engine = idle.pop()
                call = self.engines[engine].generate.remote(list(prompts[part]), list(seeds[part]), candidates)
                running[call] = (engine, number, part, attempt)
            waited_for = [*running, *joining]
            done, _ = ray.wait(waited_for, num_returns=1, timeout=max(0.0, deadline - time.monotonic()))
            if not done:
                finished = sum(len(r) for r in results if r)
                raise TimeoutError(
                    f"the engines generated candidates for {finished} of {len(prompts)} prompts in {timeout_s:.0f} s "
                    "(online.generate_timeout_s)"
                )
            if done[0] in joining:
                if self._rejoined(engine := joining.pop(done[0]), done[0]):
                    idle.append(engine)
                continue
            engine, number, part, attempt = running.pop(done[0])
            try:
                results[number] = ray.get(done[0])
            except RayActorError as error:
                if attempt == ENGINE_ATTEMPTS:
                    raise EngineFailed(
                        f"prompts {part.start} to {part.stop} killed two engines: {error_summary(error)}"
                    ) from None
                queue.appendleft((number, part, attempt + 1))
                self.lost.add(engine)
                if self.weights is not None and self.weights[1] is not None:
                    joining[self._rejoin(engine)] = engine
                else:
                    logger.warning("engine %d died; the next push of weights replaces it", engine)
                continue
            idle.append(engine)
            progress(sum(len(r) for r in results if r), len(prompts))
        return [group for part in results if part for group in part]

    def sleep(self) -> None:
        """Put every engine to sleep, which frees its GPU memory."""
        self._each("falling asleep", lambda engine: engine.sleep.remote())

    def wake(self) -> None:
        """Wake every engine, which allocates its GPU memory again."""
        self._each("waking up", lambda engine: engine.wake.remote())

    def _each(self, doing: str, call: Callable[[Any], Any]) -> None:
        """Call every engine and wait for all; dead engines are skipped here and noticed when they next get prompts."""
        assert self.config.online is not None
        timeout = self.config.online.sync_timeout_s
        for index, answer in enumerate([call(engine) for engine in self.engines]):
            try:
                ray.get(answer, timeout=timeout)
            except GetTimeoutError:
                raise TimeoutError(
                    f"{doing}: engine {index} did not answer in {timeout:.0f} s (online.sync_timeout_s)"
                ) from None
            except RayActorError:
                continue

    def close(self) -> None:
        """Shut down the engines and remove their placement groups."""
        for engine in self.engines:
            with contextlib.suppress(Exception):
                ray.kill(engine)
        for group in self.groups:
            with contextlib.suppress(Exception):
                remove_placement_group(group)
        self.engines, self.groups, self.placements, self.lost = [], [], [], set()


def _chunks(prompts: int, engines: int, candidates: int) -> Iterator[slice]:
    fair = -(-prompts // engines)
    size = min(fair, max(-(-MIN_CHUNK_COMPLETIONS // candidates), -(-prompts // (engines * CHUNKS_PER_ENGINE))))
    return (slice(start, min(start + size, prompts)) for start in range(0, prompts, size))
