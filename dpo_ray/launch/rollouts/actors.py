"""The actors of an online run, created by the driver, so that none dies with another; those that hang are restarted."""

import contextlib
import logging
import os
import pickle
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from dpo_ray.config import Config
from dpo_ray.launch.cluster import Cluster, same_node
from dpo_ray.launch.command import TrainingFailed
from dpo_ray.launch.rollouts.collector import CollectorActor
from dpo_ray.launch.rollouts.fleet import FleetActor
from dpo_ray.launch.rollouts.judge_actor import RemoteJudge, start_judges
from dpo_ray.rollout.judges.columns import columns_of
from dpo_ray.storage import error_summary
from dpo_ray.types import Prompt

logger = logging.getLogger(__name__)

CALLS = 1000
"""Calls in progress per actor: most of them wait."""
EARLY_S = 5.0
"""Longest wait for judges to be built before the workers start: most are, and those that cannot be fail by then."""
PING_INTERVAL_S = 10.0
PING_TIMEOUT_S = 60.0
CLOSE_TIMEOUT_S = 60.0


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
    with (
        fleet_actor(config, cluster) as fleet,
        collecting_actors(config, fleet, prompts, held_out, status_actor) as (collector, judges),
    ):
        _raise_early_failure(judges)
        yield Rollouts(fleet, collector)


@contextlib.contextmanager
def fleet_actor(config: Config, cluster: Cluster) -> Iterator[Any]:
    """Starts a FleetActor, whose engines start meanwhile; shuts the engines down at the end."""
    fleet = _start(FleetActor, config.model_dump(mode="json"), cluster)
    try:
        with _restarted_if_hung("fleet", fleet):
            yield fleet
    finally:
        try:
            ray.get(fleet.close.remote(), timeout=CLOSE_TIMEOUT_S)
        except Exception as error:  # logged, so that it does not hide the error of the run
            logger.warning("the engines could not be shut down in order: %s", error)
        with contextlib.suppress(RayError):
            ray.kill(fleet)


@contextlib.contextmanager
def collecting_actors(
    config: Config, fleet: Any, prompts: Sequence[Prompt], held_out: Sequence[Prompt], status_actor: Any
) -> Iterator[tuple[Any, Sequence[RemoteJudge]]]:
    """Starts the collector and the judges of a run on the engines of ``fleet``; kills them at the end."""
    started = start_judges(config, fleet, {"judge": columns_of(prompts), "eval_judge": columns_of(held_out)})
    judges = list({id(judge): judge for replicas in started.values() for judge in replicas}.values())
    # In a file, and handles as bytes: Ray warns of arguments with references, which a restarted actor may not find.
    prompt_file = config.run.path / "ray" / "prompts.pickle"
    prompt_file.parent.mkdir(exist_ok=True)
    prompt_file.write_bytes(pickle.dumps((prompts, held_out)))
    handles = ray.cloudpickle.dumps((fleet, started, status_actor))
    collector = _start(CollectorActor, config.model_dump(mode="json"), prompt_file, handles)
    try:
        with _restarted_if_hung("collector", collector):
            yield collector, judges
    finally:
        for actor in (collector, *(judge.handle for judge in judges)):
            with contextlib.suppress(RayError):
                ray.kill(actor)


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


@contextlib.contextmanager
def _restarted_if_hung(name: str, actor: Any) -> Iterator[None]:
    """Kills an actor that does not answer for PING_TIMEOUT_S; Ray restarts it, as it does with one that dies."""
    stop = threading.Event()
    threading.Thread(target=_watch, args=(name, actor, stop), name=f"watch-{name}", daemon=True).start()
    try:
        yield
    finally:
        stop.set()


def _watch(name: str, actor: Any, stop: threading.Event) -> None:
    answered, pid = time.monotonic(), None
    while not stop.wait(PING_INTERVAL_S):
        try:
            pid = ray.get(actor.ping.remote(), timeout=PING_TIMEOUT_S)
            answered = time.monotonic()
        except RayError:  # it hangs, or it restarts, or it is stopped and takes no new connection
            if time.monotonic() > answered + PING_TIMEOUT_S and not stop.is_set():
                logger.warning("the %s did not answer in %.0f s; restarting it", name, PING_TIMEOUT_S)
                with contextlib.suppress(RayError):
                    ray.kill(actor, no_restart=False)
                kill_process(pid)
                answered, pid = time.monotonic(), None


def kill_process(pid: int | None) -> None:
    """Kill the process of an actor on this node.

    Ray asks a process to end itself, and gives up on one that is stopped and takes no new connection.
    """
    with contextlib.suppress(OSError):
        if pid is not None and Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::"):
            os.kill(pid, signal.SIGKILL)
