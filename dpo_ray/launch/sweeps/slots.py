"""The slots of a sweep: each is a worker group that runs one trial after another, in a thread of the driver.

The workers of a slot stay for the next trial, and so do the engines of an online slot; judges and collector are those
of the trial.
"""

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dpo_ray.config import Config
from dpo_ray.launch.cluster import Cluster
from dpo_ray.launch.run_dir import log_to_run
from dpo_ray.launch.sweeps.mailbox import Channel
from dpo_ray.launch.workers import build_torch_trainer

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


def run_slot(config: Config, cluster: Cluster, channel: Channel, run_dir: Path, max_failures: int) -> None:
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
