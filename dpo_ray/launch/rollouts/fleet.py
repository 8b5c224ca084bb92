"""The fleet as a Ray actor, which owns the actors of the engines and their placement, and runs no user code.

Its engines die with it. Ray restarts it, and it starts new ones.
"""

import asyncio
import contextlib
import dataclasses
import hashlib
import logging
import os
import time
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError
from ray.util.placement_group import (
    PlacementGroup,
    get_placement_group,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from dpo_ray.config import Config
from dpo_ray.launch.cluster import Cluster
from dpo_ray.launch.rollouts.engine_actor import EngineActor
from dpo_ray.launch.rollouts.remote_engine import RemoteEngine
from dpo_ray.launch.rollouts.weights import build_transport
from dpo_ray.launch.run_dir import log_to_run
from dpo_ray.rollout.engine import Engine
from dpo_ray.rollout.fleet import ConstructorError, Fleet
from dpo_ray.rollout.membership import Membership
from dpo_ray.rollout.placement import (
    EnginePlacement,
    GpuSlot,
    colocated_placements,
    dedicated_placement,
    packing_strategy,
)
from dpo_ray.rollout.vllm_engine import engine_environment
from dpo_ray.storage import error_summary

logger = logging.getLogger(__name__)

CALLS_PER_ENGINE = 100_000
"""Calls of an engine in progress: requests wait in the engine, where a status call overtakes them."""
LAUNCH_SHARE = 0.95
"""Part of the fleet's time-out in which a launch fails by itself, with a better message."""


class Launcher:
    """Starts the actors of engines, each in a placement group of its own or on the GPUs of training workers.

    Args:
        owner: prefix of the names of placement groups, the same after a restart.
        actor_class: the class of the engines' actors.
        worker_extension: import path of the transport's receiving end.
    """

    def __init__(
        self, config: Config, cluster: Cluster, owner: str, *, actor_class: type, worker_extension: str
    ) -> None:
        self.config, self.cluster, self.owner = config, cluster, owner
        self.actor_class, self.worker_extension = actor_class, worker_extension
        dedicated = dedicated_placement(config.cluster, on_gpus=cluster.on_gpus)
        self.placements: Sequence[EnginePlacement] = [dedicated] * config.cluster.rollout_engines
        self._groups: dict[int, PlacementGroup] = {}
        self._actors: dict[int, Any] = {}
        self._starts = 0

    async def launch(self, slot: int) -> RemoteEngine:
        """Start the engine of a slot and wait until it is up.

        Raises:
            ConstructorError: its constructor raised.
            TimeoutError: it got no resources, or was not up in time.
            RayActorError: it died.
        """
        placement, limit_s = self.placements[slot], LAUNCH_SHARE * self.config.cluster.start_timeout_s
        actor = self._actors[slot] = self._create(slot, placement)
        try:
            async with asyncio.timeout(limit_s):
                await actor.__ray_ready__.remote()
        except TimeoutError:
            raise TimeoutError(f"it {self._waits_for(slot)} after {limit_s:.0f} s (cluster.start_timeout_s)") from None
        except RayActorError as error:
            if error.actor_init_failed:
                raise ConstructorError(error_summary(error)) from None
            raise
        return RemoteEngine(actor)

    async def retire(self, slot: int, engine: Engine | None) -> None:
        """Kill the actor of a slot, if there is one, and free its resources."""
        if (actor := self._actors.pop(slot, None)) is not None:
            with contextlib.suppress(Exception):
                ray.kill(actor)
        if (group := self._groups.pop(slot, None)) is not None:
            remove_placement_group(group)

    def remove_leftovers(self) -> None:
        """Remove the placement groups of a fleet that died: Ray keeps those of an actor that it restarts."""
        for group in placement_group_table().values():
            if group["name"].startswith(self.owner) and group["state"] != "REMOVED":
                with contextlib.suppress(ValueError):
                    remove_placement_group(get_placement_group(group["name"]))

    def _create(self, slot: int, placement: EnginePlacement) -> Any:
        online, threads = self.config.online, self.config.cluster.cpus_per_engine
        assert online is not None
        on_cpu = not self.cluster.on_gpus
        return (
            ray.remote(self.actor_class)
            .options(
                num_cpus=placement.num_cpus,
                num_gpus=placement.num_gpus,
                max_concurrency=CALLS_PER_ENGINE,
                scheduling_strategy=self._strategy(slot, placement),
                runtime_env={
                    "env_vars": engine_environment(online.engine, on_cpu=on_cpu, threads=threads)
                    | placement.environment
                },
            )
            .remote(
                self.config.model_dump(mode="json"),
                slot,
                on_cpu=on_cpu,
                executor=placement.executor,
                worker_extension=self.worker_extension,
            )
        )

    def _strategy(self, slot: int, placement: EnginePlacement) -> Any:
        if placement.node is not None:
            return NodeAffinitySchedulingStrategy(placement.node, soft=False)
        self._starts += 1
        group = self._groups[slot] = placement_group(
            [dict(bundle) for bundle in placement.bundles],
            strategy=packing_strategy(placement.bundles, [node["Resources"] for node in ray.nodes() if node["Alive"]]),
            name=f"{self.owner}-{slot}.{self._starts}-{time.time_ns()}",
        )
        return PlacementGroupSchedulingStrategy(
            group, placement_group_bundle_index=0, placement_group_capture_child_tasks=True
        )

    def _waits_for(self, slot: int) -> str:
        group = self._groups.get(slot)
        if group is not None and placement_group_table(group).get("state") != "CREATED":
            return "got no resources (other work holds the cluster's CPUs or GPUs)"
        return "was not up"


class FleetActor(Fleet):
    """The fleet as an async actor; created by the driver. The methods of ``EngineGroup`` are those of ``Fleet``.

    Args:
        actor_class: the class of the engines' actors.
        worker_extension: import path of the transport's receiving end; None for that of the configured transport.
    """

    def __init__(
        self,
        config: dict[str, Any],
        cluster: Cluster,
        *,
        actor_class: type = EngineActor,
        worker_extension: str | None = None,
    ) -> None:
        parsed = Config.model_validate(config)
        log_to_run(parsed.run.path, "fleet")
        assert parsed.online is not None
        if worker_extension is None:
            worker_extension = build_transport(parsed, on_gpus=cluster.on_gpus).worker_extension
        self.cluster, on_workers = parsed.cluster, parsed.cluster.colocate and cluster.on_gpus
        self.launcher = Launcher(
            parsed,
            cluster,
            # The same for a fleet that replaces another of this run.
            f"dpo_ray-engines-{hashlib.sha256(str(parsed.run.path).encode()).hexdigest()[:16]}",
            actor_class=actor_class,
            worker_extension=worker_extension,
        )
        self.launcher.remove_leftovers()
        super().__init__(
            self.launcher.launch,
            self.launcher.retire,
            parsed.cluster.rollout_engines,
            start_timeout_s=parsed.cluster.start_timeout_s,
            sync_timeout_s=parsed.online.sync_timeout_s,
            ping_timeout_s=parsed.online.engine_timeout_s,
            drain_timeout_s=parsed.online.generate_timeout_s,
            logs=str(parsed.run.path / "logs" / "engine-*.log"),
            epoch=time.time_ns() // 1000,
        )
        self._running: asyncio.Task[None] | None = None
        self._placing = asyncio.Lock()
        self._gpu_slots: Sequence[GpuSlot] = ()
        self._unplaced = False
        if not on_workers:
            self._run()
        else:
            self._unplaced = ray.get_runtime_context().was_current_actor_reconstructed

    async def ping(self) -> int:
        """The id of this process; returns at once."""
        return os.getpid()

    async def close(self) -> None:
        """Shut down the engines and free their resources."""
        if self._running is not None:
            self._running.cancel()
            await asyncio.wait({self._running})

    async def reset(self) -> None:
        """See ``Fleet.reset``."""
        if self._running is not None and self._running.done() and not self._running.cancelled():
            raise RuntimeError(f"the fleet failed: {self._running.exception()!r}")
        await super().reset()

    async def place_engines(self, slots: Sequence[GpuSlot]) -> None:
        """Start the engines on the training workers' GPUs, or move them to the GPUs of restarted workers.

        Every rank calls this before it allocates GPU memory, apart from the model of an earlier trial: engines measure
        free memory as they start, then sleep.

        Raises:
            ValueError: too few nodes have enough of the workers' GPUs.
        """
        async with self._placing:
            if slots != self._gpu_slots:
                placements = colocated_placements(self.cluster, slots)
                await self.close()
                self.launcher.placements, self._gpu_slots = placements, slots
                self._unplaced = False
                self._run()
                await self.started(self.cluster.start_timeout_s)
            else:
                await self.replace_unfinished()
            await self.sleep()

    async def membership(self, after: int, wait_s: float) -> Membership:
        """See ``Fleet.membership``; an error of the actor's own ends the run, too."""
        if self._running is not None and self._running.done() and not self._running.cancelled():
            await asyncio.sleep(wait_s)
            return Membership(time.time_ns() // 1000, error=f"the fleet failed: {self._running.exception()!r}")
        membership = await super().membership(after, wait_s)
        return dataclasses.replace(membership, unplaced=True) if self._unplaced else membership

    def _run(self) -> None:
        self._running = asyncio.get_running_loop().create_task(self.run())
