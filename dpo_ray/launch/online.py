"""``jobs.online``: engines, judges and training workers on one cluster, round after round."""

import time

from dpo_ray.config import Config, with_absolute_paths
from dpo_ray.launch.cluster import Cluster
from dpo_ray.launch.data import prepare_round_data
from dpo_ray.launch.offline import monitored, validate_training
from dpo_ray.launch.rollouts.actors import rollout_actors
from dpo_ray.launch.rollouts.weights import BETWEEN_GPUS, build_transport
from dpo_ray.launch.run_dir import exclusive_run_dir, make_run_dir
from dpo_ray.launch.workers import train_on_workers
from dpo_ray.model.architecture import validate_online_model
from dpo_ray.report.live.display import text_console
from dpo_ray.rollout.ledger import Ledger

LOOP = "dpo_ray.launch.loops:online"


def run_online(config: Config, cluster: Cluster) -> None:
    """Trains in rounds and writes the report.

    Raises:
        ValueError: the configuration, the prompts or the judge are invalid.
        TrainingFailed: the workers or the engines failed.
    """
    console = text_console()
    config = with_absolute_paths(config)
    validate_online(config)
    assert config.online is not None
    with exclusive_run_dir(config.run):
        if note := note_on_reference(config):
            console.print(note, soft_wrap=True)
        prompts, held_out, digests = prepare_round_data(config, cluster, console)
        make_run_dir(config)
        Ledger(config.run.path).validate_prompts(digests["online.prompts"], len(prompts))
        started = time.monotonic()
        title = f"{config.run.name}: {config.online.rounds} rounds of {config.online.prompts_per_round} prompts"
        with (
            monitored(config, console, title=title, started=started) as status_actor,
            rollout_actors(config, cluster, prompts, held_out, status_actor) as rollouts,
        ):
            # Engines, judges and training workers start concurrently.
            train_on_workers(config, cluster, LOOP, status_actor=status_actor, rollouts=rollouts)


def validate_online(config: Config) -> None:
    """Checks everything that can be checked before prompts and model are loaded."""
    assert config.online is not None
    validate_training(config)
    validate_online_model(config.model.path)
    build_transport(config, on_gpus=config.online.sync.use in BETWEEN_GPUS)


def note_on_reference(config: Config) -> str | None:
    """A sentence for self-play whose reference is never refreshed; None for other runs."""
    assert config.online is not None
    never = config.reference.refresh == "never" and config.reference_kind != "none"
    if config.online.source.use != "self_play" or not never:
        return None
    return (
        "online.source.use: self_play with reference.refresh: never: SPIN (arXiv:2401.01335) refreshes the reference "
        "each round; for its algorithm set reference.refresh: round"
    )
