"""The slots of a sweep: each is a worker group that runs one trial after another, in a thread of the driver.

The workers of an offline slot stay for the next trial. An online trial has workers, engines and judges of its own.
"""

import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dpo_ray.config import Config
from dpo_ray.launch.cluster import Cluster
from dpo_ray.launch.command import Stopped
from dpo_ray.launch.rollouts.actors import rollout_actors
from dpo_ray.launch.run_dir import log_to_run
from dpo_ray.launch.status import start_status_actor
from dpo_ray.launch.sweeps.mailbox import Channel, Task
from dpo_ray.launch.workers import Trial, build_torch_trainer, train_on_workers
from dpo_ray.rollout.judges import validate_columns
from dpo_ray.rollout.ledger import Ledger
from dpo_ray.rollout.rounds import digest_of_prompts
from dpo_ray.storage import error_summary
from dpo_ray.types import Prompt

logger = logging.getLogger(__name__)


class Slot:
    """A thread of the driver; ``error`` is set if it ended before the sweep did."""

    def __init__(self, number: int, run: Callable[[], None]) -> None:
        self.number, self.run = number, run
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, name=f"slot-{number}", daemon=True)
        self.thread.start()

    @property
    def alive(self) -> bool:
        """True until the slot ends."""
        return self.thread.is_alive()

    def _run(self) -> None:
        try:
            self.run()
        except BaseException as error:
            if isinstance(error, Exception):  # Ray Train exits where a person interrupts, which the command reports
                logger.warning("slot %d ended: %s", self.number, error)
            self.error = error


def offline_slot(config: Config, cluster: Cluster, channel: Channel, run_dir: Path, max_failures: int) -> None:
    """Workers that run trials until there are no more. Those that die are started again, and ask again.

    Args:
        max_failures: restarts before the slot ends.
    """
    arguments = {"channel": channel, "on_gpus": cluster.on_gpus, "run_dir": str(run_dir)}
    build_torch_trainer(_run_worker, arguments, config, cluster, str(run_dir / "ray"), max_failures=max_failures).fit()


def _run_worker(arguments: dict[str, Any]) -> None:
    # Imports are lines of the slot's log until the first trial has its own.
    log_to_run(Path(arguments["run_dir"]), f"slot-{arguments['channel'].slot}")
    import torch

    from dpo_ray.launch.sweeps.slot_worker import run_trials

    device = torch.device("cuda", torch.cuda.current_device()) if arguments["on_gpus"] else torch.device("cpu")
    run_trials(arguments["channel"], device)


def online_slot(
    cluster: Cluster, channel: Channel, prompts: Sequence[Prompt], held_out: Sequence[Prompt], loop: str
) -> None:
    """Runs trials until there are no more, each with workers, engines and judges of its own."""
    while True:
        message, answer = channel.message("idle"), None
        while answer is None:
            answer = channel.ask_once(message)
        task = Task(*answer)
        if not task.trial:
            return
        config = Config.model_validate(task.config)
        try:
            _run_online_trial(config, cluster, Trial(channel, task.trial), prompts, held_out, loop)
        except Exception as error:
            channel.ask("failed", task.trial, (error_summary(error), False))


def _run_online_trial(
    config: Config, cluster: Cluster, trial: Trial, prompts: Sequence[Prompt], held_out: Sequence[Prompt], loop: str
) -> None:
    assert config.online is not None
    validate_columns(config.online, prompts, held_out)  # the space may vary the judge
    Ledger(config.run.path).validate_prompts(digest_of_prompts(prompts), len(prompts))
    status_actor = start_status_actor()
    try:
        with rollout_actors(config, cluster, prompts, held_out, status_actor) as rollouts:
            train_on_workers(config, cluster, loop, status_actor=status_actor, rollouts=rollouts, trial=trial)
        ended = "finished"
    except Stopped:
        ended = "paused"
    trial.channel.ask(ended, trial.name)
