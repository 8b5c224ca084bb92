"""The actors of an online run, created by the driver, so that none dies with another; those that hang are restarted."""

import contextlib
import logging
import os
import pickle
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from dpo_ray.config import Config
from dpo_ray.launch.cluster import Cluster, same_node
from dpo_ray.launch.command import TrainingFailed
from dpo_ray.launch.rollouts.collector import CollectorActor
from dpo_ray.launch.rollouts.fleet import FleetActor
from dpo_ray.launch.rollouts.judge_actor import RemoteJudge, start_judges
from dpo_ray.rollout.judges import columns_by_judge
from dpo_ray.rollout.rounds import digest_of_prompts
from dpo_ray.storage import error_summary
from dpo_ray.types import Prompt

logger = logging.getLogger(__name__)

CALLS = 1000
"""Calls in progress per actor: most of them wait."""
EARLY_S = 5.0
"""Longest wait for judges to be built before the workers start: most are, and those that cannot be fail by then."""
PING_INTERVAL_S = 10.0
POLL_S = 0.5
PING_TIMEOUT_S = 60.0
CLOSE_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class PromptFile:
    """The prompts of a run, for its collector."""

    path: Path
    columns: Mapping[str, set[str]]
    """See ``columns_by_judge``."""
    digest: str
    """``digest_of_prompts`` of the training prompts."""
    count: int
    """Training prompts."""


def write_prompts(folder: Path, prompts: Sequence[Prompt], held_out: Sequence[Prompt]) -> PromptFile:
    """Writes the prompts to a file in ``folder``."""
    path = folder / "prompts.pickle"
    folder.mkdir(exist_ok=True)
    path.write_bytes(pickle.dumps((prompts, held_out)))
    return PromptFile(path, columns_by_judge(prompts, held_out), digest_of_prompts(prompts), len(prompts))


@dataclass(frozen=True, slots=True)
class Rollouts:
    """Handles for the training workers."""

    fleet: Any
    collector: Any


@contextlib.contextmanager
def rollout_actors(
    config: Config, cluster: Cluster, prompts: Sequence[Prompt], held_out: Sequence[Prompt], status_actor: Any
) -> Iterator[Rollouts]:
    """Starts fleet, judges and collector, and shuts them down at the end. Engines start meanwhile.

    Raises:
        ValueError, TrainingFailed: the judge cannot be built.
    """
    file = write_prompts(config.run.path / "ray", prompts, held_out)
    with (
        fleet_actor(config, cluster) as fleet,
        collecting_actors(config, fleet, file, status_actor) as (collector, judges),
    ):
        _raise_early_failure(judges)
        yield Rollouts(fleet, collector)


@contextlib.contextmanager
def fleet_actor(config: Config, cluster: Cluster) -> Iterator[Any]:
    """Starts a FleetActor, whose engines start meanwhile; shuts the engines down at the end."""
    fleet = _start(FleetActor, config.model_dump(mode="json"), cluster)
    watchdog = Watchdog("fleet", fleet)
    try:
        yield fleet
    finally:
        watchdog.stop()
        try:
            ray.get(fleet.close.remote(), timeout=CLOSE_TIMEOUT_S)
        except Exception as error:  # logged, so that it does not hide the error of the run
            logger.warning("the engines could not be shut down in order: %s", error)
        watchdog.kill()


@contextlib.contextmanager
def collecting_actors(
    config: Config, fleet: Any, prompts: PromptFile, status_actor: Any
) -> Iterator[tuple[Any, Sequence[RemoteJudge]]]:
    """Starts the collector and the judges of a run on the engines of ``fleet``; kills them at the end."""
    started = start_judges(config, fleet, prompts.columns)
    judges = list({id(judge): judge for replicas in started.values() for judge in replicas}.values())
    # As bytes: Ray warns of arguments with references, which a restarted actor may not find.
    handles = ray.cloudpickle.dumps((fleet, started, status_actor))
    collector = _start(CollectorActor, config.model_dump(mode="json"), prompts.path, handles)
    watchdog = Watchdog("collector", collector)
    try:
        yield collector, judges
    finally:
        watchdog.stop()
        watchdog.kill()
        for judge in judges:
            with contextlib.suppress(RayError):
                ray.kill(judge.handle)


def _start(actor: type, *arguments: Any) -> Any:
    return (
        ray.remote(actor)
        .options(num_cpus=0, max_restarts=-1, max_concurrency=CALLS, scheduling_strategy=same_node())
        .remote(*arguments)
    )


def _raise_early_failure(judges: Sequence[RemoteJudge]) -> None:
    """Raises the error of a judge that fails while it is built, if it fails soon; later the collector reports it."""
    building = [judge.handle.ready.remote() for judge in judges]
    done, _ = ray.wait(building, num_returns=len(building), timeout=EARLY_S) if building else ((), ())
    for answer in done:
        try:
            ray.get(answer)
        except RayTaskError as error:
            if isinstance(error.cause, ValueError):
                raise error.cause from None
            raise TrainingFailed(f"the judge cannot be built: {error_summary(error.cause)}") from None


class Watchdog:
    """Kills an actor that does not answer for PING_TIMEOUT_S; Ray restarts it, as it does with one that dies."""

    def __init__(self, name: str, actor: Any) -> None:
        self.name, self.actor = name, actor
        self._stopped = threading.Event()
        self._pid: int | None = None
        """The process that answered last."""
        self._thread = threading.Thread(target=self._run, name=f"watch-{name}", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop watching."""
        self._stopped.set()
        # Within a call of Ray at the exit of the interpreter, it would crash the process.
        self._thread.join(10 * POLL_S)

    def kill(self) -> None:
        """Kill the actor for good."""
        if not ray.is_initialized():  # after a second Ctrl-C; a call would connect to a cluster
            return
        with contextlib.suppress(RayError):
            ray.kill(self.actor)
        kill_process(self._pid)

    def _run(self) -> None:
        answered = time.monotonic()
        while not self._stopped.wait(PING_INTERVAL_S):
            try:
                self._pid = self._ping()
                answered = time.monotonic()
            except RayError:  # it hangs, or it restarts, or it is stopped and takes no new connection
                if time.monotonic() > answered + PING_TIMEOUT_S and not self._stopped.is_set():
                    logger.warning("the %s did not answer in %.0f s; restarting it", self.name, PING_TIMEOUT_S)
                    with contextlib.suppress(RayError):
                        ray.kill(self.actor, no_restart=False)
                    kill_process(self._pid)
                    answered, self._pid = time.monotonic(), None

    def _ping(self) -> int | None:
        """The process id of the actor; the last one if watching is stopped meanwhile."""
        answer, deadline = self.actor.ping.remote(), time.monotonic() + PING_TIMEOUT_S
        while not ray.wait([answer], timeout=POLL_S)[0]:
            if self._stopped.is_set():
                return self._pid
            if time.monotonic() > deadline:
                raise GetTimeoutError(f"no answer in {PING_TIMEOUT_S:.0f} s")
        return ray.get(answer)


def kill_process(pid: int | None) -> None:
    """Kill the process of an actor on this node.

    Ray asks a process to end itself, and gives up on one that is stopped and takes no new connection.
    """
    with contextlib.suppress(OSError):
        if pid is not None and Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::"):
            os.kill(pid, signal.SIGKILL)
