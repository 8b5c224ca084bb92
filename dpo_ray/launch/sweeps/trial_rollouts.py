"""The engines of an online slot, which stay for the next trial, and the judges and the collector of each trial."""

import contextlib
import logging
import time
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError

from dpo_ray.config import Config, override
from dpo_ray.launch.cluster import Cluster
from dpo_ray.launch.rollouts.actors import PromptFile, Rollouts, collecting_actors, fleet_actor
from dpo_ray.rollout.judges import validate_columns
from dpo_ray.rollout.ledger import Ledger
from dpo_ray.storage import error_summary

logger = logging.getLogger(__name__)

RETRY_S = 1.0

RESTART_S = 15.0
"""Longest restart of a fleet before it is replaced."""


class TrialRollouts:
    """Owned by the driver; a trial begins on a slot when its workers ask for one.

    Args:
        logs: run directory in which the engines log, since they outlive trials.
        prompts: those of all trials.
        status_actor: gets the collectors' progress.
    """

    def __init__(self, cluster: Cluster, logs: Path, prompts: PromptFile, status_actor: Any) -> None:
        self.cluster, self.logs, self.prompts, self.status_actor = cluster, logs, prompts, status_actor
        self.engines, self.trial = contextlib.ExitStack(), contextlib.ExitStack()
        self.fleet: Any = None
        self.settings: tuple[Any, ...] = ()
        """``engine_settings`` of the fleet; empty without one."""
        self.unused = True
        """True until the fleet has served a trial."""
        self.running = False
        """True while a trial uses the fleet."""

    def begin(self, config: Config) -> Rollouts:
        """Starts judges and collector of a trial, and engines if those of the last trial do not suit it.

        Raises:
            ValueError: the prompts do not suit the trial.
        """
        assert config.online is not None
        self.end_trial()
        validate_columns(config.online, self.prompts.columns)  # the space may vary the judge
        Ledger(config.run.path).validate_prompts(self.prompts.digest, self.prompts.count)
        if engine_settings(config) != self.settings or not (self.unused or self._reset(config)):
            self.start_engines(config)
        self.unused = False
        # A judge that cannot be built fails the trial through its collector.
        actors = collecting_actors(config, self.fleet, self.prompts, self.status_actor)
        collector, _ = self.trial.enter_context(actors)
        self.running = True
        return Rollouts(self.fleet, collector)

    def start_engines(self, config: Config) -> None:
        """Starts engines in the place of those that there are, without waiting for them."""
        self.close()
        of_fleet = override(config, {"run.dir": str(self.logs.parent), "run.name": self.logs.name})
        self.fleet = self.engines.enter_context(fleet_actor(of_fleet, self.cluster))
        self.settings, self.unused = engine_settings(config), True

    def end_trial(self) -> None:
        """Kills judges and collector. The engines stay, and generate nothing more for the trial."""
        self.trial.close()
        if self.running:
            self.running = False
            self.fleet.reset.remote()  # without waiting; ``begin`` waits for its own

    def close(self) -> None:
        """Shuts down all actors."""
        self.trial.close()
        self.running = False
        self.engines.close()
        self.fleet, self.settings = None, ()

    def _reset(self, config: Config) -> bool:
        """Prepares the engines for the next trial; False if they must be replaced."""
        assert config.online is not None
        # An engine aborts requests after the step in progress.
        deadline = time.monotonic() + config.online.engine_timeout_s + RESTART_S
        while True:
            try:
                ray.get(self.fleet.reset.remote(), timeout=max(0.0, deadline - time.monotonic()))
            except Exception as error:
                restarts = isinstance(error, RayActorError) and not error.actor_init_failed
                if restarts and time.monotonic() < deadline:
                    time.sleep(RETRY_S)
                    continue
                logger.warning("the engines of the last trial are replaced: %s", error_summary(error))
                return False
            return True


def engine_settings(config: Config) -> tuple[Any, ...]:
    """All settings on which fleet and engines depend; each trial pushes its own weights."""
    online = config.online
    assert online is not None
    lora = config.model.lora
    model = (config.model.path, config.model.dtype, config.max_model_len, lora and lora.targets)
    timeouts = (online.generate_timeout_s, online.engine_timeout_s, online.sync_timeout_s)
    return *model, config.cluster, online.engine, online.sync, online.max_lag == 0, timeouts
