"""The engines of an online slot, which stay for the next trial, and the judges and the collector of each trial."""

import contextlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray

from dpo_ray.config import Config, override
from dpo_ray.launch.cluster import Cluster
from dpo_ray.launch.rollouts.actors import Rollouts, collecting_actors, fleet_actor
from dpo_ray.rollout.judges import validate_columns
from dpo_ray.rollout.ledger import Ledger
from dpo_ray.rollout.rounds import digest_of_prompts
from dpo_ray.storage import error_summary
from dpo_ray.types import Prompt

logger = logging.getLogger(__name__)

RESET_TIMEOUT_S = 30.0
"""Longest wait for engines to abort the requests of the last trial; then they are replaced."""


class TrialRollouts:
    """Owned by the driver; a trial begins on a slot when its workers ask for one.

    Args:
        logs: run directory in which the engines log, since they outlive trials.
        status_actor: gets the collectors' progress.
    """

    def __init__(
        self, cluster: Cluster, logs: Path, prompts: Sequence[Prompt], held_out: Sequence[Prompt], status_actor: Any
    ) -> None:
        self.cluster, self.logs, self.prompts, self.held_out = cluster, logs, prompts, held_out
        self.status_actor = status_actor
        self.engines, self.trial = contextlib.ExitStack(), contextlib.ExitStack()
        self.fleet: Any = None
        self.settings: tuple[Any, ...] = ()
        """``engine_settings`` of the fleet."""

    def begin(self, config: Config) -> Rollouts:
        """Starts judges and collector of a trial, and engines if those of the last trial do not suit it.

        Raises:
            ValueError: the prompts do not suit the trial.
        """
        assert config.online is not None
        self.end_trial()
        validate_columns(config.online, self.prompts, self.held_out)  # the space may vary the judge
        Ledger(config.run.path).validate_prompts(digest_of_prompts(self.prompts), len(self.prompts))
        if self.fleet is None or engine_settings(config) != self.settings or not self._reset():
            self.close()
            of_fleet = override(config, {"run.dir": str(self.logs.parent), "run.name": self.logs.name})
            self.fleet = self.engines.enter_context(fleet_actor(of_fleet, self.cluster))
            self.settings = engine_settings(config)
        # A judge that cannot be built fails the trial through its collector.
        actors = collecting_actors(config, self.fleet, self.prompts, self.held_out, self.status_actor)
        collector, _ = self.trial.enter_context(actors)
        return Rollouts(self.fleet, collector)

    def end_trial(self) -> None:
        """Kills judges and collector; the engines stay."""
        self.trial.close()

    def close(self) -> None:
        """Shuts down all actors."""
        self.trial.close()
        self.engines.close()
        self.fleet = None

    def _reset(self) -> bool:
        """Prepares the engines for the next trial; False if they must be replaced."""
        try:
            ray.get(self.fleet.reset.remote(), timeout=RESET_TIMEOUT_S)
        except Exception as error:
            logger.warning("the engines of the last trial are replaced: %s", error_summary(error))
            return False
        return True


def engine_settings(config: Config) -> tuple[Any, ...]:
    """All settings on which fleet and engines depend; each trial pushes its own weights."""
    online = config.online
    assert online is not None
    timeouts = (online.generate_timeout_s, online.engine_timeout_s, online.sync_timeout_s)
    return config.model, config.cluster, online.engine, online.sync, config.max_model_len, online.max_lag, timeouts
