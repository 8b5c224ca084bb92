"""The pool of vLLM engines: Ray actors, one an engine, in placement groups apart from the training workers."""

import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from dpo_ray.config import Config
from dpo_ray.data.tokenize import load_tokenizer, render_prompt
from dpo_ray.launch.cluster import Cluster
from dpo_ray.launch.reporting import log_to_run
from dpo_ray.launch.workers import GivenUp
from dpo_ray.rollout.vllm_engine import VLLMEngine, engine_environment
from dpo_ray.types import CompletionGroup, Prompt

logger = logging.getLogger(__name__)

CHUNKS_PER_ENGINE = 4
"""A round goes to the engines in about this many pieces each: enough to even out their speeds and to show progress."""
MIN_CHUNK_COMPLETIONS = 128
"""Smaller pieces would leave an engine's batches half empty."""
ENGINE_ATTEMPTS = 2
"""How often a piece of work is tried: a second engine dying over the same prompts is not the engine's fault."""


class EngineFailed(GivenUp):
    """An engine could not be started, or the same work killed two engines."""


class EngineActor:
    """One engine in a process of its own. Calls run one at a time, in order."""

    def __init__(self, config: dict[str, Any], index: int, *, on_cpu: bool, worker_extension: str) -> None:
        self.config = Config.model_validate(config)
        log_to_run(self.config.run.path, f"engine-{index}")

        online = self.config.online
        assert online is not None
        tokenizer = load_tokenizer(self.config.model.path, self.config.model.chat_template)
        self.engine = VLLMEngine(
            self.config.model.path,
            render=lambda messages: list(render_prompt(messages, tokenizer)),
            dtype=self.config.model.dtype,
            engine=online.engine,
            max_model_len=self.config.max_model_len,
            tensor_parallel=1 if on_cpu else self.config.cluster.gpus_per_engine,
            worker_extension=worker_extension,
            on_cpu=on_cpu,
            seed=self.config.run.seed,
        )

    def ready(self) -> None:
        """Answers once the engine is up."""

    def generate(self, prompts: list[Prompt], seeds: list[int], candidates: int) -> list[CompletionGroup]:
        """One group a prompt, in order."""
        online = self.config.online
        assert online is not None
        return self.engine.generate(prompts, sampling=online.sampling, candidates=candidates, seeds=seeds)

    def token_logps(self, token_ids: list[int]) -> list[float]:
        """Log-probability of each token after the first, nats."""
        return self.engine.token_logps(token_ids)

    def start_update(self) -> None:
        """Open a weight update."""
        self.engine.start_update()

    def load(self, bucket: Any) -> None:
        """Take one bucket."""
        self.engine.load(bucket)

    def finish_update(self, version: int) -> str:
        """Use the received weights; returns their digest."""
        return self.engine.finish_update(version)


class RolloutPool:
    """Engines and the work dealt to them. Held by one coordinator; not safe to call from two threads at once.

    Args:
        worker_extension: import path of the transport's receiving end.
    """

    def __init__(self, config: Config, cluster: Cluster, worker_extension: str) -> None:
        self.config, self.cluster, self.worker_extension = config, cluster, worker_extension
        self.groups: list[Any] = []
        self.engines: list[Any] = []
        self.weights: tuple[int, list[Any], str] | None = None
        """Version, bucket references and digest of the last push, for engines that join later."""

    def start(self) -> None:
        """Start all engines and wait for them.

        Raises:
            EngineFailed: one did not come up in ``cluster.start_timeout_s``.
        """
        size = self.config.cluster
        for index in range(size.rollout_engines):
            bundle = {"CPU": float(size.cpus_per_engine)}
            bundles = [bundle | ({"GPU": 1.0} if self.cluster.on_gpus else {})]
            if self.cluster.on_gpus and size.gpus_per_engine > 1:
                # vLLM takes one GPU a bundle; bundle 0 also holds this actor's CPUs.
                bundles += [{"GPU": 1.0, "CPU": 1.0}] * (size.gpus_per_engine - 1)
            self.groups.append(placement_group(bundles, strategy="PACK", name=f"dpo_ray-engine-{index}"))
        waited_for = [group.ready() for group in self.groups]
        _, missing = ray.wait(waited_for, num_returns=len(waited_for), timeout=size.start_timeout_s)
        if missing:
            raise EngineFailed(
                f"{len(missing)} of {len(waited_for)} engines got no place in {size.start_timeout_s:.0f} s "
                "(cluster.start_timeout_s): other work holds the cluster's CPUs or GPUs"
            )
        self.engines = [self._start_engine(index) for index in range(size.rollout_engines)]
        for index, engine in enumerate(self.engines):
            self._await_ready(index, engine)

    def _start_engine(self, index: int) -> Any:
        size, online = self.config.cluster, self.config.online
        assert online is not None
        on_cpu = not self.cluster.on_gpus
        single_gpu = self.cluster.on_gpus and size.gpus_per_engine == 1
        strategy = PlacementGroupSchedulingStrategy(
            self.groups[index], placement_group_bundle_index=0, placement_group_capture_child_tasks=True
        )
        actor = ray.remote(EngineActor).options(
            num_cpus=size.cpus_per_engine,
            num_gpus=1 if single_gpu else 0,
            scheduling_strategy=strategy,
            runtime_env={"env_vars": engine_environment(online.engine, on_cpu=on_cpu, threads=size.cpus_per_engine)},
        )
        return actor.remote(
            self.config.model_dump(mode="json"), index, on_cpu=on_cpu, worker_extension=self.worker_extension
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
            raise EngineFailed(f"engine {index} failed to start: {_last_line(error)}; see {logs}") from None

    def replace(self, index: int) -> Any:
        """A new engine in the place of a dead one, holding the weights of the last push.

        Raises:
            EngineFailed: it did not come up, or received something else than was pushed.
        """
        logger.warning("engine %d died; starting another in its place", index)
        with contextlib.suppress(Exception):
            ray.kill(self.engines[index])
        engine = self.engines[index] = self._start_engine(index)
        self._await_ready(index, engine)
        if self.weights is not None:
            version, buckets, digest = self.weights
            timeout = self.config.online.sync_timeout_s if self.config.online else None
            calls = [
                engine.start_update.remote(),
                *(engine.load.remote(b) for b in buckets),
                engine.finish_update.remote(version),
            ]
            if (found := ray.get(calls, timeout=timeout)[-1]) != digest:
                raise EngineFailed(f"engine {index} received weights of digest {found}; version {version} has {digest}")
        return engine

    def generate(
        self,
        prompts: Sequence[Prompt],
        seeds: Sequence[int],
        *,
        candidates: int,
        timeout_s: float,
        progress: Callable[[int, int], None],
    ) -> list[CompletionGroup]:
        """One group a prompt, in order, the prompts shared by all engines.

        A dead engine is replaced and its prompts are queued again, once.

        Args:
            progress: (prompts done, prompts in all).

        Raises:
            TimeoutError: not all prompts were done in ``timeout_s``.
            EngineFailed: the same prompts killed two engines.
        """
        deadline = time.monotonic() + timeout_s
        results: list[list[CompletionGroup] | None] = []
        queue: deque[tuple[int, slice, int]] = deque()
        for number, part in enumerate(_chunks(len(prompts), len(self.engines), candidates)):
            queue.append((number, part, 1))
            results.append(None)
        idle, running = list(range(len(self.engines))), {}
        while queue or running:
            while queue and idle:
                number, part, attempt = queue.popleft()
                engine = idle.pop()
                call = self.engines[engine].generate.remote(list(prompts[part]), list(seeds[part]), candidates)
                running[call] = (engine, number, part, attempt)
            done, _ = ray.wait(list(running), num_returns=1, timeout=max(0.0, deadline - time.monotonic()))
            if not done:
                finished = sum(len(r) for r in results if r)
                raise TimeoutError(
                    f"the engines wrote candidates for {finished} of {len(prompts)} prompts in {timeout_s:.0f} s "
                    "(online.generate_timeout_s)"
                )
            engine, number, part, attempt = running.pop(done[0])
            try:
                results[number] = ray.get(done[0])
            except RayActorError as error:
                if attempt == ENGINE_ATTEMPTS:
                    raise EngineFailed(
                        f"prompts {part.start} to {part.stop} killed two engines: {_last_line(error)}"
                    ) from None
                queue.appendleft((number, part, attempt + 1))
                self.replace(engine)
            idle.append(engine)
            progress(sum(len(r) for r in results if r), len(prompts))
        return [group for part in results if part for group in part]

    def close(self) -> None:
        """Take the engines down and free their places."""
        for engine in self.engines:
            with contextlib.suppress(Exception):
                ray.kill(engine)
        for group in self.groups:
            with contextlib.suppress(Exception):
                remove_placement_group(group)
        self.engines, self.groups = [], []


def _chunks(prompts: int, engines: int, candidates: int) -> Iterator[slice]:
    fair = -(-prompts // engines)
    size = min(fair, max(-(-MIN_CHUNK_COMPLETIONS // candidates), -(-prompts // (engines * CHUNKS_PER_ENGINE))))
    return (slice(start, min(start + size, prompts)) for start in range(0, prompts, size))


def _last_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__


class PoolReceiver:
    """The engines as one receiver of weights: the EngineGroup of rank 0, straight from trainer to engines.

    A bucket is put into the object store once and fetched once a node; neither driver nor coordinator sees a tensor.
    The references of a push are kept until the next one: an engine that dies, also during the push, is replaced by one
    that is given the same buckets.

    Args:
        coordinator: knows the engines and replaces dead ones.
        timeout_s: longest wait for one call.
    """

    def __init__(self, coordinator: Any, timeout_s: float) -> None:
        self.coordinator, self.timeout_s = coordinator, timeout_s
        self.engines: dict[int, Any] = {}
        self.dead: list[int] = []
        self.buckets: list[Any] = []

    def start_update(self) -> None:
        """Open an update on every engine that the pool has.

        An engine that is dead, or that an interrupted push left half loaded, is replaced first.
        """
        self.buckets, self.dead = [], []
        self.engines = dict(enumerate(ray.get(self.coordinator.begin_push.remote())))
        for index, engine in list(self.engines.items()):
            try:
                ray.get(engine.start_update.remote(), timeout=self.timeout_s)
            except RayError:
                self.engines[index] = ray.get(self.coordinator.replace.remote(index))
                ray.get(self.engines[index].start_update.remote(), timeout=self.timeout_s)

    def load(self, bucket: Any) -> None:
        """Send a bucket to every engine."""
        reference = ray.put(bucket)
        self.buckets.append(reference)
        self._call_each("loading weights", lambda engine: engine.load.remote(reference))

    def finish_update(self, version: int) -> list[str]:
        """Put the weights to use and give them to the replacements of engines that died; returns every digest."""
        digests = self._call_each("finishing a weight update", lambda engine: engine.finish_update.remote(version))
        # The list wraps the references, so that they travel as references and not as what they stand for.
        ray.get(self.coordinator.pushed.remote(version, [self.buckets], digests[0]), timeout=self.timeout_s)
        for index in self.dead:
            self.engines[index] = ray.get(self.coordinator.replace.remote(index))
        return digests

    def token_logps(self, token_ids: Sequence[int]) -> list[list[float]]:
        """Every engine's log-probabilities of a text."""
        return self._call_each("scoring the probe text", lambda engine: engine.token_logps.remote(list(token_ids)))

    def _call_each(self, doing: str, call: Callable[[Any], Any]) -> list[Any]:
        """The answers of all engines; an engine found dead is left out from here on.

        Raises:
            TimeoutError: an engine did not answer in time.
            RayActorError: no engine is left.
        """
        pending = {index: call(engine) for index, engine in self.engines.items()}
        _, missing = ray.wait(list(pending.values()), num_returns=len(pending), timeout=self.timeout_s)
        if missing:
            raise TimeoutError(
                f"{doing}: {len(missing)} of {len(pending)} engines did not answer in {self.timeout_s:.0f} s "
                "(online.sync_timeout_s)"
            )
        answers = []
        for index, answer in pending.items():
            try:
                answers.append(ray.get(answer))
            except RayActorError:
                del self.engines[index]
                self.dead.append(index)
                if not self.engines:
                    raise
        return answers
