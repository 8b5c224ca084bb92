"""Judges as Ray actors, each in a process of its own: a judge that hangs is killed, and nothing else with it."""

import asyncio
import pickle
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from dpo_ray.config import Config
from dpo_ray.config.rounds import JudgeConfig
from dpo_ray.launch.rollouts.completions import EngineCompletions
from dpo_ray.launch.rollouts.remote_engine import actor_result
from dpo_ray.launch.run_dir import log_to_run
from dpo_ray.rollout.judges import (
    Judge,
    JudgeContext,
    bind_judge,
    capacity_of,
    check_scores,
    is_async,
)
from dpo_ray.rollout.judges.calls import Capacity
from dpo_ray.rollout.judging import JudgeDied
from dpo_ray.types import CompletionGroup, Judgement

PING_TIMEOUT_S = 30.0
CALLS = 1000
"""Calls in progress per actor, so that a ping never waits for scores."""


class JudgeActor:
    """One replica of a judge.

    Args:
        key: of ``OnlineConfig.judges``.
        columns: of the prompts' records, see ``columns_of``.
        fleet: pickled handle of the FleetActor.
    """

    def __init__(self, config: dict[str, Any], key: str, index: int, columns: set[str], fleet: bytes) -> None:
        parsed = Config.model_validate(config)
        log_to_run(parsed.run.path, f"{key}-{index}")
        assert parsed.online is not None
        self._engines = EngineCompletions(parsed, pickle.loads(fleet))
        context = JudgeContext(parsed.run.path, self._engines.complete, self._engines.decode, columns)
        self._build = bind_judge(parsed.online.judges[key], context)
        self._completions = parsed.online.candidates
        self._judge: Judge | None = None
        self._building = asyncio.Lock()
        self._calls: set[asyncio.Future[Any]] = set()
        """The calls in progress."""

    async def ping(self) -> None:
        """Returns at once, also while the judge is built."""

    async def ready(self) -> Capacity:
        """Build the judge; returns its limit on concurrent requests."""
        return capacity_of(await self._built(), self._completions)

    async def score(self, groups: Sequence[CompletionGroup]) -> list[Judgement]:
        """Scores of every completion of every group."""
        judge = await self._built()
        scores: Any = judge(groups) if is_async(judge) else asyncio.to_thread(judge, groups)
        call = asyncio.ensure_future(scores)
        self._calls.add(call)
        call.add_done_callback(self._calls.discard)
        return check_scores(groups, await call)

    async def idle(self) -> None:
        """Returns when no call is in progress. Ray does not cancel those of a caller that died."""
        while self._calls:
            await asyncio.wait(self._calls)

    async def _built(self) -> Judge:
        async with self._building:
            if self._judge is None:
                self._judge = await asyncio.to_thread(self._build)
            return self._judge


@dataclass(frozen=True, slots=True)
class RemoteJudge:
    """A ``JudgeReplica`` in an actor that Ray restarts.

    Attributes:
        handle: the actor.
        start_timeout_s: longest wait for a restarted judge.
    """

    handle: Any
    start_timeout_s: float

    async def ready(self) -> Capacity:
        """Wait until the judge is built, and restart it if it hangs; returns its limit on concurrent requests.

        Raises:
            Exception: building it failed.
            TimeoutError: it was not built in time.
        """
        answered, limit = time.monotonic(), asyncio.timeout(self.start_timeout_s)
        try:
            async with limit:
                while True:
                    try:
                        return await self._built()
                    except RayTaskError as error:
                        raise error.cause from None
                    except RayActorError as error:
                        if error.actor_init_failed:
                            raise
                        # It restarts, or it is stopped and takes no new connection.
                        if time.monotonic() > answered + PING_TIMEOUT_S:
                            ray.kill(self.handle, no_restart=False)
                            answered = time.monotonic()
                        await asyncio.sleep(0.5)
        except TimeoutError:
            if not limit.expired():  # an error of the judge itself
                raise
            raise TimeoutError(
                f"the judge was not ready after {self.start_timeout_s:.0f} s (cluster.start_timeout_s)"
            ) from None

    async def _built(self) -> Capacity:
        """The answer of ``ready``; a process that does not answer to ``ping`` meanwhile is killed."""
        building = asyncio.ensure_future(self.handle.ready.remote())
        while not (await asyncio.wait({building}, timeout=PING_TIMEOUT_S))[0]:
            limit = asyncio.timeout(PING_TIMEOUT_S)
            try:
                async with limit:
                    await self.handle.ping.remote()
            except (TimeoutError, RayActorError):
                if limit.expired():
                    ray.kill(self.handle, no_restart=False)
        return building.result()

    async def score(self, groups: Sequence[CompletionGroup]) -> list[Judgement]:
        """Scores of every completion of every group."""
        return await actor_result(self.handle.score.remote(groups), died=JudgeDied("its process died"))

    async def idle(self) -> None:
        """Wait until no call is in progress."""
        await actor_result(self.handle.idle.remote(), died=JudgeDied("its process died"))

    async def restart(self) -> None:
        """Kill the process; Ray starts another."""
        ray.kill(self.handle, no_restart=False)


def start_judges(config: Config, fleet: Any, columns: Mapping[str, set[str]]) -> dict[str, list[RemoteJudge]]:
    """Start all replicas of all judges, without waiting for them. They belong to the calling process.

    One judge with both purposes is started once.

    Args:
        columns: of the records of the prompts that each judge gets, by its key.
    """
    assert config.online is not None
    started: dict[str, list[RemoteJudge]] = {}
    for key, judge in config.online.judges.items():
        same = next((other for other in started if config.online.judges[other] == judge), None)
        started[key] = started[same] if same else _start_replicas(config, key, judge, columns[key], fleet)
    return started


def _start_replicas(config: Config, key: str, judge: JudgeConfig, columns: set[str], fleet: Any) -> list[RemoteJudge]:
    actor = ray.remote(JudgeActor).options(
        num_cpus=0,
        num_gpus=judge.num_gpus,
        max_restarts=-1,
        max_concurrency=CALLS,
        runtime_env={} if judge.num_gpus else {"env_vars": {"CUDA_VISIBLE_DEVICES": ""}},
    )
    plain, handle = config.model_dump(mode="json"), ray.cloudpickle.dumps(fleet)
    replicas = [actor.remote(plain, key, index, columns, handle) for index in range(judge.replicas)]
    return [RemoteJudge(replica, config.cluster.start_timeout_s) for replica in replicas]
