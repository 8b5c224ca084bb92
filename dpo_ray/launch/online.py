"""``jobs.online``: engines, judge and training workers on one cluster, round after round."""

import logging
import time
from typing import Any

import ray

from dpo_ray.config import Config, with_absolute_paths
from dpo_ray.launch.cluster import Cluster, same_node
from dpo_ray.launch.data import prepare_prompts
from dpo_ray.launch.display import text_console
from dpo_ray.launch.offline import monitored, validate_training
from dpo_ray.launch.rollouts.coordinator import SPARE_THREADS, Coordinator
from dpo_ray.launch.rollouts.push import BETWEEN_GPUS, build_transport
from dpo_ray.launch.run_dir import make_run_dir
from dpo_ray.launch.workers import train_on_workers
from dpo_ray.model.architecture import validate_online_model
from dpo_ray.rollout.collect import validate_round_size
from dpo_ray.rollout.judges import build_judge
from dpo_ray.rollout.selectors import build_selector
from dpo_ray.types import Prompt

logger = logging.getLogger(__name__)

LOOP = "dpo_ray.launch.loops:online"
CLOSE_TIMEOUT_S = 60.0


def run_online(config: Config, cluster: Cluster) -> None:
    """Trains in rounds and writes the report.

    Raises:
        ValueError: the configuration or the prompts are invalid.
        TrainingFailed: the workers or the engines failed.
    """
    console = text_console()
    config = with_absolute_paths(config)
    validate_online(config)
    assert config.online is not None
    prompts = prepare_prompts(config, config.online.prompts, "online.prompts", console)
    held_out = prepare_prompts(config, config.online.eval_prompts, "online.eval_prompts", console)
    validate_round_size(prompts, config.online.prompts_per_round)
    make_run_dir(config)
    started = time.monotonic()
    title = f"{config.run.name}: {config.online.rounds} rounds of {config.online.prompts_per_round} prompts"
    with monitored(config, console, title=title, started=started) as status_actor:
        coordinator = _start_coordinator(config, cluster, prompts, held_out, status_actor)
        try:
            # Engines and training workers start concurrently; the first push of weights waits for the engines.
            coordinator.start.remote()
            train_on_workers(config, cluster, LOOP, status_actor=status_actor, coordinator=coordinator)
        finally:
            _shut_down(coordinator)


def _start_coordinator(
    config: Config, cluster: Cluster, prompts: list[Prompt], held_out: list[Prompt], status_actor: Any
) -> Any:
    threads = config.cluster.train_workers + SPARE_THREADS
    actor = ray.remote(Coordinator).options(num_cpus=0, max_concurrency=threads, scheduling_strategy=same_node())
    extension = build_transport(config, on_gpus=cluster.on_gpus).worker_extension
    return actor.remote(config.model_dump(mode="json"), cluster, prompts, held_out, status_actor, extension)


def _shut_down(coordinator: Any) -> None:
    """Shuts engines and judge down; a failure is logged, so that it does not hide the error of the run."""
    try:
        ray.get(coordinator.close.remote(), timeout=CLOSE_TIMEOUT_S)
    except Exception as error:
        logger.warning("engines and judge could not be shut down: %s", error)


def validate_online(config: Config) -> None:
    """Checks everything that can be checked before prompts and model are loaded."""
    assert config.online is not None
    validate_training(config)
    validate_online_model(config.model.path)
    build_judge(config.online.judge)
    build_selector(config.online.select)
    build_transport(config, on_gpus=config.online.sync.use in BETWEEN_GPUS)
